package nat

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
)

// request is what one call of MapPorts asks for: one port, the same on each of its host addresses.
type request struct {
	proto       types.Protocol
	container   uint16 // container is the container's port.
	first, last int    // The host ports that will do; both are 0 if any will.
	addrs       []address
	binds       []net.IP // The child addresses, each once.

	fewAddrs [2]address // As a rule, these are enough: no objects of their own.
	fewBinds [2]net.IP
}

// address is a host address, what stands in for it in the child namespace, and the caller's words for it.
type address struct {
	host, child netip.Addr
	bind        net.IP // bind is the child address, as upstream has it.
	shares      bool   // An address before it has the same child address.
	cfg         *portmapperapi.PortBindingReq
}

// newRequest makes the request of cfg, without what the driver does not serve. A nil driver, which nobody
// asks, serves all.
func newRequest(cfg []portmapperapi.PortBindingReq, driver PortDriverClient) (*request, error) {
	f, proto := &cfg[0], cfg[0].Proto.String()
	r := &request{proto: f.Proto, container: f.Port, first: int(f.HostPort), last: int(f.HostPortEnd)}
	r.addrs, r.binds = r.fewAddrs[:0], r.fewBinds[:0]
	var unserved request
	var networks []string
	for i := range cfg {
		c := &cfg[i]
		if c.Proto != f.Proto || c.Port != f.Port || c.HostPort != f.HostPort || c.HostPortEnd != f.HostPortEnd {
			return nil, types.InternalErrorf("port binding mismatch %d/%s:%d-%d, %d/%s:%d-%d",
				f.Port, f.Proto, f.HostPort, f.HostPortEnd, c.Port, c.Proto, c.HostPort, c.HostPortEnd)
		}
		host, ok := netip.AddrFromSlice(c.HostIP)
		a := address{host: host.Unmap(), child: host.Unmap(), cfg: c}
		if driver != nil {
			if !ok {
				return nil, fmt.Errorf("invalid host IP address in %s", c.PortBinding)
			}
			if a.child = driver.ChildHostIP(proto, a.host); !a.child.IsValid() {
				unserved.addrs = append(unserved.addrs, a)
				networks = append(networks, network(f.Proto, a.host.Is6()))
				continue
			}
		}
		for _, b := range r.addrs {
			if a.child == b.child {
				a.shares, a.bind = true, b.bind
			}
		}
		if !a.shares {
			a.bind = a.child.AsSlice()
			r.binds = append(r.binds, a.bind)
		}
		r.addrs = append(r.addrs, a)
	}
	if len(r.addrs) > 0 {
		return r, nil
	}
	slices.Sort(networks)
	return nil, fmt.Errorf("cannot publish container port %d/%s on host address %s: RootlessKit's port driver does not support %s; use another protocol or host address, or a port driver that supports it (DOCKERD_ROOTLESS_ROOTLESSKIT_PORT_DRIVER)",
		f.Port, f.Proto, unserved.on(), strings.Join(slices.Compact(networks), " and "))
}

// dynamic tells whether any host port will do.
func (r *request) dynamic() bool { return r.first == 0 && r.last == 0 }

// fixed tells whether one host port was asked for.
func (r *request) fixed() bool { return r.first == r.last && r.first != 0 }

// checkOverlap returns an error if two host addresses can't have the same port on any host.
func (r *request) checkOverlap() error {
	for i, a := range r.addrs {
		for _, b := range r.addrs[:i] {
			if a.host == b.host || a.host.Is4() == b.host.Is4() && (a.host.IsUnspecified() || b.host.IsUnspecified()) {
				return fmt.Errorf("cannot publish container port %d/%s on one host port of both %s and %s: address already in use; publish it on one of them",
					r.container, r.proto, b.host, a.host)
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
	return childPort{r.proto, netip.AddrPortFrom(r.addrs[i].child, uint16(port))}
}

// on lists the host addresses, as people write them.
func (r *request) on() string {
	var on []string
	for _, a := range r.addrs {
		text := a.host.String()
		if a.host.Is6() {
			text = "[" + text + "]"
		}
		on = append(on, text)
	}
	return strings.Join(on, ", ")
}

// network is a protocol and an address family as RootlessKit names them.
func network(proto types.Protocol, ipv6 bool) string {
	if ipv6 {
		return proto.String() + "6"
	}
	return proto.String() + "4"
}
