package nat

import (
	"encoding/binary"
	"hash/fnv"
	"net/netip"
	"sync"

	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
)

// localhost is the child address that RootlessKit's client gives every IPv4
// host address that isn't loopback, for a port driver (builtin) that connects to
// whichever child address it is told.
var localhost = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// childIPs gives such host addresses a child address each, so that two
// containers can have the same port on two host addresses.
var childIPs = childIPTable{children: map[netip.Addr]netip.Addr{}, hosts: map[netip.Addr]netip.Addr{}}

type childIPTable struct {
	mu       sync.Mutex
	children map[netip.Addr]netip.Addr // by host address
	hosts    map[netip.Addr]netip.Addr // by child address
}

// of returns the child address for host, for which the port driver's client
// gave child. The child namespace's loopback interface has all of 127.0.0.0/8.
func (t *childIPTable) of(host, child netip.Addr) netip.Addr {
	if child != localhost || !host.Is4() || host.IsUnspecified() || host.IsLoopback() {
		return child
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if own, ok := t.children[host]; ok {
		return own
	}
	// The same one after a restart of the daemon, unless two host addresses
	// meet. 127.128.0.0/9 is far from what users publish on.
	h := fnv.New32a()
	h.Write(host.AsSlice())
	for n := h.Sum32(); ; n++ {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], 127<<24|1<<23|n&(1<<23-1))
		own := netip.AddrFrom4(b)
		if _, taken := t.hosts[own]; !taken && b[3] != 0 && b[3] != 255 {
			t.children[host], t.hosts[own] = own, host
			return own
		}
	}
}

// sharedPorts has the child ports that more than one binding shares: what one
// of them still forwards to is no other container's.
var sharedPorts = portSharing{others: map[childPort]int{}}

type portSharing struct {
	mu     sync.Mutex
	others map[childPort]int // others counts the bindings but one.
}

type childPort struct {
	proto types.Protocol
	at    netip.AddrPort
}

func childPortOf(pb portmapperapi.PortBinding) childPort {
	return childPort{pb.Proto, netip.AddrPortFrom(addrOf(pb.ChildHostIP), pb.HostPort)}
}

// join takes note of a binding that shares another one's child port.
func (s *portSharing) join(pb portmapperapi.PortBinding) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.others[childPortOf(pb)]++
}

// leave tells whether other bindings still share pb's child port.
func (s *portSharing) leave(pb portmapperapi.PortBinding) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := childPortOf(pb)
	if s.others[p] == 0 {
		return false
	}
	if s.others[p]--; s.others[p] == 0 {
		delete(s.others, p)
	}
	return true
}
