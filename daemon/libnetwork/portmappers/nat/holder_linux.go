package nat

import (
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// holderLimit is how long it may take to find out who holds a port.
const holderLimit = 50 * time.Millisecond

// overflowUID is what the kernel makes of a user id that a user namespace does not have (user_namespaces(7)).
const overflowUID = 65534

// holder tells whose port on addr is, on the host: "" if that can't be seen, or takes too long. Which process
// it is, the daemon's user namespace hides.
func holder(proto types.Protocol, addr netip.Addr, port int) (who string) {
	found := make(chan *netlink.Socket, 1)
	go onHost(func() {
		s := socketAt(proto, addr, port)
		if s == nil && addr.Is4() && (&look{proto: proto}).refusal(addr, port) != nil {
			// No IPv4 socket has it: then one of [::] that takes IPv4, too.
			s = socketAt(proto, netip.IPv6Unspecified(), port)
		}
		found <- s
	})
	select {
	case s := <-found:
		switch {
		case s == nil:
			return ""
		case s.UID == overflowUID:
			return "another user's process"
		case s.UID == uint32(os.Getuid()):
			return "another process of this user"
		}
		return fmt.Sprintf("a container's process (of user %d in this daemon's user namespace)", s.UID)
	case <-time.After(holderLimit):
		return ""
	}
}

// socketAt returns a socket of addr's family that keeps another one from it.
func socketAt(proto types.Protocol, addr netip.Addr, port int) (found *netlink.Socket) {
	list, family := netlink.SocketDiagTCP, uint8(unix.AF_INET)
	if proto == types.UDP {
		list = netlink.SocketDiagUDP
	}
	if addr.Is6() {
		family = unix.AF_INET6
	}
	socks, _ := list(family)
	for _, s := range socks {
		at, _ := netip.AddrFromSlice(s.ID.Source)
		inTheWay := at == addr || at.IsUnspecified() || addr.IsUnspecified()
		// A listener says more than a connection that is in the way, too.
		if inTheWay && int(s.ID.SourcePort) == port && s.INode != 0 && (found == nil || s.State == netlink.TCP_LISTEN) {
			found = s
		}
	}
	return found
}
