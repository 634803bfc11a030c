package nat

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"golang.org/x/sys/unix"
)

// hostNetNS is the network namespace that the process was started in: the host's, when RootlessKit detached
// the child's (--detach-netns). It is taken before any thread can have entered another one.
var hostNetNS = netNSAt("/proc/self/ns/net")

// netNS identifies a network namespace, as the kernel does in links: "net:[4026531840]". "" is none.
type netNS string

func netNSAt(path string) netNS {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return ""
	}
	return netNS(fmt.Sprintf("net:[%d]", st.Ino))
}

// hasThread tells whether the calling thread is in it. To read the link takes half the time of a stat.
func (n netNS) hasThread() bool {
	var buf [64]byte
	length, err := unix.Readlink("/proc/thread-self/ns/net", buf[:])
	return err == nil && string(buf[:length]) == string(n)
}

// hostInSight tells whether the process is on the host and the calling thread in the child namespace: the
// host can be seen from another thread then.
func hostInSight(child netNS) bool {
	return child != "" && child != hostNetNS && child.hasThread()
}

// onHost calls f on a thread of the host's network namespace, and returns false if it got none. All threads
// of the daemon are there, but those that were locked to go elsewhere. The caller waits for f, which takes
// milliseconds.
func onHost(f func()) bool {
	done := make(chan bool)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		there := hostNetNS.hasThread()
		if there {
			f()
		}
		done <- there
	}()
	return <-done
}

// rootlessKit is the program that binds on the host: this process's parent, where it is one.
func rootlessKit() string {
	file, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", os.Getppid()))
	if err != nil || !strings.Contains(filepath.Base(file), "rootlesskit") {
		return "$(which rootlesskit)"
	}
	return file
}

// look is a look at ports of one protocol on the host, by binding sockets there as a port driver would.
type look struct {
	proto types.Protocol
	addrs []address
	// exclusive leaves out SO_REUSEADDR: a port that is kept by a socket which doesn't listen is taken, too.
	exclusive bool
}

// find returns the first of the ports that next gives, until 0, which is free on each of the addresses, and
// the address where the last one before it was taken. Where it can't be told, the port driver is asked: only
// what is in use counts as taken. It is called on the host, and leaves no socket open. A failed bind leaves a
// socket as it was, so that a taken port costs one system call.
func (l *look) find(next func() int) (free int, taken netip.Addr) {
	var fds []int
	drop := func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
		fds = fds[:0]
	}
	defer drop()
ports:
	for free = next(); free != 0; free = next() {
		for n, a := range l.addrs {
			if n == len(fds) {
				fd, err := socket(l.proto, a.host, !l.exclusive)
				if err != nil {
					return free, taken
				}
				fds = append(fds, fd)
			}
			if unix.Bind(fds[n], sockaddr(a.host, free)) == unix.EADDRINUSE {
				if taken = a.host; n > 0 { // The first n are bound.
					drop()
				}
				continue ports
			}
		}
		break
	}
	return free, taken
}

// refusal tells why port can't be had on addr, with the text that RootlessKit's builtin port driver would
// give, or returns nil if it can, or can't be seen. It is called on the host.
func (l *look) refusal(addr netip.Addr, port int) error {
	fd, err := socket(l.proto, addr, !l.exclusive)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	return bind(fd, l.proto, addr, port, true)
}

// bind binds fd to a port, and has it listen if it is to and of TCP.
func bind(fd int, proto types.Protocol, addr netip.Addr, port int, listen bool) error {
	err := unix.Bind(fd, sockaddr(addr, port))
	if err == nil && listen && proto == types.TCP {
		err = unix.Listen(fd, 1)
	}
	if err == nil {
		return nil
	}
	return listenError(proto, addr, port, err)
}

func listenError(proto types.Protocol, addr netip.Addr, port int, err error) error {
	return fmt.Errorf("listen %s %s: bind: %w", network(proto, addr.Is6()), netip.AddrPortFrom(addr, uint16(port)), err)
}

// socket makes a socket in the calling thread's namespace, to bind to addr. One of TCP is made as a port
// driver's, if reuse is set.
func socket(proto types.Protocol, addr netip.Addr, reuse bool) (int, error) {
	domain, typ := unix.AF_INET, unix.SOCK_DGRAM
	if addr.Is6() {
		domain = unix.AF_INET6
	}
	if proto == types.TCP {
		typ = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC, 0)
	if err == nil && reuse && proto == types.TCP {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil && domain == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err != nil {
		unix.Close(fd) // Or -1, which is none.
	}
	return fd, err
}

func sockaddr(addr netip.Addr, port int) unix.Sockaddr {
	if addr.Is6() {
		return &unix.SockaddrInet6{Addr: addr.As16(), Port: port}
	}
	return &unix.SockaddrInet4{Addr: addr.As4(), Port: port}
}

// settings has files of the host's settings (ip-sysctl.rst), by name. Whichever thread reads one at offset 0
// gets what is set on the host now.
var settings = sync.OnceValue(func() map[string]int {
	fds := map[string]int{portRange: -1, reservedPorts: -1, unprivilegedStart: -1}
	onHost(func() {
		for name := range fds {
			fds[name], _ = unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0) // With an error, it's -1.
		}
	})
	return fds
})

const (
	portRange         = "/proc/sys/net/ipv4/ip_local_port_range"
	reservedPorts     = "/proc/sys/net/ipv4/ip_local_reserved_ports"
	unprivilegedStart = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
)

// hostSetting returns a setting, in one read: the kernel has no more to say at another offset, and cuts what
// buf can't take. It makes another one then.
func hostSetting(name string, buf []byte) []byte { return readSetting(settings()[name], buf) }

// readSetting is [hostSetting] of an open file.
func readSetting(fd int, buf []byte) []byte {
	n, _ := unix.Pread(fd, buf, 0)
	for n == len(buf) {
		buf = make([]byte, 16*len(buf))
		n, _ = unix.Pread(fd, buf, 0)
	}
	return bytes.TrimSpace(buf[:max(n, 0)])
}

// hostUnprivileged returns the host's first port that takes no privilege, or 0.
func hostUnprivileged() int {
	port, _ := strconv.Atoi(string(hostSetting(unprivilegedStart, make([]byte, 64))))
	return port
}
