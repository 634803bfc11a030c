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

const (
	// holderLimit is how long it may take to find out who holds a port.
	holderLimit = 50 * time.Millisecond
	// overflowUID is what the kernel makes of a user id that a user namespace does not have (user_namespaces(7)).
	overflowUID = 65534
)

// holder tells whose port on addr is, on the host: "" if that can't be seen, or takes too long. Which process
// it is, the daemon's user namespace hides.
func holder(proto types.Protocol, addr netip.Addr, port int) string {
	found := make(chan string, 1)
	go onHost(func() {
		s := socketAt(proto, addr, port)
		if s == nil && addr.Is4() && (&look{proto: proto}).refusal(addr, port) != nil {
			// No IPv4 socket has it: then one of [::] that takes IPv4, too.
			s = socketAt(proto, netip.IPv6Unspecified(), port)
		}
		switch {
		case s == nil:
			found <- ""
		case s.UID == overflowUID:
			found <- "another user's process"
		case s.UID == uint32(os.Getuid()):
			found <- "another process of this user"
		default:
			found <- fmt.Sprintf("a container's process (of user %d in this daemon's user namespace)", s.UID)
		}
	})
	select {
	case who := <-found:
		return who
	case <-time.After(holderLimit):
		return ""
	}
}

// socketAt returns a socket of addr's family that keeps another one from it. The kernel lists those that listen
// first.
func socketAt(proto types.Protocol, addr netip.Addr, port int) *netlink.Socket {
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
		at = at.Unmap()
		inTheWay := at == addr || at.IsUnspecified() || addr.IsUnspecified()
		if inTheWay && int(s.ID.SourcePort) == port && s.INode != 0 { // Else nobody has it any more.
			return s
		}
	}
	return nil
}
