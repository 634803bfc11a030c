package nat

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/log"
)

const (
	// patience is how long RootlessKit may take for an answer. The bridge driver
	// calls MapPorts, and mostly UnmapPorts, with its configNetwork lock held:
	// meanwhile, none of the daemon's containers starts, stops or joins a network.
	patience = 10 * time.Second
	// allowance is what calls may wait for a silent RootlessKit, all together, in
	// each allowancePeriod.
	allowance       = 100 * time.Millisecond
	allowancePeriod = time.Second
)

// removalRetries is how long to wait each time before another try of a removal
// that was answered with an error.
var removalRetries = [...]time.Duration{100 * time.Millisecond, time.Second, 5 * time.Second}

// silence is a driver round another, which is not waited for without bounds.
// Calls that wait at once share a deadline: patience after the first of them
// began, or after the last answer. Once it passes, RootlessKit is silent until
// any call returns. What was given up is seen through behind, and undone.
type silence struct {
	PortDriverClient

	mu      sync.Mutex
	waiting int       // waiting is the number of calls that are waited for.
	since   time.Time // since is when the first of those began, or the last answer came.
	timer   *time.Timer
	over    chan struct{} // over is closed while RootlessKit is silent.
	silent  bool
	full    time.Time // full is when the allowance is whole again.
}

func newSilence(driver PortDriverClient) *silence {
	return &silence{PortDriverClient: driver, over: make(chan struct{})}
}

// AddPort returns an *unsettled error if it gave up: settled is closed when the
// answer came and what was exposed is gone.
func (s *silence) AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, hostPort int) (func() error, error) {
	r := &removal{s: s, ctx: ctx, host: netip.AddrPortFrom(hostIP, uint16(hostPort)), proto: proto}
	err := s.call(false, func() (err error) {
		r.remove, err = s.PortDriverClient.AddPort(ctx, proto, hostIP, childIP, hostPort)
		return err
	}, func(err error) {
		switch {
		case err == nil && r.settle(r.remove()) != nil: // It has said so.
		case err != nil && isLost(err):
			r.logLost(err)
		default:
			r.log(err).Warn("RootlessKit answered a port request after it was given up: undone")
		}
	})
	if err != nil {
		if isLost(err) {
			r.logLost(err)
		}
		return nil, err
	}
	return r.do, nil
}

// removal undoes an AddPort, once.
type removal struct {
	s      *silence
	ctx    context.Context
	host   netip.AddrPort
	proto  string
	remove func() error
	called atomic.Bool
}

// do removes the port. An *unsettled is logged already.
func (r *removal) do() error {
	if r.called.Swap(true) {
		return errRemoved
	}
	err := r.s.call(true, r.remove, func(err error) { r.settle(err) })
	switch _, gaveUp := err.(*unsettled); {
	case gaveUp:
		r.log(err).Warn("RootlessKit did not answer the removal of a host port: it stays reserved until the answer comes")
	case err != nil && isUnknownPort(err):
		return nil
	case err != nil:
		go r.settle(err)
		return r.failed(err)
	}
	return err
}

// settle tries a removal that failed with err again. It takes seconds.
func (r *removal) settle(err error) error {
	for _, wait := range removalRetries {
		if err == nil || isUnknownPort(err) {
			return nil
		}
		time.Sleep(wait)
		err = r.remove()
	}
	if err != nil && !isUnknownPort(err) {
		r.log(r.failed(err)).Warn("RootlessKit may hold a host port until the daemon restarts")
		return err
	}
	return nil
}

func (r *removal) failed(err error) error {
	return fmt.Errorf("failed to remove host port %s/%s: %w", r.host, r.proto, err)
}

func (r *removal) log(err error) *log.Entry {
	return log.G(r.ctx).WithFields(log.Fields{"hostIP": r.host.Addr(), "port": r.host.Port(), "proto": r.proto, "error": err})
}

func (r *removal) logLost(err error) {
	r.log(err).Warn("RootlessKit's answer was lost: it may hold the host port")
}

// call has f called on another thread, and waits for it. If it gives up, it
// returns an *unsettled, and late gets what f returns. The thread also makes f
// cheaper: its own would be locked in the child namespace. While RootlessKit is
// silent, what is not certain to be needed is not sent.
func (s *silence) call(needed bool, f func() error, late func(error)) error {
	over, limit, err := s.begin(needed)
	if err != nil {
		return err
	}
	start := time.Now()
	c := &call{answer: make(chan error, 1)}
	go func() {
		err := f()
		if s.end(c) {
			c.answer <- err
			return
		}
		late(err)
		close(c.settled)
	}()
	for {
		select {
		case err := <-c.answer:
			return err
		case <-over:
		case <-limit:
		}
		if over, limit = s.giveUp(c), nil; c.settled != nil {
			return &unsettled{
				err:     fmt.Errorf("%w (%s)", errNoAnswer, time.Since(start).Round(time.Millisecond)),
				settled: c.settled,
			}
		}
	}
}

// call is one call of a driver.
type call struct {
	answer   chan error
	answered bool
	settled  chan struct{} // settled is made when the call is given up.
}

// begin takes note of a call that is about to be made, and returns what ends
// the wait for it.
func (s *silence) begin(needed bool) (over <-chan struct{}, limit <-chan time.Time, _ error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.silent {
		const per = int64(allowancePeriod / allowance)
		if s.full.Before(now) {
			s.full = now
		}
		left := allowance - s.full.Sub(now)/time.Duration(per)
		if left <= 0 && !needed {
			return nil, nil, fmt.Errorf("%w to others: not asked", errNoAnswer)
		}
		s.full = now.Add(allowancePeriod)
		s.waiting++
		return nil, time.After(max(left, 0)), nil
	}
	if s.waiting++; s.waiting == 1 {
		s.since = now
		if s.timer == nil {
			s.timer = time.AfterFunc(patience, s.check)
		} else {
			s.timer.Reset(patience)
		}
	}
	return s.over, nil, nil
}

// check ends the waits if their deadline has passed.
func (s *silence) check() {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch left := time.Until(s.since.Add(patience)); {
	case s.waiting == 0 || s.silent:
	case left > 0:
		s.timer.Reset(left)
	default:
		s.silent, s.full = true, time.Time{}
		close(s.over)
	}
}

// end takes note of an answer, and tells whether it is waited for.
func (s *silence) end(c *call) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.since = time.Now()
	if s.silent {
		s.silent, s.over = false, make(chan struct{})
		s.timer.Reset(patience) // For those who wait already.
	}
	if c.settled != nil {
		return false
	}
	c.answered = true
	if s.waiting--; s.waiting == 0 {
		s.timer.Stop()
	}
	return true
}

// giveUp takes note of the end of a wait, unless the answer came after all, or
// others show that RootlessKit is not silent any more. Then it returns what ends
// the wait.
func (s *silence) giveUp(c *call) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !c.answered && s.silent {
		c.settled = make(chan struct{})
		s.waiting--
	}
	return s.over
}
