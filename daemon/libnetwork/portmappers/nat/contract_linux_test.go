package nat

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// subject is a PortDriverClient that is to keep the contract.
type subject struct {
	client  func() PortDriverClient // For each request, the driver to ask.
	host    contractHost
	addrs   []netip.Addr // Of the host, where it serves UDP.
	port    int
	asked   asked // In the end; nil: nobody is.
	givesUp bool  // It doesn't wait without bounds.
}

// contractHost is the host of a subject.
type contractHost interface {
	exposes(host netip.Addr, port int) bool
	// frees tells whether it doesn't, any more.
	frees(host netip.Addr, port int) bool
	// hold has somebody else hold a port of the first address.
	hold(t *testing.T, port int) (release func())
}

// asked is RootlessKit, or what stands in for it.
type asked interface {
	// late has each AddPort wait for so long from now on.
	late(time.Duration)
	// calls is the number of calls, with removals.
	calls() int
}

// subjects are the drivers, and the drivers round a driver, by themselves and as
// NewPortMapper puts them.
var subjects = map[string]func(h *hanging) subject{
	"fake":    func(h *hanging) subject { return one(h, h, false) },
	"silence": func(h *hanging) subject { return one(&silence{PortDriverClient: h}, h, true) },
	"childIPs": func(h *hanging) subject {
		h.child4 = netip.MustParseAddr("127.0.0.1")
		return one(&childIPs{PortDriverClient: h, byHost: map[netip.Addr]netip.Addr{}}, h, false)
	},
	"both": func(h *hanging) subject {
		h.child4 = netip.MustParseAddr("127.0.0.1")
		return one(NewPortMapper(Config{RlkClient: h}).rooms.driver, h, true)
	},
	"pasta":               func(*hanging) subject { return ofPasta(false) },
	"pasta, a fixed port": func(*hanging) subject { return ofPasta(true) },
}

const contractPort = 22000

var contractAddrs = []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2"), netip.IPv6Loopback()}

func one(d PortDriverClient, h *hanging, givesUp bool) subject {
	return subject{func() PortDriverClient { return d }, h, contractAddrs, contractPort, h, givesUp}
}

func ofPasta(fixed bool) subject {
	p := &pasta{own: map[ownPort]ownBindings{}}
	d := func() PortDriverClient { return &pastaClient{pasta: p, insist: fixed} }
	return subject{client: d, host: realHost{}, addrs: contractAddrs, port: contractPort}
}

func (h *hanging) exposes(host netip.Addr, port int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.exposed[mapping{"udp", host, port}]
	return ok
}

func (h *hanging) frees(host netip.Addr, port int) bool { return !h.exposes(host, port) }

func (h *hanging) hold(_ *testing.T, port int) func() {
	h.holdRange(port, port)
	return func() { h.holdRange(0, 0) }
}

func (h *hanging) late(d time.Duration) {
	h.hang()
	time.AfterFunc(d, h.resume)
}

// realHost is the host that the test runs on. What a driver has said it did may take as
// long as its lag.
type realHost struct{ lag time.Duration }

func (r realHost) exposes(host netip.Addr, port int) bool { return r.becomes(true, host, port) }
func (r realHost) frees(host netip.Addr, port int) bool   { return r.becomes(false, host, port) }

func (r realHost) becomes(taken bool, host netip.Addr, port int) bool {
	for end := time.Now().Add(r.lag); ; time.Sleep(10 * time.Millisecond) {
		is := !taken // What can't be looked at is neither.
		onHost(func() { is = (&look{proto: types.UDP, exclusive: true}).refusal(host, port) != nil })
		if is == taken || !time.Now().Before(end) {
			return is == taken
		}
	}
}

func (realHost) hold(t *testing.T, port int) func() {
	l, err := listenOnHost(t, mapping{"udp", netip.IPv4Unspecified(), port})
	assert.NilError(t, err)
	return func() { l.Close() }
}

func (s subject) exposes(host netip.Addr) bool { return s.host.exposes(host, s.port) }
func (s subject) frees(host netip.Addr) bool   { return s.host.frees(host, s.port) }

func (s subject) add(t *testing.T, d PortDriverClient, host netip.Addr) (func() error, error) {
	ctx, _ := logged()
	child := d.ChildHostIP("udp", host)
	assert.Check(t, child.IsValid() && child == d.ChildHostIP("udp", host))
	return d.AddPort(ctx, "udp", host, child, s.port)
}

// What whoever calls a PortDriverClient relies on.
var promises = map[string]func(t *testing.T, s subject){
	"a success is removed once": func(t *testing.T, s subject) {
		host := s.addrs[0]
		remove, err := s.add(t, s.client(), host)
		assert.NilError(t, err)
		assert.Check(t, s.exposes(host))
		assert.Check(t, remove())
		assert.Check(t, s.frees(host))
		// Nor does it remove what is another's by now.
		again, err := s.add(t, s.client(), host)
		assert.NilError(t, err)
		assert.Check(t, remove() != nil)
		assert.Check(t, s.exposes(host))
		assert.Check(t, again())
		assert.Check(t, s.frees(host))
	},
	"the host addresses of a request are removed one by one": func(t *testing.T, s subject) {
		d := s.client()
		var removals []func() error
		for _, host := range s.addrs {
			remove, err := s.add(t, d, host)
			assert.NilError(t, err)
			removals = append(removals, remove)
		}
		for i, remove := range removals {
			for _, host := range s.addrs[i:] {
				assert.Check(t, s.exposes(host), host)
			}
			assert.Check(t, remove())
		}
		for _, host := range s.addrs {
			assert.Check(t, s.frees(host), host)
		}
	},
	"a refusal leaves nothing": func(t *testing.T, s subject) {
		release := s.host.hold(t, s.port)
		for range 2 {
			remove, err := s.add(t, s.client(), s.addrs[0])
			assert.Check(t, err != nil && driverVerdict(err) != no, "%v", err)
			assert.Check(t, remove == nil)
		}
		release()
		for _, host := range s.addrs {
			assert.Check(t, s.frees(host), host)
		}
	},
	"a caller that gives up is seen through": func(t *testing.T, s subject) {
		ctx, _ := logged()
		ctx, cancel := context.WithCancel(ctx)
		d := s.client()
		var addrs []string
		for _, host := range s.addrs {
			addrs = append(addrs, host.String())
		}
		r, err := newRequest(ask(types.UDP, s.port, s.port, addrs...), d)
		assert.NilError(t, err)
		leases := newReservations()
		a, err := try(ctx, r, cancelling{d, cancel}, leases, s.port, s.port)
		assert.Check(t, is.ErrorIs(err, context.Canceled))
		assert.Assert(t, a != nil)
		a.letGo()
		for _, at := range r.addrs {
			assert.Check(t, s.frees(at.host), at.host)
			assert.Check(t, !isReserved(childPort{types.UDP, netip.AddrPortFrom(at.child, uint16(s.port))}))
		}
	},
}

// What they rely on where somebody is asked.
var promisesOfAnswers = map[string]func(t *testing.T, s subject){
	"a late answer is undone, or waited for": func(t *testing.T, s subject) {
		const tooLong = patience + time.Second
		s.asked.late(tooLong)
		var (
			remove func() error
			err    error
		)
		waited := took(func() { remove, err = s.add(t, s.client(), s.addrs[0]) })
		if !s.givesUp {
			assert.Check(t, waited >= tooLong, waited)
			assert.NilError(t, err)
			assert.Check(t, s.exposes(s.addrs[0]))
			assert.Check(t, remove())
			assert.Check(t, s.frees(s.addrs[0]))
			return
		}
		assert.Check(t, waited >= patience && waited < tooLong, waited)
		assert.Check(t, remove == nil)
		var u *unsettled
		assert.Assert(t, errors.As(err, &u))
		assert.Check(t, is.ErrorIs(err, errNoAnswer))
		select {
		case <-u.settled:
			t.Error("settled before the answer")
		default:
		}
		<-u.settled
		assert.Check(t, s.frees(s.addrs[0]))
		assert.Check(t, is.Equal(s.asked.calls(), 2))
	},
}

// cancelling is a driver whose caller gives up while it is asked.
type cancelling struct {
	PortDriverClient
	cancel func()
}

func (c cancelling) AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, port int) (func() error, error) {
	c.cancel()
	return c.PortDriverClient.AddPort(ctx, proto, hostIP, childIP, port)
}

func TestContract(t *testing.T) {
	for name, newSubject := range subjects {
		for promise, check := range promises {
			t.Run(name+"/"+promise, func(t *testing.T) { keeps(t, newSubject, check) })
		}
		if newSubject(&hanging{fakeDriver: new(fakeDriver)}).asked == nil {
			continue
		}
		for promise, check := range promisesOfAnswers {
			t.Run(name+"/"+promise, func(t *testing.T) { keeps(t, newSubject, check) })
		}
	}
}

func keeps(t *testing.T, newSubject func(h *hanging) subject, check func(*testing.T, subject)) {
	f := newFake(t) // Its check that nothing is left comes last.
	f.forgets = true
	f.asked = append(f.asked, contractPort)
	synctest.Test(t, func(t *testing.T) {
		s := newSubject(&hanging{fakeDriver: f})
		if s.asked == nil {
			inChild(t)
		}
		check(t, s)
	})
}
