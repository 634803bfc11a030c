package nat

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"golang.org/x/sys/unix"
)

// verdict is the answer to "would another port help?".
type verdict int

// Where the marks of more than one verdict meet in an error, the last of them
// in this list holds.
const (
	// maybe: the port driver doesn't say why it refused the port, or says
	// something that nobody has seen yet.
	maybe verdict = iota
	// taken: another port would help, and this one may come free.
	taken
	// forbidden: another port would help, and this one won't be had: it is
	// privileged, or reserved, or held by this daemon.
	forbidden
	// no: the request itself can't be served.
	no
)

func (v verdict) String() string {
	return [...]string{"maybe another port", "taken", "another port", "no port"}[v]
}

// mayClear tells whether a port that was refused may be had in a moment.
func (v verdict) mayClear() bool {
	return v == taken || v == maybe
}

// marks has what errors are known by, and what the user can do about them. The
// errno of a port driver's refusal gets lost in RootlessKit's API (an answer
// has only a message), so there is a text for each. Texts are in lower case.
var marks = []struct {
	verdict verdict
	errno   unix.Errno // 0 when there is none.
	text    string
	advice  string
}{
	{taken, unix.EADDRINUSE, "address already in use", adviseInUse},

	{forbidden, unix.EACCES, "permission denied", advisePrivileged},
	// Windows' excluded port ranges, where RootlessKit runs in WSL.
	{forbidden, 0, "forbidden by its access permissions", "publish a port that the host does not reserve"},
	// RootlessKit (all port drivers), gvisor-tap-vsock, and the allocator.
	{forbidden, 0, "conflict with id", adviseOurs},
	{forbidden, 0, "proxy already running", adviseOurs},
	{forbidden, 0, "port is already allocated", adviseOurs},
	{forbidden, 0, "all ports are allocated", adviseOurs},

	{no, unix.EADDRNOTAVAIL, "cannot assign requested address", "publish on an address that the host has (ip address)"},
	{no, unix.EINVAL, "invalid argument", "publish on another address: a link-local one needs a zone, which is not passed on"},
	{no, unix.EAFNOSUPPORT, "address family not supported by protocol", adviseProto},
	{no, unix.EPROTONOSUPPORT, "protocol not supported", adviseProto},
	{no, unix.EMFILE, "too many open files", adviseLimits},
	{no, unix.ENFILE, "too many open files in system", adviseLimits},
	{no, unix.ENOBUFS, "no buffer space available", adviseLimits},
	{no, unix.ENOMEM, "cannot allocate memory", adviseLimits},
	// RootlessKit's validation of a request.
	{no, 0, "unknown proto", adviseProto},
	{no, 0, "invalid parentip", ""},
	{no, 0, "invalid childip", ""},
	{no, 0, "invalid parentport", ""},
	{no, 0, "invalid childport", ""},
	{no, 0, "no portdriver is available", adviseProto},
	// The port drivers builtin, gvisor-tap-vsock (and its way to say that it
	// takes no IPv6 address), slirp4netns.
	{no, 0, "unsupported port protocol", adviseProto},
	{no, 0, "unsupported protocol", adviseProto},
	{no, 0, "too many colons in address", adviseProto},
	{no, 0, "unsupported ip", adviseProto},
	{no, 0, "invalid ip", ""},
	{no, 0, "bad arguments", adviseProto},
	{no, 0, unsupportedText, adviseProto},
	// pesto, and what other than a port a port driver may lack.
	{no, 0, "requires --ipv6", adviseProto},
	{no, 0, "unsupported childip", adviseProto},
	{no, 0, "executable file not found", adviseAPI},
	{no, 0, "fork/exec", adviseAPI},
	{no, 0, "dial unix", adviseAPI},
}

const (
	adviseInUse      = "stop what holds it (sudo ss -%s 'sport = :%d' on the host tells), or publish another host port, or 0 for any free one"
	adviseOurs       = "stop the container that has it (if none has, RootlessKit was left with it, and the daemon's log says so: restart the rootless daemon), or publish another host port, or 0 for any free one"
	advisePrivileged = "ports below net.ipv4.ip_unprivileged_port_start need a privilege: publish a port from 1024 up, or lower that limit on the host (sudo sysctl -w net.ipv4.ip_unprivileged_port_start=%d), or give rootlesskit the capability (sudo setcap cap_net_bind_service=ep on its binary)"
	adviseProto      = "use another protocol or host address, or another port driver (DOCKERD_ROOTLESS_ROOTLESSKIT_PORT_DRIVER)"
	adviseLimits     = "raise the limits of the rootless daemon (ulimit -n)"
	adviseAPI        = "see whether RootlessKit is running and its api.sock can be reached, and restart the rootless daemon"
)

// unsupportedText is what dockerd's client says of a protocol that the port
// driver does not serve (rlkclient.ProtocolUnsupportedError, an internal type).
const unsupportedText = "is not supported by the rootlesskit port driver"

// firstUnprivileged is the kernel's default for ip_unprivileged_port_start.
const firstUnprivileged = 1024

// errNoAnswer is returned for a request that was given up.
var errNoAnswer = errors.New("RootlessKit's port driver did not answer in time")

// hostRefusal is a port driver's error for one host address.
type hostRefusal struct {
	hostIP netip.Addr
	port   int
	proto  types.Protocol
	err    error
}

func (r *hostRefusal) Error() string {
	return fmt.Sprintf("host port %s/%s: %s", netip.AddrPortFrom(r.hostIP, uint16(r.port)), r.proto, strings.TrimSpace(r.err.Error()))
}

func (r *hostRefusal) Unwrap() error {
	return r.err
}

// childRefusal is the allocator's error, or one of binding in the child
// namespace.
type childRefusal struct{ err error }

func (r *childRefusal) Error() string { return "child namespace: " + r.err.Error() }

func (r *childRefusal) Unwrap() error { return r.err }

// errAllAllocated has the allocator's text for a range of which this daemon has
// every port.
var errAllAllocated = errors.New("all ports are allocated")

// driverVerdict judges an error of a PortDriverClient's AddPort.
func driverVerdict(err error) verdict {
	if isAPIFailure(err) {
		return no
	}
	v, _ := judge(err)
	return v
}

// childVerdict judges an error of the allocator, or of binding and listening in
// the child namespace. It says what is wrong: there is no maybe.
func childVerdict(err error) verdict {
	if v, _ := judge(err); v != maybe {
		return v
	}
	return no
}

// judge returns the verdict on err's cause, and what the user can do about it.
func judge(err error) (verdict, string) {
	v, advice := maybe, ""
	text := strings.ToLower(err.Error())
	for _, m := range marks {
		if m.verdict > v && (strings.Contains(text, m.text) || m.errno != 0 && errors.Is(err, m.errno)) {
			v, advice = m.verdict, m.advice
		}
	}
	return v, advice
}

// isAPIFailure tells whether err is about the way to RootlessKit and back, and
// not RootlessKit's answer. Whatever errno it has (EACCES for the API's socket,
// say) tells nothing about a port.
func isAPIFailure(err error) bool {
	return isDialError(err) || isLost(err) || errors.Is(err, errNoAnswer) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// isDialError tells whether RootlessKit was not reached.
func isDialError(err error) bool {
	var opErr *net.OpError
	return errors.As(err, &opErr) && opErr.Op == "dial"
}

// isLost tells whether a request may have reached RootlessKit, and its answer
// did not come back whole: what it did is not known.
func isLost(err error) bool {
	var (
		urlErr    *url.Error
		opErr     *net.OpError
		syntaxErr *json.SyntaxError
	)
	return !isDialError(err) && (errors.As(err, &urlErr) ||
		errors.As(err, &opErr) && opErr.Op != "listen" ||
		errors.As(err, &syntaxErr) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF))
}

// advice tells the user what to do about err, for a search that began at the
// host port first. It is empty, or starts with "; ".
func advice(err error, first int, proto types.Protocol) string {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return ""
	}
	if isAPIFailure(err) {
		return "; " + adviseAPI
	}
	v, text := judge(err)
	port := first
	if r := (*hostRefusal)(nil); errors.As(err, &r) {
		port = r.port
		if v == maybe && port < firstUnprivileged {
			text = advisePrivileged
		}
	}
	switch text {
	case "":
		return ""
	case adviseInUse:
		if r := (*childRefusal)(nil); errors.As(err, &r) {
			text = "publish another host port, or 0 for any free one"
			break
		}
		sockets := "ltnp"
		if proto == types.UDP {
			sockets = "lunp"
		}
		text = fmt.Sprintf(text, sockets, port)
	case advisePrivileged:
		if strings.Contains(err.Error(), "ip_unprivileged_port_start") {
			return "" // RootlessKit has told already.
		}
		text = fmt.Sprintf(text, port)
	}
	return "; " + text
}

// isExhausted tells whether the allocator has no more port to give in a range.
func isExhausted(err error) bool {
	return strings.Contains(err.Error(), errAllAllocated.Error())
}

// isAllocated tells whether the allocator has given the port to somebody else.
func isAllocated(err error) bool {
	return strings.Contains(err.Error(), "port is already allocated")
}

// isUnsupported tells whether the port driver does not serve the protocol.
func isUnsupported(err error) bool {
	return strings.Contains(strings.ToLower(err.Error()), unsupportedText)
}

// isUnknownPort tells whether RootlessKit's answer to a removal is that it has
// no such port. That is as good as having removed it.
func isUnknownPort(err error) bool {
	text := strings.ToLower(err.Error())
	for _, s := range []string{"unknown id", "unknown port id", "invalid id", "remove_hostfwd: bad arguments.id"} {
		if strings.Contains(text, s) {
			return true
		}
	}
	return false
}

// hostPort is ip and port as people write them.
func hostPort(ip net.IP, port int) string {
	return net.JoinHostPort(ip.String(), strconv.Itoa(port))
}
