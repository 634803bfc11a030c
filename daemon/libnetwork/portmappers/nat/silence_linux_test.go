package nat

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// hanging is a fake driver that does nothing, and answers nothing, while it hangs.
type hanging struct {
	*fakeDriver

	gate sync.Mutex
	goOn chan struct{} // nil: it doesn't hang.
	sent int           // The number of calls, with removals.
}

func (h *hanging) hang() {
	h.gate.Lock()
	defer h.gate.Unlock()
	h.goOn = make(chan struct{})
}

func (h *hanging) resume() {
	h.gate.Lock()
	defer h.gate.Unlock()
	close(h.goOn)
	h.goOn = nil
}

func (h *hanging) wait() {
	h.gate.Lock()
	h.sent++
	goOn := h.goOn
	h.gate.Unlock()
	if goOn != nil {
		<-goOn
	}
}

func (h *hanging) calls() int {
	synctest.Wait() // A call that isn't waited for may be about to be sent.
	h.gate.Lock()
	defer h.gate.Unlock()
	return h.sent
}

func (h *hanging) onHost() int {
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.exposed)
}

func (h *hanging) AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, port int) (func() error, error) {
	h.wait()
	remove, err := h.fakeDriver.AddPort(ctx, proto, hostIP, childIP, port)
	if err != nil {
		return nil, err
	}
	return func() error {
		h.wait()
		return remove()
	}, nil
}

// underSilence runs f with silence round a driver that may hang.
func underSilence(t *testing.T, f func(t *testing.T, h *hanging, s *silence)) {
	fake := newFake(t)
	synctest.Test(t, func(t *testing.T) {
		h := &hanging{fakeDriver: fake}
		f(t, h, &silence{PortDriverClient: h})
	})
}

// expose asks a driver for a port of the wildcard address.
func (h *hanging) expose(d PortDriverClient, port int) (func() error, error) {
	ctx, _ := logged()
	return d.AddPort(ctx, "tcp", netip.IPv4Unspecified(), h.child4, port)
}

// took returns how long f takes, in the time of the test.
func took(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start)
}

func TestCallersShareADeadline(t *testing.T) {
	underSilence(t, func(t *testing.T, h *hanging, s *silence) {
		h.hang()
		start := time.Now()
		var wg sync.WaitGroup
		for i := range 64 {
			wg.Go(func() {
				_, err := h.expose(s, 20000+i)
				assert.Check(t, is.ErrorIs(err, errNoAnswer))
				assert.Check(t, is.Equal(time.Since(start), patience))
			})
			time.Sleep(100 * time.Millisecond)
		}
		wg.Wait()
		assert.Check(t, is.Equal(h.calls(), 64))
		h.resume()
		assert.Check(t, is.Equal(h.onHost(), 0))
		assert.Check(t, is.Equal(h.calls(), 128), "each is undone")
	})
}

func TestSilenceLastsUntilAnyAnswer(t *testing.T) {
	underSilence(t, func(t *testing.T, h *hanging, s *silence) {
		add := func(port int) time.Duration {
			return took(func() {
				_, err := h.expose(s, port)
				assert.Check(t, is.ErrorIs(err, errNoAnswer))
			})
		}
		remove, err := h.expose(s, 20000)
		assert.NilError(t, err)
		time.Sleep(time.Hour)
		h.hang()
		assert.Check(t, is.Equal(add(20001), patience))
		time.Sleep(time.Hour)
		assert.Check(t, add(20002) <= allowance, "it is silent still")
		// The answer to a call that was given up ends it.
		h.resume()
		synctest.Wait()
		assert.Check(t, is.Equal(took(func() { assert.Check(t, remove()) }), time.Duration(0)))
		time.Sleep(time.Hour)
		h.hang()
		assert.Check(t, is.Equal(add(20003), patience))
		h.resume()
	})
}

// An answer that comes while others wait in a silence has them wait anew.
func TestAnswerEndsASilenceForThoseWhoWait(t *testing.T) {
	underSilence(t, func(t *testing.T, h *hanging, s *silence) {
		h.hang()
		_, err := h.expose(s, 20000)
		assert.Check(t, is.ErrorIs(err, errNoAnswer))
		first := h.goOn
		h.hang() // From here on, others.
		start := time.Now()
		waited := make(chan time.Duration)
		go func() {
			_, err := h.expose(s, 20001)
			assert.Check(t, is.ErrorIs(err, errNoAnswer))
			waited <- time.Since(start)
		}()
		time.Sleep(allowance / 2)
		close(first)
		assert.Check(t, is.Equal(<-waited, allowance/2+patience))
		h.resume()
	})
}

// What calls wait for a RootlessKit that is silent is a tenth of the time. What
// need not be asked then is not asked.
func TestAllowance(t *testing.T) {
	underSilence(t, func(t *testing.T, h *hanging, s *silence) {
		var removals []func() error
		for port := 20000; port < 20010; port++ {
			remove, err := h.expose(s, port)
			assert.NilError(t, err)
			removals = append(removals, remove)
		}
		h.hang()
		add := func() error {
			_, err := h.expose(s, 20010)
			assert.Check(t, is.ErrorIs(err, errNoAnswer))
			return err
		}
		add()
		sent := h.calls()
		waited := make(chan time.Duration)
		go func() { waited <- took(func() { add() }) }()
		assert.Check(t, is.Equal(h.calls(), sent+1))
		// There is nothing left of it.
		assert.Check(t, is.Equal(took(func() { assert.Check(t, is.ErrorContains(add(), "not asked")) }), time.Duration(0)))
		assert.Check(t, is.Equal(h.calls(), sent+1))
		for i, remove := range removals {
			var u *unsettled
			assert.Check(t, is.Equal(took(func() { assert.Check(t, errors.As(remove(), &u)) }), time.Duration(0)))
			assert.Check(t, u.settled != nil)
			assert.Check(t, is.Equal(h.calls(), sent+2+i), "a removal is sent")
		}
		assert.Check(t, is.Equal(<-waited, allowance))
		time.Sleep(allowancePeriod/2 - allowance)
		assert.Check(t, is.Equal(took(func() { add() }), allowance/2), "half of it is there again")
		assert.Check(t, is.Equal(took(func() { add() }), allowance/20), "a tenth of what that took")
		assert.Check(t, is.ErrorContains(add(), "not asked"))
		time.Sleep(allowancePeriod/100 - allowance/20)
		assert.Check(t, is.Equal(took(func() { add() }), time.Millisecond), "less is no wait for an answer")

		var all time.Duration
		for start := time.Now(); time.Since(start) < 20*allowancePeriod; time.Sleep(allowancePeriod / 10) {
			all += took(func() { add() })
		}
		assert.Check(t, 15*allowance < all && all <= 21*allowance, all)
		h.resume()
	})
}

func TestSlowAnswersAreNoSilence(t *testing.T) {
	underSilence(t, func(t *testing.T, h *hanging, s *silence) {
		// One takes a minute, the others five seconds each.
		h.answer = func(_ int, m mapping) error {
			if m.port == 20000 {
				time.Sleep(time.Minute)
			}
			time.Sleep(5 * time.Second)
			return nil
		}
		var wg sync.WaitGroup
		for port := 20000; port < 20020; port++ {
			wg.Go(func() {
				remove, err := h.expose(s, port)
				assert.Check(t, err)
				assert.Check(t, remove())
			})
			time.Sleep(4 * time.Second)
		}
		wg.Wait()
		assert.Check(t, is.Equal(h.onHost(), 0))
	})
}

// A removal that fails after it was given up is tried again before it is settled.
func TestLateRemovalThatFails(t *testing.T) {
	underSilence(t, func(t *testing.T, h *hanging, s *silence) {
		remove, err := h.expose(s, 20000)
		assert.NilError(t, err)
		h.hang()
		var u *unsettled
		assert.Check(t, is.Equal(took(func() { assert.Check(t, errors.As(remove(), &u)) }), patience))
		assert.Check(t, is.ErrorIs(remove(), errRemoved))
		h.failRemovals = len(removalRetries)
		h.resume()
		assert.Check(t, is.Equal(h.onHost(), 1))
		retries := took(func() { <-u.settled })
		assert.Check(t, is.Equal(retries, 6100*time.Millisecond))
		assert.Check(t, is.Equal(h.onHost(), 0))
	})
}
