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
	// patience is how long RootlessKit may take for an answer. The bridge driver calls MapPorts, and mostly
	// UnmapPorts, with its configNetwork lock held: meanwhile, none of the daemon's containers starts, stops
	// or joins a network.
	patience = 10 * time.Second
	// allowance is what calls may wait for a silent RootlessKit, all together, in each allowancePeriod.
	allowance       = 100 * time.Millisecond
	allowancePeriod = time.Second
	// minWait is what must be left of it for a call that is not needed: less is no wait for an answer.
	minWait = time.Millisecond
)

// removalRetries is how long to wait each time before another try of a removal that was answered with an
// error.
var removalRetries = [...]time.Duration{100 * time.Millisecond, time.Second, 5 * time.Second}

// silence is a driver round another, which is not waited for without bounds. Calls that wait at once share a
// deadline: patience after the first of them began, or after the last answer. Once it passes, RootlessKit is
// silent until any call returns. What was given up is seen through behind, and undone.
type silence struct {
	PortDriverClient

	mu      sync.Mutex
	waiting int       // waiting is the number of calls that are waited for.
	since   time.Time // since is when the first of those began, or the last answer came.
	silent  bool
	full    time.Time // full is when the allowance is whole again.
}

// AddPort returns an *unsettled error if it gave up. That is settled once the answer came and what was
// exposed is gone.
func (s *silence) AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, hostPort int) (func() error, error) {
	e := &exposed{silence: s, ctx: ctx, at: netip.AddrPortFrom(hostIP, uint16(hostPort)), proto: proto, child: childIP}
	err := e.wait()
	if err == nil {
		return e.remove, nil
	}
	if isLost(err) {
		e.warn(err, answerLost)
	}
	return nil, err
}

const (
	answerLost = "RootlessKit's answer was lost: it may hold the host port"
	mayHold    = "RootlessKit may hold a host port: it failed to remove it"
)

// exposed is a port that RootlessKit is to expose on the host.
type exposed struct {
	*silence
	ctx     context.Context
	at      netip.AddrPort
	proto   string
	child   netip.Addr
	undo    func() error
	removed atomic.Bool // removed is set when undo is to be called.
	call    call        // call is the one that is waited for.
}

// remove undoes an AddPort. A removal that fails is tried again behind.
func (e *exposed) remove() error {
	if e.removed.Swap(true) {
		return errRemoved
	}
	err := e.wait()
	if _, gaveUp := err.(*unsettled); gaveUp {
		e.warn(err, "RootlessKit did not answer the removal of a host port: it stays reserved until the answer comes")
	} else if err != nil && isUnknownPort(err) {
		return nil
	} else if err != nil {
		go e.seeThrough(err)
		return fmt.Errorf("failed to remove host port %s/%s: %w", e.at, e.proto, err)
	}
	return err
}

// ask is the call that is next.
func (e *exposed) ask() (err error) {
	if e.removed.Load() {
		return e.undo()
	}
	e.undo, err = e.PortDriverClient.AddPort(e.ctx, e.proto, e.at.Addr(), e.child, int(e.at.Port()))
	return err
}

// seeThrough has nothing left on the host after ask's answer, which nobody waits for any more.
func (e *exposed) seeThrough(err error) {
	adding := !e.removed.Load()
	switch {
	case adding && err != nil && isLost(err):
		e.warn(err, answerLost)
		return
	case adding && err == nil:
		err = e.retry(e.undo())
	case adding: // It was refused.
		err = nil
	default:
		err = e.retry(err)
	}
	if err != nil {
		e.warn(err, mayHold)
	} else if adding {
		e.warn(nil, "RootlessKit answered a port request after it was given up: undone")
	}
}

// retry tries a removal that failed with err again. It takes seconds.
func (e *exposed) retry(err error) error {
	for _, wait := range removalRetries {
		if err == nil || isUnknownPort(err) {
			return nil
		}
		time.Sleep(wait)
		err = e.undo()
	}
	return err
}

func (e *exposed) warn(err error, message string) {
	log.G(e.ctx).WithFields(log.Fields{"hostIP": e.at.Addr(), "port": e.at.Port(), "proto": e.proto, "error": err}).Warn(message)
}

// wait asks on another thread, and waits for the answer. If it gives up, it returns an *unsettled. The thread
// also makes asking cheaper: the caller's is locked in the child namespace. While RootlessKit is silent, only
// a removal is sent once there is no time to wait for it.
func (e *exposed) wait() error {
	start := time.Now()
	left, ok := e.begin(start, e.removed.Load())
	if !ok {
		return fmt.Errorf("%w to others: not asked", errNoAnswer)
	}
	c := &e.call
	*c = call{answer: make(chan error)}
	go func() {
		err := e.ask()
		if e.end(c) {
			c.answer <- err
			return
		}
		e.seeThrough(err)
		close(c.settled)
	}()
	for timer := time.NewTimer(left); ; timer.Reset(left) {
		select {
		case err := <-c.answer:
			timer.Stop()
			return err
		case <-timer.C:
		}
		if left = e.giveUp(c); left == 0 {
			return &unsettled{fmt.Errorf("%w (%s)", errNoAnswer, time.Since(start).Round(time.Millisecond)), c.settled}
		}
	}
}

// call is one call of a driver.
type call struct {
	answer   chan error
	answered bool          // answered is set when the answer is about to be sent.
	settled  chan struct{} // settled is made when it is given up.
}

// begin takes note of a call, unless it isn't to be made, and returns how long it may be waited for. What a
// silence allows is spent with that.
func (s *silence) begin(now time.Time, needed bool) (wait time.Duration, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.silent {
		wait = allowance - max(s.full.Sub(now), 0)/time.Duration(allowancePeriod/allowance)
		if wait < minWait && !needed {
			return 0, false
		}
		if wait > 0 {
			s.full = now.Add(allowancePeriod)
		}
	}
	if s.waiting++; s.waiting == 1 && !s.silent {
		s.since = now
	}
	if !s.silent {
		wait = s.since.Add(patience).Sub(now)
	}
	return wait, true
}

// end takes note of an answer, and tells whether it is waited for.
func (s *silence) end(c *call) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.since, s.silent = time.Now(), false
	if c.settled != nil {
		return false
	}
	c.answered = true
	s.waiting--
	return true
}

// giveUp takes note of the end of a wait, unless an answer came meanwhile, to this call or another one. Then
// it returns how long to wait on.
func (s *silence) giveUp(c *call) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	left := time.Until(s.since.Add(patience))
	if c.answered || left > 0 {
		return max(left, 1)
	}
	if !s.silent {
		s.silent, s.full = true, time.Time{}
	}
	c.settled = make(chan struct{})
	s.waiting--
	return 0
}
