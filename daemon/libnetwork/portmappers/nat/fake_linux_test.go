package nat

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/log"
	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"github.com/sirupsen/logrus"
	logrustest "github.com/sirupsen/logrus/hooks/test"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// What dockerd's client puts before RootlessKit's answers.
const (
	answerPrefix  = "error while calling RootlessKit PortManager.AddPort(): "
	removalPrefix = "error while calling RootlessKit PortManager.RemovePort(): "
)

const slirpShrug = "reply.Error: map[desc:bad request: add_hostfwd: slirp_add_hostfwd failed]"

// mapping is a host port that fakeDriver exposes.
type mapping struct {
	proto string
	ip    netip.Addr
	port  int
}

// overlaps tells whether m and o can't be bound at the same time.
func (m mapping) overlaps(o mapping) bool {
	return m.proto == o.proto && m.port == o.port && m.ip.Is4() == o.ip.Is4() &&
		(m.ip == o.ip || m.ip.IsUnspecified() || o.ip.IsUnspecified())
}

// network is m's protocol and family as RootlessKit has it.
func (m mapping) network() string {
	if m.ip.Is6() {
		return m.proto + "6"
	}
	return m.proto + "4"
}

// fakeDriver is a PortDriverClient with a host of its own. It answers as
// RootlessKit's builtin driver does, and fails the test when it is misused.
type fakeDriver struct {
	t testing.TB

	// child4 is the child address of IPv4 host addresses that aren't loopback:
	// one for each fakeDriver, so that tests don't meet in the child namespace.
	child4 netip.Addr
	// taken tells whether another process has the port on the host.
	taken func(port int) bool
	// others has what other processes hold by address.
	others map[mapping]bool
	// shrugs makes all refusals slirp4netns' one.
	shrugs bool
	// believes makes it expose whatever it doesn't have itself, as pesto says it does.
	believes bool
	// bothFamilies makes an IPv4 wildcard take the port on IPv6, too, as
	// gvisor-tap-vsock's does.
	bothFamilies bool
	// forgets makes a port that is removed twice a refusal, not a misuse.
	forgets bool
	// listens makes it listen for real, on the host of the view's tests.
	listens bool
	// noIPv6 makes it serve IPv4 only. SCTP isn't served at all.
	noIPv6 bool
	// answer, when set, is asked first: an error is the answer, nil leaves it to
	// the fake. The call's number counts from 1.
	answer func(call int, m mapping) error
	// failRemovals is how many removals fail, and remove nothing.
	failRemovals int

	mu      sync.Mutex
	calls   int
	asked   []int // asked has the port of each call.
	nextID  int
	exposed map[mapping]int
	hosts   map[netip.Addr]netip.Addr // by child address
}

var fakes, fakeCalls atomic.Int32

// freeFilters lets the kernel catch up. It frees the filters of closed sockets,
// of which the allocator's have one each, in a work queue, and Linux 6.18 locks
// up for good when about a thousand wait there: a driver that answers at once
// makes that many. membarrier(2) waits for the grace period that they wait for.
func freeFilters() {
	_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, 1, 0, 0) // MEMBARRIER_CMD_GLOBAL
}

// addr converts ip. An invalid one gives the zero Addr.
func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// newFake returns a driver on whose host no port is taken. At the test's end
// nothing may be left: no host port, no reservation, no descriptor, no goroutine.
func newFake(t testing.TB) *fakeDriver {
	n := fakes.Add(1)
	f := &fakeDriver{
		t:       t,
		child4:  netip.AddrFrom4([4]byte{127, 80, byte(n / 200), byte(n%200 + 2)}),
		taken:   func(int) bool { return false },
		others:  map[mapping]bool{},
		exposed: map[mapping]int{},
		hosts:   map[netip.Addr]netip.Addr{},
	}
	goroutines, fds := runtime.NumGoroutine(), descriptors(t)
	t.Cleanup(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		for m := range f.exposed {
			t.Errorf("left on the host: %+v", m)
		}
		f.checkReservations()
		// A goroutine that has given its answer may not have ended yet.
		for end := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
			g, d := runtime.NumGoroutine(), descriptors(t)
			if g <= goroutines && d <= fds {
				break
			}
			if time.Now().After(end) {
				t.Errorf("left: %d goroutines and %d descriptors, of %d and %d before", g, d, goroutines, fds)
				break
			}
		}
	})
	return f
}

// descriptors counts the sockets, pipes and regular files that are open.
func descriptors(t testing.TB) int {
	entries, err := os.ReadDir("/proc/self/fd")
	assert.NilError(t, err)
	n := 0
	for _, e := range entries {
		// The runtime's poller comes and stays.
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(to, "anon_inode:") {
			n++
		}
	}
	return n
}

// checkReservations reserves and releases all that the driver was asked for.
func (f *fakeDriver) checkReservations() {
	pa := portallocator.Get()
	slices.Sort(f.asked)
	for _, port := range slices.Compact(f.asked) {
		for _, proto := range []string{"tcp", "udp"} {
			ips := []net.IP{f.child4.AsSlice(), net.IPv6loopback}
			if _, err := pa.RequestPortsInRange(ips, proto, port, port); err != nil {
				f.t.Errorf("still reserved: %d/%s: %v", port, proto, err)
				continue
			}
			for _, ip := range ips {
				pa.ReleasePort(ip, proto, port)
			}
		}
	}
}

func (f *fakeDriver) ChildHostIP(proto string, hostIP netip.Addr) netip.Addr {
	switch {
	case proto == "sctp", hostIP.Is6() && f.noIPv6:
		return netip.Addr{}
	case hostIP.IsLoopback() && hostIP.Is4():
		return hostIP
	case hostIP.Is6():
		return netip.IPv6Loopback()
	}
	return f.child4
}

// standsFor tells whether child may be the own address of host in the child
// namespace: no other host's, where the port driver connects to any.
func (f *fakeDriver) standsFor(child, host netip.Addr) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hosts[child] == (netip.Addr{}) {
		f.hosts[child] = host
	}
	return f.child4 == netip.MustParseAddr("127.0.0.1") && host.Is4() && f.hosts[child] == host &&
		netip.MustParsePrefix("127.128.0.0/9").Contains(child)
}

func (f *fakeDriver) AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, hostPort int) (func() error, error) {
	f.mu.Lock()
	f.calls++
	f.asked = append(f.asked, hostPort)
	call, answer := f.calls, f.answer
	f.mu.Unlock()
	if fakeCalls.Add(1)%128 == 0 {
		freeFilters()
	}

	if ctx.Done() != nil {
		f.t.Errorf("AddPort(%s %s:%d) can be cancelled: its outcome would be lost", proto, hostIP, hostPort)
	}
	if want := f.ChildHostIP(proto, hostIP); childIP != want && !f.standsFor(childIP, hostIP) {
		f.t.Errorf("AddPort(%s %s:%d): child address is %s, not %s", proto, hostIP, hostPort, childIP, want)
	}
	m := mapping{proto, hostIP, hostPort}
	if !childIP.IsValid() {
		return nil, fmt.Errorf("protocol %q is not supported by the RootlessKit port driver %q", m.network(), "fake")
	}
	if answer != nil {
		if err := answer(call, m); err != nil {
			return nil, err
		}
	}

	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.refusal(m); err != nil {
		return nil, errors.New(answerPrefix + err.Error())
	}
	undo := func() {}
	if f.listens {
		l, err := listenOnHost(f.t, m)
		if err != nil {
			if f.shrugs {
				err = errors.New(slirpShrug)
			}
			return nil, errors.New(answerPrefix + err.Error())
		}
		undo = func() { l.Close() }
	}
	f.nextID++
	id := f.nextID
	f.exposed[m] = id
	return func() error { return f.remove(m, id, undo) }, nil
}

// listenOnHost opens a socket in the namespace that is the tests' host.
func listenOnHost(t testing.TB, m mapping) (c io.Closer, err error) {
	family := "4"
	if m.ip.Is6() {
		family = "6"
	}
	addr := netip.AddrPortFrom(m.ip, uint16(m.port)).String()
	if !onHost(func() {
		if m.proto == "udp" {
			c, err = net.ListenPacket("udp"+family, addr)
		} else {
			c, err = net.Listen("tcp"+family, addr)
		}
	}) {
		t.Error("no thread on the host")
	}
	return c, err
}

// refusal returns the answer for a mapping that isn't to be had, or nil.
func (f *fakeDriver) refusal(m mapping) error {
	if id, ok := f.exposed[m]; ok {
		return fmt.Errorf("conflict with ID %d", id)
	}
	err := f.listenError(m)
	if err != nil && f.shrugs {
		return errors.New(slirpShrug)
	}
	return err
}

func (f *fakeDriver) listenError(m mapping) error {
	listen := fmt.Sprintf("listen %s %s:", m.network(), netip.AddrPortFrom(m.ip, uint16(m.port)))
	if m.ip.IsPrivate() && !f.believes {
		return errors.New(listen + " bind: cannot assign requested address")
	}
	if m.port < 1024 && !f.believes {
		return fmt.Errorf("cannot expose privileged port %d, you can add 'net.ipv4.ip_unprivileged_port_start=%d' to /etc/sysctl.conf (currently 1024), or set CAP_NET_BIND_SERVICE on rootlesskit binary, or choose a larger port number (>= 1024): %s bind: permission denied", m.port, m.port, listen)
	}
	inUse := f.taken(m.port) && !f.believes
	wanted := []mapping{m}
	if f.bothFamilies && m.ip == netip.IPv4Unspecified() {
		wanted = append(wanted, mapping{m.proto, netip.IPv6Unspecified(), m.port})
	}
	for _, w := range wanted {
		for o := range f.exposed {
			inUse = inUse || w.overlaps(o)
		}
		for o, held := range f.others {
			inUse = inUse || held && !f.believes && w.overlaps(o)
		}
	}
	if inUse {
		return errors.New(listen + " bind: address already in use")
	}
	return nil
}

func (f *fakeDriver) remove(m mapping, id int, undo func()) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.exposed[m] != id {
		if !f.forgets {
			f.t.Errorf("%+v was removed twice", m)
		}
		if f.shrugs {
			return errors.New(removalPrefix + "reply.Error: map[desc:bad request: remove_hostfwd: bad arguments.id]")
		}
		return fmt.Errorf("%sunknown id: %d", removalPrefix, id)
	}
	if f.failRemovals > 0 {
		f.failRemovals--
		return errors.New("boom")
	}
	undo()
	delete(f.exposed, m)
	return nil
}

// holdRange makes another process hold the host's ports from first to last.
func (f *fakeDriver) holdRange(first, last int) {
	f.taken = func(port int) bool { return first <= port && port <= last }
}

// ask asks for a host port in [first, last] on each of addrs.
func ask(proto types.Protocol, first, last int, addrs ...string) []portmapperapi.PortBindingReq {
	var reqs []portmapperapi.PortBindingReq
	for _, addr := range addrs {
		reqs = append(reqs, portmapperapi.PortBindingReq{PortBinding: types.PortBinding{
			Proto:       proto,
			IP:          net.IPv4(172, 17, 0, 2),
			Port:        80,
			HostIP:      netip.MustParseAddr(addr).AsSlice(),
			HostPort:    uint16(first),
			HostPortEnd: uint16(last),
		}})
	}
	return reqs
}

// published maps reqs and returns the host port, after checking that all of
// them have it on the host and in the child namespace. The test's end unmaps it.
func published(t testing.TB, f *fakeDriver, reqs []portmapperapi.PortBindingReq) int {
	t.Helper()
	pm := NewPortMapper(Config{RlkClient: f})
	pbs, err := pm.MapPorts(context.Background(), reqs)
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, pm.UnmapPorts(context.Background(), pbs)) })
	assert.Assert(t, len(pbs) == len(reqs))
	for _, pb := range pbs {
		assert.Equal(t, pb.HostPort, pbs[0].HostPort)
		assert.Equal(t, pb.HostPortEnd, pbs[0].HostPort)
		assert.Check(t, f.has(pb), "not on the host: %s", pb)
	}
	return int(pbs[0].HostPort)
}

func (f *fakeDriver) has(pb portmapperapi.PortBinding) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, ok := f.exposed[mapping{pb.Proto.String(), addr(pb.HostIP), int(pb.HostPort)}]
	return ok
}

// refused maps reqs, which must fail, and returns the error.
func refused(t testing.TB, f *fakeDriver, ctx context.Context, reqs []portmapperapi.PortBindingReq) error {
	t.Helper()
	pbs, err := NewPortMapper(Config{RlkClient: f}).MapPorts(ctx, reqs)
	assert.Assert(t, err != nil, "published: %v", pbs)
	assert.Check(t, pbs == nil)
	return err
}

// logged returns a context whose logger keeps what is logged.
func logged() (context.Context, *logrustest.Hook) {
	logger, hook := logrustest.NewNullLogger()
	logger.SetOutput(io.Discard)
	logger.SetLevel(logrus.DebugLevel)
	return log.WithLogger(context.Background(), logrus.NewEntry(logger)), hook
}

func entries(hook *logrustest.Hook, level logrus.Level) []*logrus.Entry {
	var es []*logrus.Entry
	for _, e := range hook.AllEntries() {
		if e.Level == level {
			es = append(es, e)
		}
	}
	return es
}
