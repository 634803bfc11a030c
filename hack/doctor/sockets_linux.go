package doctor

import (
	"fmt"
	"net/netip"
	"os/user"
	"strconv"

	"github.com/prometheus/procfs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// socket is one of the host's that has a port.
type socket struct {
	proto     string
	addr      netip.Addr
	port      int
	listening bool
	uid       uint32
	inode     uint32
}

func listSockets() (list []socket) {
	for _, l := range []struct {
		proto string
		dump  func(uint8) ([]*netlink.Socket, error)
	}{{"tcp", netlink.SocketDiagTCP}, {"udp", netlink.SocketDiagUDP}} {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			socks, _ := l.dump(family) // it says who, never whether: a bind does
			for _, s := range socks {
				addr, _ := netip.AddrFromSlice(s.ID.Source)
				list = append(list, socket{l.proto, addr.Unmap(), int(s.ID.SourcePort), s.State == netlink.TCP_LISTEN, s.UID, s.INode})
			}
		}
	}
	return list
}

// holder is who has the port: a container of this daemon, or a user, and the process where it can be seen.
func (h *Host) holder(proto string, addr netip.Addr, port int) string {
	if h.daemon != nil {
		if name := h.daemon.ports[fmt.Sprintf("%d/%s", port, proto)]; name != "" {
			return "container " + name + " of this daemon"
		}
	}
	var found *socket
	for _, s := range h.sockets() {
		inTheWay := s.addr == addr || s.addr.IsUnspecified() || addr.IsUnspecified()
		if s.proto == proto && s.port == port && inTheWay && s.inode != 0 && (found == nil || s.listening && !found.listening) {
			found = &s
		}
	}
	if found == nil {
		return ""
	}
	who := "user " + userName(found.uid)
	if p := h.processes()[found.inode]; p != "" {
		return p + " of " + who
	}
	return "a process of " + who
}

func userName(uid uint32) string {
	id := strconv.Itoa(int(uid))
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return id
}

// listProcesses has which process has a socket open, by its inode, of those that this user may see.
func listProcesses() map[uint32]string {
	list := map[uint32]string{}
	procs, _ := procfs.AllProcs()
	for _, p := range procs {
		targets, err := p.FileDescriptorTargets()
		if err != nil {
			continue
		}
		comm, _ := p.Comm()
		for _, target := range targets {
			var inode uint32
			if _, err := fmt.Sscanf(target, "socket:[%d]", &inode); err == nil {
				list[inode] = fmt.Sprintf("process %d (%s)", p.PID, comm)
			}
		}
	}
	return list
}
