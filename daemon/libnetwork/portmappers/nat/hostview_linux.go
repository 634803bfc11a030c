package nat

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/log"
	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"golang.org/x/sys/unix"
)

// hostNetNS is the network namespace that the process was started in: the
// host's, when RootlessKit detached the child's (--detach-netns). It is taken
// before any thread can have entered another one.
var hostNetNS = netNSAt("/proc/self/ns/net")

// hostCursor is the dynamic host port that was published last, of all searches
// with a view.
var hostCursor atomic.Int32

// netNS identifies a network namespace. The zero value is none.
type netNS struct{ dev, ino uint64 }

func netNSAt(path string) netNS {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return netNS{}
	}
	return netNS{uint64(st.Dev), st.Ino}
}

// hostView looks at the host's ports, from inside MapPorts: not at what the
// port driver says, but by binding sockets of the host's network namespace as
// the port driver would. It is a help: what it sees can change at once, and
// where it can't see, the port driver is asked.
type hostView struct {
	proto types.Protocol
	addrs []netip.Addr
	// implicit is set when no port driver is asked: pasta is to find the port free.
	implicit bool

	// What is looked at: the ports first to last without those reserved, from
	// the one at index start on, and around. The next look is at index next.
	first, last int
	reserved    []portInterval
	start, next int
	taken       bool // taken is set when a port was passed since it is in use.
}

type portInterval struct{ first, last int }

// newHostView returns a view for a search for a host port that serves reqs, or
// nil if the host can't be seen: unless the process is on the host and the
// calling thread is in the child namespace.
func newHostView(ctx context.Context, reqs []portmapperapi.PortBindingReq) *hostView {
	stateDir := os.Getenv("ROOTLESSKIT_STATE_DIR")
	if stateDir == "" || hostNetNS == (netNS{}) || reqs[0].Proto != types.TCP && reqs[0].Proto != types.UDP {
		return nil
	}
	child := netNSAt(filepath.Join(stateDir, "netns"))
	if child == (netNS{}) || child == hostNetNS || child != netNSAt("/proc/thread-self/ns/net") {
		return nil
	}
	v := &hostView{proto: reqs[0].Proto, first: int(reqs[0].HostPort), last: int(reqs[0].HostPortEnd)}
	for _, req := range reqs {
		v.addrs = append(v.addrs, addrOf(req.HostIP))
	}
	if v.first == 0 && v.last == 0 {
		sysctls, ok := hostSysctls()
		if !ok {
			return nil
		}
		v.first, v.last, v.reserved = sysctls.dynamicPorts(ctx)
		if cursor := int(hostCursor.Load()); v.first <= cursor && cursor < v.last {
			v.start = cursor - v.first + 1
		}
	}
	if v.first < 1 || v.last < v.first {
		return nil // The allocator tells of an invalid range.
	}
	return v
}

// lookForPasta makes the view look at what pasta will bind.
func (v *hostView) lookForPasta() {
	v.implicit = true
	v.addrs = []netip.Addr{netip.IPv4Unspecified()}
	if fd, err := v.socket(netip.IPv6Unspecified()); err == nil { // The kernel has IPv6.
		unix.Close(fd)
		v.addrs = append(v.addrs, netip.IPv6Unspecified())
	}
}

// leads tells whether the view chooses the port, or what was asked for is
// asked of the port driver.
func (v *hostView) leads(fixed bool) bool {
	return !fixed || v.implicit && !ownPorts.has(v.first)
}

// count returns the number of ports from first to last.
func (v *hostView) count() int { return v.last - v.first + 1 }

// port returns the port at index i.
func (v *hostView) port(i int) int { return v.first + (v.start+i)%v.count() }

// restart makes the next free look at all of the ports again.
func (v *hostView) restart() { v.next, v.taken = 0, false }

// free returns the next port that is free on all of the view's addresses, or 0
// if there are no more, and how many ports it passed for that. An error means
// that looking doesn't help.
func (v *hostView) free() (port, passed int, err error) {
	from := v.next
	seen := onHost(func() { port, err = v.find() })
	if !seen {
		err = errors.New("no thread on the host")
	}
	return port, v.next - from, err
}

// find is free, on the host. It leaves no socket open.
func (v *hostView) find() (int, error) {
	socks := make([]int, len(v.addrs))
	for n := range socks {
		socks[n] = -1
	}
	closeSock := func(n int) {
		if socks[n] >= 0 {
			unix.Close(socks[n])
			socks[n] = -1
		}
	}
	defer func() {
		for n := range socks {
			closeSock(n)
		}
	}()
	for {
		// In turn, each address names the next index that is free there, until
		// all have named the same one.
		i := v.next
		for n, agreed := 0, 0; agreed < len(v.addrs); n = (n + 1) % len(v.addrs) {
			closeSock(n)
			fd, at, err := v.bindFrom(v.addrs[n], i)
			if fd < 0 {
				v.next = v.count()
				return 0, err
			}
			socks[n] = fd
			if at != i {
				i, agreed = at, 0
			}
			agreed++
		}
		v.next = i + 1
		if v.proto != types.TCP || v.listen(socks) {
			return v.port(i), nil
		}
	}
}

// bindFrom binds a socket to addr and the first port that is free there, from
// the one at index i on, and returns that port's index. The socket is -1 if
// there is none. A failed bind leaves a socket as it was, so one does for all:
// a taken port costs one system call.
func (v *hostView) bindFrom(addr netip.Addr, i int) (fd, at int, err error) {
	fd, err = v.socket(addr)
	if err != nil {
		return -1, 0, err
	}
	for ; i < v.count(); i++ {
		port := v.port(i)
		if v.isReserved(port) {
			continue
		}
		switch err := unix.Bind(fd, sockaddr(addr, port)); err {
		case nil:
			return fd, i, nil
		case unix.EADDRINUSE:
			v.taken = true
		case unix.EACCES: // Privileged.
		default:
			unix.Close(fd)
			return -1, 0, err
		}
	}
	unix.Close(fd)
	return -1, 0, nil
}

// listen tells whether all of socks can. With SO_REUSEADDR, two sockets may be
// bound to a port of which one may listen.
func (v *hostView) listen(socks []int) bool {
	for _, fd := range socks {
		if err := unix.Listen(fd, 1); err != nil {
			v.taken = true
			return false
		}
	}
	return true
}

// socket makes a socket as the port driver would.
func (v *hostView) socket(addr netip.Addr) (int, error) {
	domain, typ := unix.AF_INET, unix.SOCK_DGRAM
	if addr.Is6() {
		domain = unix.AF_INET6
	}
	if v.proto == types.TCP {
		typ = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if v.proto == types.TCP {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil && addr.Is6() {
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

func (v *hostView) isReserved(port int) bool {
	for _, r := range v.reserved {
		if r.first <= port && port <= r.last {
			return true
		}
	}
	return false
}

// refusal tells why port can't be had on one of the view's addresses.
func (v *hostView) refusal(port int) error {
	for _, addr := range v.addrs {
		if err := v.look(addr, port); err != nil {
			return &hostRefusal{hostIP: addr, port: port, proto: v.proto, err: err}
		}
	}
	return fmt.Errorf("host port %d/%s is reserved", port, v.proto)
}

// look tells why port can't be had on addr, with the text that RootlessKit's
// builtin port driver would give, or returns nil if it can, or can't be seen.
func (v *hostView) look(addr netip.Addr, port int) (err error) {
	onHost(func() {
		fd, errSock := v.socket(addr)
		if errSock != nil {
			return
		}
		defer unix.Close(fd)
		call := "bind"
		err = unix.Bind(fd, sockaddr(addr, port))
		if err == nil && v.proto == types.TCP {
			call, err = "listen", unix.Listen(fd, 1)
		}
		if err != nil {
			family := "4"
			if addr.Is6() {
				family = "6"
			}
			err = fmt.Errorf("listen %s%s %s: %s: %w", v.proto, family, netip.AddrPortFrom(addr, uint16(port)), call, err)
		}
	})
	return err
}

// onHost calls f on a thread of the host's network namespace, and returns false
// if it got none. All threads of the daemon are there, but those that were
// locked to go elsewhere.
func onHost(f func()) bool {
	done := make(chan bool)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		seen := netNSAt("/proc/thread-self/ns/net") == hostNetNS
		if seen {
			f()
		}
		done <- seen
	}()
	return <-done
}

// sysctls has the files of the host's settings, which a read at offset 0 gives
// anew each time, whichever thread reads.
type sysctls struct{ portRange, reserved *os.File }

// hostSysctls opens the host's settings, once.
var hostSysctls = sync.OnceValues(func() (s sysctls, ok bool) {
	seen := onHost(func() {
		var err1, err2 error
		s.portRange, err1 = os.Open("/proc/sys/net/ipv4/ip_local_port_range")
		s.reserved, err2 = os.Open("/proc/sys/net/ipv4/ip_local_reserved_ports")
		ok = err1 == nil && err2 == nil
	})
	return s, seen && ok
})

// dynamicPorts returns what the host's administrator set (ip-sysctl.rst), or
// the allocator's range if that can't be understood.
func (s sysctls) dynamicPorts(ctx context.Context) (first, last int, reserved []portInterval) {
	first, last, err := parsePortRange(readSysctl(s.portRange))
	if err == nil {
		reserved, err = parsePortIntervals(readSysctl(s.reserved))
	}
	if err != nil {
		logSysctls.Do(func() {
			log.G(ctx).WithFields(log.Fields{"error": err}).Warn("The host's dynamic port range cannot be read: using the allocator's")
		})
		f, l := portallocator.GetPortRange()
		return int(f), int(l), nil
	}
	return first, last, reserved
}

var logSysctls sync.Once

func readSysctl(f *os.File) string {
	text, _ := io.ReadAll(io.NewSectionReader(f, 0, 1<<20)) // A short text is found out by its parser.
	return strings.TrimSpace(string(text))
}

func parsePortRange(text string) (first, last int, err error) {
	fields := strings.Fields(text)
	if len(fields) != 2 {
		return 0, 0, fmt.Errorf("ip_local_port_range is %q: want two ports", text)
	}
	first, err1 := strconv.Atoi(fields[0])
	last, err2 := strconv.Atoi(fields[1])
	if err := errors.Join(err1, err2); err != nil || first < 1 || last > 65535 || last < first {
		return 0, 0, fmt.Errorf("ip_local_port_range is %q: want two ports in order", text)
	}
	return first, last, nil
}

// parsePortIntervals parses "8080,9000-9010".
func parsePortIntervals(text string) ([]portInterval, error) {
	var list []portInterval
	for part := range strings.SplitSeq(text, ",") {
		if part == "" {
			continue
		}
		a, b, isRange := strings.Cut(part, "-")
		if !isRange {
			b = a
		}
		first, err1 := strconv.Atoi(a)
		last, err2 := strconv.Atoi(b)
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("ip_local_reserved_ports is %q: %w", text, err)
		}
		list = append(list, portInterval{first, last})
	}
	return list, nil
}
