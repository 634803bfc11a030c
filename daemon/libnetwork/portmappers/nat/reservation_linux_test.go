package nat

import (
	"context"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// reserve reserves a child port n times over, as host addresses that share it do.
func reserve(t *testing.T, r *reservations, port, n int) (*request, childPort) {
	t.Helper()
	child := netip.MustParseAddr("127.81.0.1")
	_, err := portallocator.Get().RequestPort(child.AsSlice(), "udp", port)
	assert.NilError(t, err)
	req := &request{proto: types.UDP, first: port, last: port}
	for range n {
		req.addrs = append(req.addrs, address{host: child, child: child})
		r.join(req.childPort(0, port))
	}
	return req, req.childPort(0, port)
}

func has(r *reservations, proto types.Protocol, port int) (found bool) {
	r.each(func(p childPort) { found = found || p.proto == proto && int(p.at.Port()) == port })
	return found
}

func isReserved(p childPort) bool {
	ip, port := p.at.Addr().AsSlice(), int(p.at.Port())
	if _, err := portallocator.Get().RequestPort(ip, p.proto.String(), port); err != nil {
		return true
	}
	portallocator.Get().ReleasePort(ip, p.proto.String(), port)
	return false
}

func TestReservationEndsWithTheLastToLeave(t *testing.T) {
	r := newReservations()
	_, p := reserve(t, r, 20000, 2)
	assert.Check(t, has(r, types.UDP, 20000) && !has(r, types.TCP, 20000) && !has(r, types.UDP, 20001))
	r.leave(p, nil)
	assert.Check(t, isReserved(p))
	r.leave(p, nil)
	assert.Check(t, !isReserved(p))
	assert.Check(t, !has(r, types.UDP, 20000))

	_, p = reserve(t, r, 20000, 1)
	r = newReservations() // As of the zero PortMapper, which remembers nothing.
	r.leave(p, nil)
	assert.Check(t, !isReserved(p))
}

func TestReservationLastsUntilCallsAreSettled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReservations()
		req, p := reserve(t, r, 20001, 3)
		first, second := make(chan struct{}), make(chan struct{})
		r.leave(p, &unsettled{settled: first})
		r.leave(p, &unsettled{settled: second})
		r.leave(p, nil)
		close(second)
		synctest.Wait()
		assert.Check(t, isReserved(p))
		waited := make(chan time.Duration)
		go func() { waited <- took(func() { r.wait(context.Background(), req) }) }()
		time.Sleep(time.Second)
		close(first)
		assert.Check(t, is.Equal(<-waited, time.Second))
		assert.Check(t, !isReserved(p))
		synctest.Wait()
		assert.Check(t, is.Equal(len(r.parts)+len(r.late), 0))
	})
}

func TestReservationOfWhatWillNeverBeKnown(t *testing.T) {
	r := newReservations()
	_, p := reserve(t, r, 20002, 1)
	r.leave(p, &unsettled{})
	assert.Check(t, isReserved(p))
	r.leave(p, nil)
	assert.Check(t, !isReserved(p))
}

// A port is waited for in vain once, until a call is settled.
func TestWaitInVainOnceASilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReservations()
		wait := func(ctx context.Context, req *request) time.Duration {
			return took(func() { r.wait(ctx, req) })
		}
		ctx := t.Context()
		req, p := reserve(t, r, 20003, 2)
		assert.Check(t, is.Equal(wait(ctx, req), time.Duration(0)), "it is had, but nothing is unsettled")
		first, second := make(chan struct{}), make(chan struct{})
		r.leave(p, &unsettled{settled: first})
		other, q := reserve(t, r, 20004, 1)
		r.leave(q, &unsettled{settled: second})

		cancelled, cancel := context.WithTimeout(ctx, time.Second)
		assert.Check(t, is.Equal(wait(cancelled, req), time.Second))
		cancel()
		assert.Check(t, is.Equal(wait(ctx, req), patience), "a caller that gives up has not waited in vain")
		assert.Check(t, is.Equal(wait(ctx, req), time.Duration(0)))
		assert.Check(t, is.Equal(wait(ctx, other), time.Duration(0)))
		close(second)
		synctest.Wait()
		assert.Check(t, is.Equal(wait(ctx, req), patience))
		close(first)
		synctest.Wait()
		assert.Check(t, is.Equal(wait(ctx, req), time.Duration(0)))
		assert.Check(t, isReserved(p) && !isReserved(q))
		r.leave(p, nil)
		assert.Check(t, !isReserved(p))
	})
}
