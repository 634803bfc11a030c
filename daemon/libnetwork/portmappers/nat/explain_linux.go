package nat

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// failure is how a search ended without a port, and what else is known then.
type failure struct {
	req         *request
	how         string // how is what ended it, if it was not the last refusal by itself.
	last        error  // last is the last refusal that is not this daemon's own, or the last one.
	tried       int    // tried is the number of ports that were asked for, or seen to be taken.
	first, end  int    // The ports that it went through.
	limit       int    // The host's ip_unprivileged_port_start, or 0.
	holder      string // Who has the fixed port, or "".
	rootlessKit string // RootlessKit's program.
}

func (f *failure) Unwrap() error { return f.last }

// Error says what could not be published, why, and what can be done about it, in one line.
func (f *failure) Error() string {
	r, ports := f.req, fmt.Sprintf("host port %d", f.first)
	switch {
	case r.dynamic():
		ports = fmt.Sprintf("a dynamic host port (%d-%d)", f.first, f.end)
	case !r.fixed():
		ports = fmt.Sprintf("a host port in %d-%d", f.first, f.end)
	}
	how, who := f.how, f.holder
	if how != "" {
		how = fmt.Sprintf("%d tried, %s: ", f.tried, how)
	}
	if who != "" {
		who = fmt.Sprintf("; %s has it", who)
	}
	cause, host := f.last.Error(), (*hostRefusal)(nil)
	if r.fixed() && errors.As(f.last, &host) && strings.Contains(host.err.Error(), netip.AddrPortFrom(host.host, uint16(host.port)).String()) {
		cause = host.err.Error() // Most drivers say themselves which port it is.
	}
	// Of slirp4netns' answer, RootlessKit prints a map as Go does.
	if before, desc, ok := strings.Cut(cause, "reply.Error: map[desc:"); ok {
		cause = before + strings.Replace(desc, "]", "", 1)
	}
	text := fmt.Sprintf("cannot publish container port %d/%s on %s of %s: %s%s%s%s",
		r.container, r.proto, ports, r.on(), how, cause, who, f.advice())
	return strings.Join(strings.Fields(text), " ")
}

// remedies are what can be done about a cause, where that does not depend on more.
var remedies = [...]string{
	reserved:  "; publish a port that the host does not reserve",
	notHere:   "; publish on an address that the host has (ip address)",
	unserved:  "; use another protocol or host address, or another port driver (DOCKERD_ROOTLESS_ROOTLESSKIT_PORT_DRIVER)",
	noRoom:    "; raise the limits of the daemon (ulimit -n)",
	unreached: "; see whether RootlessKit is running, and restart the rootless daemon",
}

// advice is what can be done about it: "", or with a "; " before it.
func (f *failure) advice() string {
	const publishAnother, orAnother = "publish another host port, or 0 for any free one", ", or publish another (0: any)"
	r, err, port, host, child := f.req, f.last, f.first, (*hostRefusal)(nil), (*childRefusal)(nil)
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return ""
	}
	if errors.As(err, &host) {
		port = host.port
	}
	who := fmt.Sprintf("(sudo ss -l%.1snp 'sport = :%d')", r.proto, port)
	limit, c, text := limitOf(err, f.limit), causeOf(err, f.limit), err.Error()
	switch {
	case strings.Contains(text, "ip_local_reserved_ports"):
		return "; have the host reserve fewer, or publish a port by its number"
	case c == inUse && r.dynamic() && f.limit != 0: // The range is the host's.
		return fmt.Sprintf("; widen the range (sudo sysctl -w net.ipv4.ip_local_port_range='%d 65535')", max(limit, f.first/2))
	case c == inUse && r.dynamic():
		return "; publish other ports"
	case c == inUse && errors.As(err, &child):
		return "; " + publishAnother
	case c == inUse:
		return "; stop what holds it " + who + orAnother
	case c == ours && host == nil:
		return "; stop the container that has it, or " + publishAnother
	case c == ours:
		return "; stop the container that has it (if none: restart the rootless daemon, whose RootlessKit has it)" + orAnother
	case c == privileged && strings.Contains(text, "ip_unprivileged_port_start="): // RootlessKit says so.
		return fmt.Sprintf("; publish a port from %d up, or sudo setcap cap_net_bind_service=ep %s and restart the daemon", limit, f.rootlessKit)
	case c == privileged || c == unclear && host != nil && port < limit: // slirp4netns doesn't say.
		return fmt.Sprintf("; publish a port from %d up, or sudo sysctl -w net.ipv4.ip_unprivileged_port_start=%d", limit, port)
	case (c == unclear || c == invalid) && (strings.Contains(text, unix.EACCES.Error()) || strings.Contains(text, unix.EPERM.Error())):
		return "; it takes no privilege: a policy denies it (SELinux, AppArmor: sudo journalctl -k)"
	case c == unclear && r.fixed() && host != nil:
		return "; see who has it " + who + orAnother
	case c == unclear && host != nil:
		return "; publish others, or use the port driver builtin"
	}
	return remedies[c]
}
