package nat

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"golang.org/x/sys/unix"
)

// hostNetNS is the network namespace that the process was started in: the
// host's, when RootlessKit detached the child's (--detach-netns). It is taken
// before any thread can have entered another one.
var hostNetNS = netNSAt("/proc/self/ns/net")

// netNS identifies a network namespace. The zero value is none.
type netNS struct{ dev, ino uint64 }

func netNSAt(path string) netNS {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return netNS{}
	}
	return netNS{uint64(st.Dev), st.Ino}
}

// hostInSight tells whether the process is on the host and the calling thread
// in the child namespace: the host can be seen from another thread then.
func hostInSight() bool {
	stateDir := os.Getenv("ROOTLESSKIT_STATE_DIR")
	if stateDir == "" || hostNetNS == (netNS{}) {
		return false
	}
	here := netNSAt("/proc/thread-self/ns/net")
	return here != hostNetNS && here != (netNS{}) && here == netNSAt(filepath.Join(stateDir, "netns"))
}

// onHost calls f on a thread of the host's network namespace, and returns false
// if it got none. All threads of the daemon are there, but those that were
// locked to go elsewhere. The caller's thread is not kept waiting for long:
// what f does is bounded.
func onHost(f func()) bool {
	done := make(chan bool)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		there := netNSAt("/proc/thread-self/ns/net") == hostNetNS
		if there {
			f()
		}
		done <- there
	}()
	return <-done
}

// look is a look at ports of one protocol on the host, by binding sockets there
// as a port driver would.
type look struct {
	proto types.Protocol
	addrs []netip.Addr
	// exclusive leaves out SO_REUSEADDR: a port that is kept by a socket which
	// doesn't listen is taken, too.
	exclusive bool
}

// find returns the first of the ports that next gives, until 0, which is free
// on each of the addresses. Where it can't be told, the port driver is asked:
// only what is in use counts as taken. It is called on the host, and leaves no
// socket open. A failed bind leaves a socket as it was, so that one does for
// many: a taken port costs one system call.
func (l *look) find(next func() int) int {
	fds := make([]int, len(l.addrs))
	for i := range fds {
		fds[i] = -1
	}
	drop := func(i int) {
		if fds[i] >= 0 {
			unix.Close(fds[i])
			fds[i] = -1
		}
	}
	defer func() {
		for i := range fds {
			drop(i)
		}
	}()
ports:
	for port := next(); port != 0; port = next() {
		for i, addr := range l.addrs {
			if fds[i] < 0 {
				var err error
				if fds[i], err = socket(l.proto, addr, !l.exclusive); err != nil {
					return port
				}
			}
			if unix.Bind(fds[i], sockaddr(addr, port)) == unix.EADDRINUSE {
				for j := range i { // These are bound.
					drop(j)
				}
				continue ports
			}
		}
		return port
	}
	return 0
}

// refusal tells why port can't be had on addr, with the text that RootlessKit's
// builtin port driver would give, or returns nil if it can, or can't be seen.
// It is called on the host.
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
	if err != nil {
		return fmt.Errorf("listen %s %s: bind: %w", network(proto, addr), netip.AddrPortFrom(addr, uint16(port)), err)
	}
	return nil
}

// socket makes a socket in the calling thread's namespace, to bind to addr. One
// of TCP is made as a port driver's, if reuse is set.
func socket(proto types.Protocol, addr netip.Addr, reuse bool) (int, error) {
	domain, typ := unix.AF_INET, unix.SOCK_DGRAM
	if addr.Is6() {
		domain = unix.AF_INET6
	}
	if proto == types.TCP {
		typ = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if reuse && proto == types.TCP {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil && domain == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func sockaddr(addr netip.Addr, port int) unix.Sockaddr {
	if addr.Is6() {
		return &unix.SockaddrInet6{Addr: addr.As16(), Port: port}
	}
	return &unix.SockaddrInet4{Addr: addr.As4(), Port: port}
}
