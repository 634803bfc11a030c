package nat

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
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

// holder tells who holds port on addr, on the host: "" if that can't be seen,
// or takes too long. It may take time that a search has not got, so it is for
// the error of one that ends.
func (v *hostView) holder(addr netip.Addr, port int) string {
	who := make(chan string, 1)
	end := time.Now().Add(holderLimit)
	go onHost(func() { who <- findHolder(v.proto, addr, port, end) })
	select {
	case w := <-who:
		return w
	case <-time.After(holderLimit):
		return ""
	}
}

// findHolder is holder, on the host.
func findHolder(proto types.Protocol, addr netip.Addr, port int, end time.Time) string {
	list := netlink.SocketDiagTCP
	if proto == types.UDP {
		list = netlink.SocketDiagUDP
	}
	var found *netlink.Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		socks, err := list(family)
		if err != nil {
			continue
		}
		for _, s := range socks {
			if int(s.ID.SourcePort) != port || s.INode == 0 || !inTheWay(addrOf(s.ID.Source), addr) {
				continue
			}
			// One that listens is in the way more than a connection.
			if found == nil || s.State == netlink.TCP_LISTEN && found.State != netlink.TCP_LISTEN {
				found = s
			}
		}
	}
	if found == nil {
		return ""
	}
	return ownerOf(found.UID, found.INode, end)
}

// ownerOf tells whose a socket is, from the user id that this process's user
// namespace has for its owner.
func ownerOf(uid, inode uint32, end time.Time) string {
	switch uid {
	case overflowUID:
		return "another user's process"
	case uint32(os.Getuid()):
		return processWithSocket(inode, end)
	}
	return fmt.Sprintf("a container's process (of user %d in this daemon's user namespace)", uid)
}

// inTheWay tells whether a socket that is bound to at keeps another one from
// addr. An IPv6 socket may be bound to the IPv4 wildcard address as well.
func inTheWay(at, addr netip.Addr) bool {
	switch {
	case at == addr, at == netip.IPv6Unspecified():
		return true
	case at.Is4() != addr.Is4():
		return false
	}
	return at.IsUnspecified() || addr.IsUnspecified()
}

// processWithSocket names the process that has the socket open, as far as
// /proc shows it.
func processWithSocket(inode uint32, end time.Time) string {
	socket := fmt.Sprintf("socket:[%d]", inode)
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		if time.Now().After(end) {
			break
		}
		fds, err := os.ReadDir(dir + "/fd")
		if err != nil {
			continue // Another user's.
		}
		for _, fd := range fds {
			if to, err := os.Readlink(dir + "/fd/" + fd.Name()); err == nil && to == socket {
				comm, _ := os.ReadFile(dir + "/comm")
				return fmt.Sprintf("process %q (pid %s)", strings.TrimSpace(string(comm)), filepath.Base(dir))
			}
		}
	}
	return "another process of this user"
}
