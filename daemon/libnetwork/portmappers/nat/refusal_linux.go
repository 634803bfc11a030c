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
	"strings"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"golang.org/x/sys/unix"
)

// verdict is the answer to "would another port help?".
type verdict int

const (
	maybe   verdict = iota // The driver doesn't say why, or nobody has seen this answer yet.
	another                // This port can't be had.
	no                     // The request itself can't be served.
)

func (v verdict) String() string {
	return [...]string{"maybe another port", "another port", "no port"}[v]
}

// cause is what a refusal is about. Where the signs of more than one meet in an
// error, the last of them in this list holds.
type cause int

const (
	unclear    cause = iota
	privileged       // The port takes a privilege.
	inUse            // The port is another process's.
	reserved         // The host's system keeps it for itself.
	ours             // This daemon has the port already.
	invalid          // No driver takes the request.
	notHere          // The address is not the host's.
	unserved         // The driver doesn't serve the protocol or address family.
	noRoom           // Descriptors or memory have run out.
	unreached        // The driver was not reached, or its answer not received.
)

func (c cause) verdict() verdict {
	switch {
	case c == unclear:
		return maybe
	case c < invalid:
		return another
	}
	return no
}

// signs has what errors are known by. The errno of a port driver's refusal gets
// lost in RootlessKit's API (an answer has only a message), so there is a text
// for each, in lower case.
var signs = []struct {
	cause cause
	errno unix.Errno // 0 when there is none.
	text  string
}{
	{inUse, unix.EADDRINUSE, "address already in use"},
	{inUse, 0, "port is busy"},
	{privileged, unix.EACCES, "permission denied"},
	{reserved, 0, "forbidden by its access permissions"}, // Windows, where RootlessKit runs in WSL.
	// RootlessKit (all port drivers), gvisor-tap-vsock, and the allocator.
	{ours, 0, "conflict with id"},
	{ours, 0, "proxy already running"},
	{ours, 0, textAllocated},
	{ours, 0, textAllAllocated},
	{notHere, unix.EADDRNOTAVAIL, "cannot assign requested address"},
	{invalid, unix.EINVAL, "invalid argument"},
	{unserved, unix.EAFNOSUPPORT, "address family not supported by protocol"},
	{unserved, unix.EPROTONOSUPPORT, "protocol not supported"},
	{noRoom, unix.EMFILE, "too many open files"},
	{noRoom, unix.ENFILE, "too many open files in system"},
	{noRoom, unix.ENOBUFS, "no buffer space available"},
	{noRoom, unix.ENOMEM, "cannot allocate memory"},
	// RootlessKit's validation of a request.
	{unserved, 0, "unknown proto"},
	{invalid, 0, "invalid parentip"},
	{invalid, 0, "invalid childip"},
	{invalid, 0, "invalid parentport"},
	{invalid, 0, "invalid childport"},
	{unserved, 0, "no portdriver is available"},
	// The port drivers builtin, gvisor-tap-vsock (and its way to say that it
	// takes no IPv6 address), slirp4netns, and dockerd's client for them.
	{unserved, 0, "unsupported port protocol"},
	{unserved, 0, "unsupported protocol"},
	{unserved, 0, "too many colons in address"},
	{unserved, 0, "unsupported ip"},
	{invalid, 0, "invalid ip"},
	{unserved, 0, "bad arguments"},
	{unserved, 0, textUnsupported},
	// pesto, and what other than a port a port driver may lack.
	{unserved, 0, "requires --ipv6"},
	{unserved, 0, "unsupported childip"},
	{unreached, 0, "executable file not found"},
	{unreached, 0, "fork/exec"},
	{unreached, 0, "dial unix"},
}

const (
	textAllocated    = "port is already allocated"
	textAllAllocated = "all ports are allocated"
	// textUnsupported is what dockerd's client says of a protocol that the port
	// driver does not serve (rlkclient.ProtocolUnsupportedError, an internal type).
	textUnsupported = "is not supported by the rootlesskit port driver"
	textCurrently   = "(currently "
)

// firstUnprivileged is the kernel's default for ip_unprivileged_port_start.
const firstUnprivileged = 1024

// errNoAnswer is the error of a request that was given up.
var errNoAnswer = errors.New("RootlessKit's port driver did not answer in time")

// hostRefusal is a port driver's error for one host address.
type hostRefusal struct {
	host  netip.Addr
	port  int
	proto types.Protocol
	err   error
}

func (r *hostRefusal) Error() string {
	return fmt.Sprintf("host port %s/%s: %s", netip.AddrPortFrom(r.host, uint16(r.port)), r.proto, strings.TrimSpace(r.err.Error()))
}

func (r *hostRefusal) Unwrap() error { return r.err }

// childRefusal is the allocator's error, or one of binding in the child
// namespace, for the ports from first on, or any if that is 0.
type childRefusal struct {
	first int
	err   error
}

func (r *childRefusal) Error() string { return "child namespace: " + r.err.Error() }

func (r *childRefusal) Unwrap() error { return r.err }

// causeOf tells what err is about. limit is the host's first port that takes no
// privilege, or 0 if it can't be seen.
func causeOf(err error, limit int) cause {
	c, text := unclear, strings.ToLower(err.Error())
	for _, s := range signs {
		if s.cause > c && (strings.Contains(text, s.text) || s.errno != 0 && errors.Is(err, s.errno)) {
			c = s.cause
		}
	}
	var child *childRefusal
	if errors.As(err, &child) {
		// It says what is wrong. Dynamic ports take no privilege: a policy denies them.
		if c == unclear || c == privileged && child.first == 0 {
			return invalid
		}
		return c
	}
	if isUnreached(err) || isLost(err) {
		return unreached
	}
	var host *hostRefusal
	if c == privileged && errors.As(err, &host) && host.port >= limitOf(err, limit) {
		return unclear // A policy denies it: there is nothing to raise.
	}
	return c
}

// limitOf returns the first port that takes no privilege: as seen on the host,
// or as RootlessKit says, or the kernel's default.
func limitOf(err error, seen int) int {
	if seen != 0 {
		return seen
	}
	said := firstUnprivileged
	if _, after, ok := strings.Cut(err.Error(), textCurrently); ok {
		fmt.Sscan(after, &said) // What is no number leaves it.
	}
	return said
}

// isUnreached tells whether err is about the way to RootlessKit, and not its
// answer. Whatever errno it has (EACCES for the API's socket) tells nothing
// about a port.
func isUnreached(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial" || errors.Is(err, errNoAnswer) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// isLost tells whether a request may have reached RootlessKit, and its answer
// did not come back whole: what it did is not known.
func isLost(err error) bool {
	var (
		urlErr    *url.Error
		op        *net.OpError
		syntaxErr *json.SyntaxError
	)
	isOp := errors.As(err, &op)
	return !(isOp && op.Op == "dial") && (errors.As(err, &urlErr) || isOp && op.Op != "listen" ||
		errors.As(err, &syntaxErr) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF))
}

// isUnsupported tells whether the port driver does not serve the protocol.
func isUnsupported(err error) bool {
	return strings.Contains(strings.ToLower(err.Error()), textUnsupported)
}

// isUnknownPort tells whether RootlessKit's answer to a removal is that it has
// no such port. That is as good as having removed it.
func isUnknownPort(err error) bool {
	text := strings.ToLower(err.Error())
	return strings.Contains(text, "unknown id") || strings.Contains(text, "unknown port id") ||
		strings.Contains(text, "invalid id") || strings.Contains(text, "bad arguments.id")
}
