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

// overflowUID is what the kernel makes of a user id that a user namespace does
// not have (user_namespaces(7)).
const overflowUID = 65534

// holder tells whose port on addr is, on the host: "" if that can't be seen, or
// takes too long. Which process it is, the daemon's user namespace hides.
func holder(proto types.Protocol, addr netip.Addr, port int) string {
	who := make(chan string, 1)
	go onHost(func() { who <- findHolder(proto, addr, port) })
	select {
	case w := <-who:
		return w
	case <-time.After(holderLimit):
		return ""
	}
}

// findHolder is holder, on the host.
func findHolder(proto types.Protocol, addr netip.Addr, port int) string {
	found := socketAt(proto, addr, port)
	if found == nil && addr.Is4() && (&look{proto: proto}).refusal(addr, port) != nil {
		// No IPv4 socket has it: then one of [::] that takes IPv4, too.
		found = socketAt(proto, netip.IPv6Unspecified(), port)
	}
	switch {
	case found == nil:
		return ""
	case found.UID == overflowUID:
		return "another user's process"
	case found.UID == uint32(os.Getuid()):
		return "another process of this user"
	}
	return fmt.Sprintf("a container's process (of user %d in this daemon's user namespace)", found.UID)
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
		if int(s.ID.SourcePort) != port || s.INode == 0 || at != addr && !at.IsUnspecified() && !addr.IsUnspecified() {
			continue
		}
		// A listener says more than a connection that is in the way, too.
		if found == nil || s.State == netlink.TCP_LISTEN {
			found = s
		}
	}
	return found
}
