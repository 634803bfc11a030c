package nat

import (
	"context"
	"errors"
	"fmt"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
)

// failure is how a search ended without a port.
type failure struct {
	// how is what ended it, if it was not the last refusal by itself.
	how string
	// last is the last refusal that is not this daemon's own, or the last one.
	last error
	// tried is the number of ports that were asked for, or seen to be taken.
	tried int
}

func (f *failure) Error() string { return fmt.Sprintf("%s: %v", f.how, f.last) }

func (f *failure) Unwrap() error { return f.last }

// facts are what else is known where a search failed.
type facts struct {
	first, last int    // The ports that it went through.
	limit       int    // The host's ip_unprivileged_port_start, or 0.
	holder      string // Who has the fixed port, or "".
}

// explain says what could not be published, why, and what can be done about it.
func explain(f *failure, r *request, known facts) error {
	ports := fmt.Sprintf("host port %d", known.first)
	switch {
	case r.dynamic():
		ports = fmt.Sprintf("a dynamic host port (%d-%d)", known.first, known.last)
	case !r.fixed():
		ports = fmt.Sprintf("a host port in %d-%d", known.first, known.last)
	}
	how, who := f.how, ""
	if how != "" {
		how = fmt.Sprintf("%d tried, %s: ", f.tried, how)
	}
	if known.holder != "" {
		who = fmt.Sprintf("; %s has it", known.holder)
	}
	return fmt.Errorf("cannot publish container port %d/%s on %s of %s: %s%w%s%s",
		r.container, r.proto, ports, r.on(), how, f.last, who, advice(f.last, r, known))
}

// advice is what can be done about err: "", or with a "; " before it.
func advice(err error, r *request, known facts) string {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return ""
	}
	port := known.first
	host, child := (*hostRefusal)(nil), (*childRefusal)(nil)
	if errors.As(err, &host) {
		port = host.port
	}
	limit, c := limitOf(err, known.limit), causeOf(err, known.limit)
	if c == unclear && host != nil && port < limit {
		c = privileged // slirp4netns doesn't say.
	}
	switch c {
	case inUse:
		if errors.As(err, &child) {
			return "; publish another host port, or 0 for any free one"
		}
		sockets := "ltnp"
		if r.proto == types.UDP {
			sockets = "lunp"
		}
		return fmt.Sprintf("; stop what holds it (sudo ss -%s 'sport = :%d' on the host tells), or publish another host port, or 0 for any free one", sockets, port)
	case ours:
		if host == nil {
			return "; stop the container that has it, or publish another host port, or 0 for any free one"
		}
		return "; stop the container that has it (if none has, RootlessKit was left with it, and the daemon's log says so: restart the rootless daemon), or publish another host port, or 0 for any free one"
	case privileged:
		return fmt.Sprintf("; ports below net.ipv4.ip_unprivileged_port_start need a privilege: publish a port from %d up, or lower that limit on the host (sudo sysctl -w net.ipv4.ip_unprivileged_port_start=%d), or give rootlesskit the capability (sudo setcap cap_net_bind_service=ep on its binary)", limit, port)
	case reserved:
		return "; publish a port that the host does not reserve"
	case notHere:
		return "; publish on an address that the host has (ip address)"
	case unserved:
		return "; use another protocol or host address, or another port driver (DOCKERD_ROOTLESS_ROOTLESSKIT_PORT_DRIVER)"
	case noRoom:
		return "; raise the limits of the daemon (ulimit -n)"
	case unreached:
		return "; see whether RootlessKit is running and its api.sock can be reached, and restart the rootless daemon"
	}
	return ""
}
