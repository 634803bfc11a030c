package nat

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
)

// request is what one call of MapPorts asks for: one port, the same on each of
// its host addresses.
type request struct {
	proto       types.Protocol
	container   uint16       // container is the container's port.
	first, last int          // The host ports that will do; both are 0 if any will.
	hosts       []netip.Addr // The host addresses, in the order of the call.
	children    []netip.Addr // What stands in for each in the child namespace.
	binds       []net.IP     // The child addresses, each once.
}

// newRequest makes the request of cfg for a driver, nil if nobody is asked. It
// also returns the entries of cfg that the driver serves, in the same order.
func newRequest(cfg []portmapperapi.PortBindingReq, driver PortDriverClient) (*request, []portmapperapi.PortBindingReq, error) {
	c := cfg[0]
	for _, o := range cfg[1:] {
		if o.Proto != c.Proto || o.Port != c.Port || o.HostPort != c.HostPort || o.HostPortEnd != c.HostPortEnd {
			return nil, nil, types.InternalErrorf("port binding mismatch %d/%s:%d-%d, %d/%s:%d-%d",
				c.Port, c.Proto, c.HostPort, c.HostPortEnd, o.Port, o.Proto, o.HostPort, o.HostPortEnd)
		}
	}
	addrs := make([]netip.Addr, 2*len(cfg))
	r := &request{
		proto: c.Proto, container: c.Port, first: int(c.HostPort), last: int(c.HostPortEnd),
		hosts: addrs[:0:len(cfg)], children: addrs[len(cfg):len(cfg)], binds: make([]net.IP, 0, len(cfg)),
	}
	served := cfg
	for i, c := range cfg {
		host, _ := netip.AddrFromSlice(c.HostIP)
		host = host.Unmap()
		child := host
		if driver != nil {
			if !host.IsValid() {
				return nil, nil, fmt.Errorf("invalid host IP address in %s", c.PortBinding)
			}
			if child = driver.ChildHostIP(c.Proto.String(), host); !child.IsValid() {
				if len(served) == len(cfg) {
					served = slices.Clone(cfg[:i])
				}
				continue
			}
		}
		if len(served) < len(cfg) {
			served = append(served, c)
		}
		if !slices.Contains(r.children, child) {
			r.binds = append(r.binds, child.AsSlice())
		}
		r.hosts, r.children = append(r.hosts, host), append(r.children, child)
	}
	if len(r.hosts) == 0 {
		return nil, nil, notServed(cfg)
	}
	return r, served, nil
}

// dynamic tells whether any host port will do.
func (r *request) dynamic() bool { return r.first == 0 && r.last == 0 }

// fixed tells whether one host port was asked for.
func (r *request) fixed() bool { return r.first == r.last && r.first != 0 }

// ports returns the range to search. Without a view that is the allocator's
// own, which upstream tells for tests only: no other way leads to it.
func (r *request) ports() (first, last int) {
	if r.dynamic() {
		f, l := portallocator.GetPortRange()
		return int(f), int(l)
	}
	return r.first, r.last
}

// checkOverlap returns an error if two host addresses can't have the same port
// on any host: no search would find one.
func (r *request) checkOverlap() error {
	ports := fmt.Sprint(r.first)
	if r.first != r.last {
		ports = fmt.Sprintf("%d-%d", r.first, r.last)
	}
	for i, a := range r.hosts {
		for _, b := range r.hosts[i+1:] {
			switch {
			case a == b:
				return fmt.Errorf("cannot publish container port %d/%s twice on host port %s of %s: address already in use; publish it once",
					r.container, r.proto, ports, a)
			case a.Is4() == b.Is4() && (a.IsUnspecified() || b.IsUnspecified()):
				return fmt.Errorf("cannot publish container port %d/%s on host port %s of both %s and %s: address already in use; publish it on one of them",
					r.container, r.proto, ports, a, b)
			}
		}
	}
	return nil
}

// childPort is a port of the child namespace.
type childPort struct {
	proto types.Protocol
	at    netip.AddrPort
}

// childPort returns what the i-th host address has of a port.
func (r *request) childPort(i, port int) childPort {
	return childPort{r.proto, netip.AddrPortFrom(r.children[i], uint16(port))}
}

// on lists the host addresses, as people write them.
func (r *request) on() string {
	var b strings.Builder
	for i, h := range r.hosts {
		if i > 0 {
			b.WriteString(", ")
		}
		if h.Is6() {
			fmt.Fprintf(&b, "[%s]", h)
		} else {
			b.WriteString(h.String())
		}
	}
	return b.String()
}

// notServed is the error for cfg, when the port driver serves none of it.
func notServed(cfg []portmapperapi.PortBindingReq) error {
	c, r := cfg[0], request{}
	if c.Proto != types.TCP && c.Proto != types.UDP && c.Proto != types.SCTP {
		return fmt.Errorf("cannot publish container port %d: unknown protocol %s", c.Port, c.Proto)
	}
	var networks []string
	for _, c := range cfg {
		host, _ := netip.AddrFromSlice(c.HostIP)
		r.hosts = append(r.hosts, host.Unmap())
		if n := network(c.Proto, host.Unmap()); !slices.Contains(networks, n) {
			networks = append(networks, n)
		}
	}
	return fmt.Errorf("cannot publish container port %d/%s on host address %s: RootlessKit's port driver does not support %s; use another protocol or host address, or a port driver that supports it (DOCKERD_ROOTLESS_ROOTLESSKIT_PORT_DRIVER)",
		c.Port, c.Proto, r.on(), strings.Join(networks, " and "))
}

// network is a protocol and an address family as RootlessKit names them.
func network(proto types.Protocol, addr netip.Addr) string {
	if addr.Is6() {
		return proto.String() + "6"
	}
	return proto.String() + "4"
}
