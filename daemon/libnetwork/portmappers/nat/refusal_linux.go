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
	"slices"
	"strings"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"golang.org/x/sys/unix"
)

// verdict is the answer to "would another port help?".
type verdict string

const (
	maybe   verdict = "maybe another port" // The driver doesn't say why, or nobody has seen this answer yet.
	another verdict = "another port"       // This port can't be had.
	no      verdict = "no port"            // The request itself can't be served.
)

// cause is what a refusal is about. Where the signs of more than one meet in an error, the last of them in
// this list holds.
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

// signs has what a cause is known by. The errno of a port driver's refusal gets lost in RootlessKit's API (an
// answer has only a message), so that its text counts, too, as do others, in lower case.
var signs = [...]struct {
	errnos []unix.Errno
	texts  []string
}{
	privileged: {errnos: []unix.Errno{unix.EACCES}},
	inUse:      {[]unix.Errno{unix.EADDRINUSE}, []string{"port is busy"}},
	reserved:   {nil, []string{"forbidden by its access permissions"}}, // Windows, where RootlessKit runs in WSL.
	// RootlessKit (all port drivers), gvisor-tap-vsock, pesto, and the allocator.
	ours: {nil, []string{"conflict with id", "proxy already running", "forwarding configuration conflict", textAllocated, textAllAllocated}},
	// RootlessKit's validation, and of the kernel's a link-local address without its zone.
	invalid: {[]unix.Errno{unix.EINVAL}, []string{"invalid parentip", "invalid childip", "invalid parentport", "invalid childport", "invalid ip"}},
	notHere: {errnos: []unix.Errno{unix.EADDRNOTAVAIL}},
	// Also dockerd's client, gvisor-tap-vsock's way to say that it takes no IPv6 address, and pesto's that 255
	// ports are all it serves.
	unserved: {[]unix.Errno{unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT}, []string{
		"unknown proto", "no portdriver is available", "unsupported port protocol", "unsupported protocol",
		"too many colons in address", "unsupported ip", "bad arguments", "requires --ipv6", "unsupported childip", "too many rules", textUnsupported,
	}},
	noRoom:    {errnos: []unix.Errno{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM}},
	unreached: {nil, []string{"executable file not found", "fork/exec", "dial unix"}},
}

const (
	textAllocated    = "port is already allocated"
	textAllAllocated = "all ports are allocated"
	// textUnsupported is what dockerd's client says of a protocol that the port driver does not serve
	// (rlkclient.ProtocolUnsupportedError, an internal type).
	textUnsupported = "is not supported by the rootlesskit port driver"
)

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

// childRefusal is the allocator's error, or one of binding in the child namespace, for the ports from first
// on, or any if that is 0.
type childRefusal struct {
	first int
	err   error
}

func (r *childRefusal) Error() string { return "child namespace: " + r.err.Error() }

func (r *childRefusal) Unwrap() error { return r.err }

// causeOf tells what err is about. limit is the host's first port that takes no privilege, or 0 if it can't
// be seen.
func causeOf(err error, limit int) cause {
	c, text := unclear, strings.ToLower(err.Error())
	says := func(t string) bool { return strings.Contains(text, t) }
	for i, s := range signs {
		if slices.ContainsFunc(s.texts, says) ||
			slices.ContainsFunc(s.errnos, func(n unix.Errno) bool { return says(n.Error()) || errors.Is(err, n) }) {
			c = cause(i)
		}
	}
	child, host, op := (*childRefusal)(nil), (*hostRefusal)(nil), (*net.OpError)(nil)
	switch {
	case errors.As(err, &child):
		// It says what is wrong. Dynamic ports take no privilege: a policy denies them.
		if c == unclear || c == privileged && (child.first == 0 || child.first >= limitOf(err, limit)) {
			return invalid
		}
	case errors.As(err, &op) && op.Op == "dial", isLost(err), errors.Is(err, errNoAnswer),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		// Whatever errno it has (EACCES for the API's socket) tells nothing about a port.
		return unreached
	case c == privileged && errors.As(err, &host) && host.port >= limitOf(err, limit):
		return unclear // A policy denies it: there is nothing to raise.
	}
	return c
}

// limitOf returns the first port that takes no privilege: as seen on the host, or as RootlessKit says, or the
// kernel's default.
func limitOf(err error, seen int) int {
	if seen != 0 {
		return seen
	}
	said := 1024
	if _, after, ok := strings.Cut(err.Error(), "(currently "); ok {
		_, _ = fmt.Sscan(after, &said)
	}
	return said
}

// isLost tells whether a request may have reached RootlessKit, and its answer did not come back whole: what
// it did is not known.
func isLost(err error) bool {
	urlErr, op, syntax := (*url.Error)(nil), (*net.OpError)(nil), (*json.SyntaxError)(nil)
	if errors.As(err, &op) {
		return op.Op != "dial" && op.Op != "listen"
	}
	return errors.As(err, &urlErr) || errors.As(err, &syntax) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// isUnknownPort tells whether RootlessKit's answer to a removal is that it has no such port. That is as good
// as having removed it.
func isUnknownPort(err error) bool {
	text := strings.ToLower(err.Error())
	return strings.Contains(text, "unknown id") || strings.Contains(text, "unknown port id") ||
		strings.Contains(text, "invalid id") || strings.Contains(text, "bad arguments.id")
}
