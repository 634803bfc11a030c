package nat

import (
	"net/netip"
	"sync"
)

// childIPs is a driver round another. It gives each IPv4 host address a child address of its own, so that two
// containers can have one port on two host addresses: where RootlessKit's client gives all of them 127.0.0.1,
// since the port driver (builtin) connects to whichever child address it is told. The child's loopback
// interface has all of 127.0.0.0/8; 127.128.0.0/9 is far from what users publish on.
type childIPs struct {
	PortDriverClient

	mu     sync.Mutex
	byHost map[netip.Addr]netip.Addr
}

func (c *childIPs) ChildHostIP(proto string, host netip.Addr) netip.Addr {
	child := c.PortDriverClient.ChildHostIP(proto, host)
	if child != netip.AddrFrom4([4]byte{127, 0, 0, 1}) || host.IsUnspecified() || host.IsLoopback() {
		return child
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	own, ok := c.byHost[host]
	if !ok {
		n := len(c.byHost) + 1
		own = netip.AddrFrom4([4]byte{127, 128 + byte(n>>16), byte(n >> 8), byte(n)})
		c.byHost[host] = own
	}
	return own
}
