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
	hanging *hanging                // What is asked in the end; nil: nobody is.
	givesUp bool                    // It doesn't wait without bounds.
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
	"pasta": func(*hanging) subject {
		p := &pasta{own: map[ownPort]ownBindings{}}
		return subject{client: func() PortDriverClient { return p.client(&request{first: 1, last: 2}, false) }}
	},
	"pasta, a fixed port": func(*hanging) subject {
		p := &pasta{own: map[ownPort]ownBindings{}}
		return subject{client: func() PortDriverClient { return p.client(&request{first: 1, last: 2}, true) }}
	},
}

func one(d PortDriverClient, h *hanging, givesUp bool) subject {
	return subject{client: func() PortDriverClient { return d }, hanging: h, givesUp: givesUp}
}

const contractPort = 22000

var contractHosts = []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.2"), netip.IPv6Loopback()}

// onHost tells whether a port of an address is taken on the host.
func (s subject) onHost(t *testing.T, host netip.Addr) (taken bool) {
	t.Helper()
	if s.hanging == nil {
		assert.Assert(t, onHost(func() {
			taken = (&look{proto: types.UDP, exclusive: true}).refusal(host, contractPort) != nil
		}))
		return taken
	}
	s.hanging.mu.Lock()
	defer s.hanging.mu.Unlock()
	_, taken = s.hanging.exposed[mapping{"udp", host, contractPort}]
	return taken
}

func (s subject) add(t *testing.T, d PortDriverClient, host netip.Addr) (func() error, error) {
	ctx, _ := logged()
	child := d.ChildHostIP("udp", host)
	assert.Check(t, child.IsValid() && child == d.ChildHostIP("udp", host))
	return d.AddPort(ctx, "udp", host, child, contractPort)
}

// What whoever calls a PortDriverClient relies on.
var promises = map[string]func(t *testing.T, s subject){
	"a success is removed once": func(t *testing.T, s subject) {
		remove, err := s.add(t, s.client(), contractHosts[0])
		assert.NilError(t, err)
		assert.Check(t, s.onHost(t, contractHosts[0]))
		assert.Check(t, remove())
		assert.Check(t, !s.onHost(t, contractHosts[0]))
		// Nor does it remove what is another's by now.
		again, err := s.add(t, s.client(), contractHosts[0])
		assert.NilError(t, err)
		assert.Check(t, remove() != nil)
		assert.Check(t, s.onHost(t, contractHosts[0]))
		assert.Check(t, again())
	},
	"the host addresses of a request are removed one by one": func(t *testing.T, s subject) {
		d := s.client()
		var removals []func() error
		for _, host := range contractHosts {
			remove, err := s.add(t, d, host)
			assert.NilError(t, err)
			removals = append(removals, remove)
		}
		for i, remove := range removals {
			for _, host := range contractHosts[i:] {
				assert.Check(t, s.onHost(t, host), host)
			}
			assert.Check(t, remove())
		}
		for _, host := range contractHosts {
			assert.Check(t, !s.onHost(t, host), host)
		}
	},
	"a refusal leaves nothing": func(t *testing.T, s subject) {
		if s.hanging != nil {
			s.hanging.taken = func(int) bool { return true }
		} else {
			l, err := listenOnHost(t, mapping{"udp", netip.IPv6Unspecified(), contractPort})
			assert.NilError(t, err)
			defer l.Close()
		}
		for range 2 {
			remove, err := s.add(t, s.client(), contractHosts[0])
			assert.Check(t, is.ErrorContains(err, "address already in use"))
			assert.Check(t, remove == nil)
			assert.Check(t, !s.onHost(t, contractHosts[0]))
		}
	},
	"a caller that gives up is seen through": func(t *testing.T, s subject) {
		ctx, _ := logged()
		ctx, cancel := context.WithCancel(ctx)
		d := s.client()
		r, err := newRequest(ask(types.UDP, contractPort, contractPort, "127.0.0.1", "127.0.0.2", "::1"), d)
		assert.NilError(t, err)
		leases := newReservations()
		a, err := try(ctx, r, cancelling{d, cancel}, leases, contractPort, contractPort)
		assert.Check(t, is.ErrorIs(err, context.Canceled))
		assert.Assert(t, a != nil)
		a.letGo()
		for _, at := range r.addrs {
			assert.Check(t, !s.onHost(t, at.host), at.host)
			assert.Check(t, !isReserved(childPort{types.UDP, netip.AddrPortFrom(at.child, contractPort)}))
		}
	},
}

// What they rely on where somebody is asked.
var promisesOfAnswers = map[string]func(t *testing.T, s subject){
	"a late answer is undone, or waited for": func(t *testing.T, s subject) {
		s.hanging.hang()
		time.AfterFunc(time.Minute, s.hanging.resume)
		var (
			remove func() error
			err    error
		)
		waited := took(func() { remove, err = s.add(t, s.client(), contractHosts[0]) })
		if !s.givesUp {
			assert.Check(t, is.Equal(waited, time.Minute))
			assert.NilError(t, err)
			assert.Check(t, remove())
			return
		}
		assert.Check(t, is.Equal(waited, patience))
		var u *unsettled
		assert.Assert(t, errors.As(err, &u))
		assert.Check(t, is.ErrorIs(err, errNoAnswer))
		assert.Check(t, is.Equal(took(func() { <-u.settled }), time.Minute-patience))
		assert.Check(t, is.Equal(s.hanging.onHost(), 0))
		assert.Check(t, is.Equal(s.hanging.calls(), 2))
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
		if newSubject(&hanging{fakeDriver: new(fakeDriver)}).hanging == nil {
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
		if s.hanging == nil {
			inChild(t)
		}
		check(t, s)
	})
}
