package nat

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

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

// childNetNSs has the child namespace by RootlessKit's state directory: it is the
// same for as long as the daemon runs, and a path takes time to look up.
var childNetNSs sync.Map

func childNetNS(stateDir string) netNS {
	if ns, ok := childNetNSs.Load(stateDir); ok {
		return ns.(netNS)
	}
	ns := netNSAt(filepath.Join(stateDir, "netns"))
	if ns != (netNS{}) {
		childNetNSs.Store(stateDir, ns)
	}
	return ns
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
	reserved    portSet
	start, next int

	refused lookRefusal // refused is the last port that was passed.
	taken   bool        // taken is set when any was passed since it is in use.
}

// lookRefusal is what the kernel said of a port.
type lookRefusal struct {
	addr  netip.Addr
	port  int
	errno error // errno is nil if no port was refused.
}

// portSet has a bit for each port; nil is the empty set.
type portSet []uint64

func (s portSet) has(port int) bool { return s != nil && s[port/64]&(1<<(port%64)) != 0 }

// newHostView returns a view for a search for a host port that serves reqs, or
// nil if the host can't be seen: unless the process is on the host and the
// calling thread is in the child namespace.
func newHostView(ctx context.Context, reqs []portmapperapi.PortBindingReq) *hostView {
	stateDir := os.Getenv("ROOTLESSKIT_STATE_DIR")
	if stateDir == "" || hostNetNS == (netNS{}) || reqs[0].Proto != types.TCP && reqs[0].Proto != types.UDP {
		return nil
	}
	child := childNetNS(stateDir)
	if child == (netNS{}) || child == hostNetNS || child != netNSAt("/proc/thread-self/ns/net") {
		return nil
	}
	v := &hostView{proto: reqs[0].Proto, first: int(reqs[0].HostPort), last: int(reqs[0].HostPortEnd)}
	for _, req := range reqs {
		v.addrs = append(v.addrs, addrOf(req.HostIP))
	}
	if v.first == 0 && v.last == 0 {
		var err error
		v.first, v.last, v.reserved, err = hostSysctls.dynamicPorts(ctx)
		if err != nil {
			logSysctls.Do(func() {
				log.G(ctx).WithFields(log.Fields{"error": err}).Warn("The host's dynamic port range cannot be read: asking the port driver for ports of the child's")
			})
			return nil
		}
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

// isOwn tells whether port may be bound by this daemon's own pasta.
func (v *hostView) isOwn(port int) bool { return v.implicit && ownPorts.has(port) }

// count returns the number of ports from first to last.
func (v *hostView) count() int { return v.last - v.first + 1 }

// port returns the port at index i.
func (v *hostView) port(i int) int { return v.first + (v.start+i)%v.count() }

// restart makes the next free look at all of the ports again.
func (v *hostView) restart() { v.next, v.taken = 0, false }

// jump makes the next free look at all of the ports again, from anywhere on.
func (v *hostView) jump() {
	v.start = rand.N(v.count())
	v.restart()
}

// free returns the next port that may be free on all of the view's addresses,
// or 0 if there are no more, and how many it passed before. An error means that
// looking doesn't help: a hostRefusal, that no port will do.
func (v *hostView) free() (port, passed int, err error) {
	from := v.next
	port, err = v.find()
	for i := from; i < v.next; i++ {
		if p := v.port(i); p != port && !v.reserved.has(p) {
			passed++
		}
	}
	return port, passed, err
}

// find is free without the count. It leaves no socket open.
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
			if err != nil {
				return 0, err
			}
			if at == v.count() {
				v.next = at
				return 0, nil
			}
			socks[n] = fd
			if at != i {
				i, agreed = at, 0
			}
			agreed++
		}
		v.next = i + 1
		if v.proto != types.TCP || v.listen(socks, v.port(i)) {
			return v.port(i), nil
		}
	}
}

// bindFrom binds a socket to addr and the first port that is free there, from
// the one at index i on, and returns that port's index, or count if there is
// none. A failed bind leaves a socket as it was, so one does for all: a taken
// port costs one system call. Where the socket is -1, it can't be told from here
// whether the port is free.
func (v *hostView) bindFrom(addr netip.Addr, i int) (fd, at int, _ error) {
	fd, err := v.socket(addr)
	if err != nil {
		return -1, 0, err
	}
	sa, setPort := sockaddr(addr)
	for ; i < v.count(); i++ {
		port := v.port(i)
		if v.reserved.has(port) {
			continue
		}
		setPort(port)
		err := unix.Bind(fd, sa)
		if err == nil {
			return fd, i, nil
		}
		v.refused = lookRefusal{addr, port, err}
		switch {
		case err == unix.EADDRINUSE && !v.isOwn(port):
			v.taken = true
			continue
		case err == unix.EACCES && v.implicit:
			continue // Privileged: pasta has no more rights than this process.
		case err == unix.EADDRINUSE, err == unix.EACCES:
			// Our pasta's own, or one that RootlessKit may have the capability for.
			unix.Close(fd)
			return -1, i, nil
		case err == unix.EADDRNOTAVAIL:
			err = v.refusal()
		}
		unix.Close(fd)
		return -1, 0, err
	}
	unix.Close(fd)
	return -1, i, nil
}

// listen tells whether all of socks, which are bound to port, can. With
// SO_REUSEADDR, two sockets may be bound to a port of which one may listen.
func (v *hostView) listen(socks []int, port int) bool {
	for n, fd := range socks {
		if fd < 0 {
			continue
		}
		if err := unix.Listen(fd, 1); err != nil {
			v.refused, v.taken = lookRefusal{v.addrs[n], port, err}, true
			return false
		}
	}
	return true
}

// socket returns a socket of the host, made as the port driver would, to bind
// to addr. It can be used from any thread.
func (v *hostView) socket(addr netip.Addr) (int, error) {
	kind := socketKind{domain: unix.AF_INET, typ: unix.SOCK_DGRAM}
	if addr.Is6() {
		kind.domain = unix.AF_INET6
	}
	if v.proto == types.TCP {
		kind.typ = unix.SOCK_STREAM
	}
	return spareSockets.take(kind)
}

type socketKind struct{ domain, typ int }

// spareSockets has a socket of the host of each kind that was needed so far. A
// socket belongs to the namespace of the thread that made it: with one at hand,
// a search need not wait for another thread.
var spareSockets = socketStock{fds: map[socketKind]int{}}

type socketStock struct {
	mu  sync.Mutex
	fds map[socketKind]int // -1 for one that was taken.
}

// take returns the spare socket, or a new one.
func (s *socketStock) take(kind socketKind) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if fd, ok := s.fds[kind]; ok && fd >= 0 {
		s.fds[kind] = -1
		return fd, nil
	}
	fd, err := -1, errNotOnHost
	onHost(func() { fd, err = kind.make() })
	if err == nil {
		s.fds[kind] = -1
	}
	return fd, err
}

// refill makes spare sockets for those that were taken.
func (s *socketStock) refill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	var taken []socketKind
	for kind, fd := range s.fds {
		if fd < 0 {
			taken = append(taken, kind)
		}
	}
	if taken == nil {
		return
	}
	ifOnHost(func() {
		for _, kind := range taken {
			if fd, err := kind.make(); err == nil {
				s.fds[kind] = fd
			}
		}
	})
}

// make makes a socket on the calling thread.
func (k socketKind) make() (int, error) {
	fd, err := unix.Socket(k.domain, k.typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if k.typ == unix.SOCK_STREAM {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil && k.domain == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// sockaddr returns the address of a port on addr, and what sets the port.
func sockaddr(addr netip.Addr) (sa unix.Sockaddr, setPort func(int)) {
	if addr.Is6() {
		sa := &unix.SockaddrInet6{Addr: addr.As16()}
		return sa, func(port int) { sa.Port = port }
	}
	sa4 := &unix.SockaddrInet4{Addr: addr.As4()}
	return sa4, func(port int) { sa4.Port = port }
}

// refusal is an error for the last port that was passed, with the text that
// RootlessKit's builtin port driver would give.
func (v *hostView) refusal() error {
	r := v.refused
	if r.errno == nil {
		return fmt.Errorf("all ports are reserved on the host (net.ipv4.ip_local_reserved_ports)")
	}
	return &hostRefusal{hostIP: r.addr, port: r.port, proto: v.proto, err: v.listenError(r.addr, r.port, r.errno)}
}

func (v *hostView) listenError(addr netip.Addr, port int, err error) error {
	family := "4"
	if addr.Is6() {
		family = "6"
	}
	return fmt.Errorf("listen %s%s %s: bind: %w", v.proto, family, netip.AddrPortFrom(addr, uint16(port)), err)
}

// look tells why port can't be had on addr, with the text that RootlessKit's
// builtin port driver would give, or returns nil if it can, or can't be seen.
func (v *hostView) look(addr netip.Addr, port int) error {
	fd, err := v.socket(addr)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	sa, setPort := sockaddr(addr)
	setPort(port)
	if err = unix.Bind(fd, sa); err == nil && v.proto == types.TCP {
		err = unix.Listen(fd, 1)
	}
	if err != nil {
		return v.listenError(addr, port, err)
	}
	return nil
}

var errNotOnHost = errors.New("no thread on the host")

// onHost calls f on a thread of the host's network namespace, and returns false
// if it got none. All threads of the daemon are there, but those that were
// locked to go elsewhere.
func onHost(f func()) bool {
	done := make(chan bool)
	go func() { done <- ifOnHost(f) }()
	return <-done
}

// ifOnHost calls f if the calling thread is in the host's network namespace.
func ifOnHost(f func()) bool {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if netNSAt("/proc/thread-self/ns/net") != hostNetNS {
		return false
	}
	f()
	return true
}

// sysctlAge is how old a setting that is used may be. A read takes longer than
// a look at a port: so the many ports of one container don't each pay for it.
const sysctlAge = 100 * time.Millisecond

// hostSysctls has the host's settings.
var hostSysctls sysctls

type sysctls struct {
	mu sync.Mutex
	// A read of these files at offset 0 gives the settings anew each time,
	// whichever thread reads.
	portRange, reserved *os.File
	// netNS is kept open since the kernel makes the inode anew, otherwise, for
	// each look at whether a thread is in this namespace.
	netNS *os.File

	// What was read last, and when.
	first, last   int
	reservedPorts portSet
	readAt        time.Time
}

// dynamicPorts returns what the host's administrator set (ip-sysctl.rst), or
// the allocator's range if that can't be understood. An error means that it
// can't be read.
func (s *sysctls) dynamicPorts(ctx context.Context) (first, last int, reserved portSet, _ error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.open(); err != nil {
		return 0, 0, nil, err
	}
	if time.Since(s.readAt) >= sysctlAge {
		s.read(ctx)
	}
	return s.first, s.last, s.reservedPorts, nil
}

func (s *sysctls) open() error {
	if s.reserved != nil {
		return nil
	}
	err := errNotOnHost
	onHost(func() {
		var files [3]*os.File
		for i, name := range [...]string{
			"/proc/sys/net/ipv4/ip_local_port_range",
			"/proc/sys/net/ipv4/ip_local_reserved_ports",
			"/proc/thread-self/ns/net",
		} {
			if files[i], err = os.Open(name); err != nil {
				for _, f := range files[:i] {
					f.Close()
				}
				return
			}
		}
		s.portRange, s.reserved, s.netNS = files[0], files[1], files[2]
	})
	return err
}

func (s *sysctls) read(ctx context.Context) {
	var err error
	s.readAt = time.Now()
	s.first, s.last, err = parsePortRange(readSysctl(s.portRange))
	if err == nil {
		s.reservedPorts, err = parsePortSet(readSysctl(s.reserved))
	}
	if err != nil {
		logSysctls.Do(func() {
			log.G(ctx).WithFields(log.Fields{"error": err}).Warn("The host's dynamic port range cannot be understood: using the allocator's")
		})
		f, l := portallocator.GetPortRange()
		s.first, s.last, s.reservedPorts = int(f), int(l), nil
	}
}

var logSysctls sync.Once

// readSysctl returns a setting in one read: the kernel has no more to say at
// another offset, and cuts what the buffer can't take.
func readSysctl(f *os.File) string {
	for size := 256; ; size *= 2 {
		buf := make([]byte, size)
		if n, _ := f.ReadAt(buf, 0); n < size { // With io.EOF.
			return strings.TrimSpace(string(buf[:n]))
		}
	}
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

// parsePortSet parses "8080,9000-9010".
func parsePortSet(text string) (portSet, error) {
	if text == "" {
		return nil, nil
	}
	set := make(portSet, 65536/64)
	for part := range strings.SplitSeq(text, ",") {
		a, b, isRange := strings.Cut(part, "-")
		if !isRange {
			b = a
		}
		first, err1 := strconv.ParseUint(a, 10, 16)
		last, err2 := strconv.ParseUint(b, 10, 16)
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("ip_local_reserved_ports is %q: %w", text, err)
		}
		for p := first; p <= last; p++ {
			set[p/64] |= 1 << (p % 64)
		}
	}
	return set, nil
}
