package nat

import (
	"context"
	"errors"
	"fmt"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
)

// failure is how a search ended without a port.
type failure struct {
	how   string // how is what ended it, if it was not the last refusal by itself.
	last  error  // last is the last refusal that is not this daemon's own, or the last one.
	tried int    // tried is the number of ports that were asked for, or seen to be taken.
	facts
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
func explain(f *failure, r *request) error {
	ports := fmt.Sprintf("host port %d", f.facts.first)
	switch {
	case r.dynamic():
		ports = fmt.Sprintf("a dynamic host port (%d-%d)", f.facts.first, f.facts.last)
	case !r.fixed():
		ports = fmt.Sprintf("a host port in %d-%d", f.facts.first, f.facts.last)
	}
	how, who := f.how, f.holder
	if how != "" {
		how = fmt.Sprintf("%d tried, %s: ", f.tried, how)
	}
	if who != "" {
		who = fmt.Sprintf("; %s has it", who)
	}
	return fmt.Errorf("cannot publish container port %d/%s on %s of %s: %s%w%s%s",
		r.container, r.proto, ports, r.on(), how, f.last, who, advice(f.last, r, f.facts))
}

// remedies are what can be done about a cause, where that does not depend on more.
var remedies = [...]string{
	reserved:  "; publish a port that the host does not reserve",
	notHere:   "; publish on an address that the host has (ip address)",
	unserved:  "; use another protocol or host address, or another port driver (DOCKERD_ROOTLESS_ROOTLESSKIT_PORT_DRIVER)",
	noRoom:    "; raise the limits of the daemon (ulimit -n)",
	unreached: "; see whether RootlessKit is running and its api.sock can be reached, and restart the rootless daemon",
}

// advice is what can be done about err: "", or with a "; " before it.
func advice(err error, r *request, known facts) string {
	const publishAnother = "publish another host port, or 0 for any free one"
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return ""
	}
	port, host, child := known.first, (*hostRefusal)(nil), (*childRefusal)(nil)
	if errors.As(err, &host) {
		port = host.port
	}
	limit, c := limitOf(err, known.limit), causeOf(err, known.limit)
	switch {
	case c == inUse && errors.As(err, &child):
		return "; " + publishAnother
	case c == inUse:
		protocol := "t"
		if r.proto == types.UDP {
			protocol = "u"
		}
		return fmt.Sprintf("; stop what holds it (sudo ss -l%snp 'sport = :%d' on the host tells), or %s", protocol, port, publishAnother)
	case c == ours && host == nil:
		return "; stop the container that has it, or " + publishAnother
	case c == ours:
		return "; stop the container that has it (if none has, RootlessKit was left with it, and the daemon's log says so: restart the rootless daemon), or " + publishAnother
	case c == privileged || c == unclear && host != nil && port < limit: // slirp4netns doesn't say.
		return fmt.Sprintf("; ports below net.ipv4.ip_unprivileged_port_start need a privilege: publish a port from %d up, or lower that limit on the host (sudo sysctl -w net.ipv4.ip_unprivileged_port_start=%d), or give rootlesskit the capability (sudo setcap cap_net_bind_service=ep on its binary)", limit, port)
	}
	return remedies[c]
}
