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
	// UnmapPorts, with its configNetwork lock held: meanwhile, no container starts, stops or joins a network.
	patience = 10 * time.Second
	// allowance is what calls may wait for a silent RootlessKit, all together, in each allowancePeriod.
	allowance       = 100 * time.Millisecond
	allowancePeriod = time.Second
	// minWait is what must be left of it for a call that is not needed: less is no wait for an answer.
	minWait = time.Millisecond

	answerLost = "RootlessKit's answer was lost: it may hold the host port"
)

// removalRetries is how long to wait before each new try of a removal that was answered with an error.
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

	news  sync.Cond   // news is for those who wait: an answer, or the alarm.
	alarm *time.Timer // alarm is one for all of them: most answers come long before.
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

// exposed is a port that RootlessKit is to expose on the host, and the call about it that is waited for.
type exposed struct {
	*silence
	ctx     context.Context
	at      netip.AddrPort
	proto   string
	child   netip.Addr
	undo    func() error
	removed atomic.Bool // removed is set when undo is to be called.

	answered bool
	answer   error
	settled  chan struct{} // settled is made when the call is given up.
}

// remove undoes an AddPort. A removal that fails is tried again behind.
func (e *exposed) remove() error {
	if e.removed.Swap(true) {
		return errRemoved
	}
	err := e.wait()
	switch _, gaveUp := err.(*unsettled); {
	case gaveUp:
		e.warn(err, "RootlessKit did not answer the removal of a host port: it stays reserved until the answer comes")
	case err != nil && isUnknownPort(err):
		return nil
	case err != nil:
		go e.seeThrough(err)
		return fmt.Errorf("failed to remove host port %s/%s: %w", e.at, e.proto, err)
	}
	return err
}

// ask makes the call that is next, for wait or, if that has given up, to the end.
func (e *exposed) ask() {
	var err error
	if e.removed.Load() {
		err = e.undo()
	} else {
		e.undo, err = e.PortDriverClient.AddPort(e.ctx, e.proto, e.at.Addr(), e.child, int(e.at.Port()))
	}
	e.mu.Lock()
	e.since, e.silent = time.Now(), false
	gaveUp := e.settled != nil
	if !gaveUp {
		e.answer, e.answered = err, true
		e.waiting--
		e.news.Broadcast()
	}
	e.mu.Unlock()
	if gaveUp {
		e.seeThrough(err)
		close(e.settled)
	}
}

// seeThrough has nothing left on the host after an answer which nobody waits for any more. It takes seconds
// if removals fail.
func (e *exposed) seeThrough(err error) {
	adding := !e.removed.Load()
	switch {
	case adding && err == nil:
		meterLateUndos.Inc()
		err = e.undo()
	case adding && isLost(err):
		e.warn(err, answerLost)
		return
	case adding: // It was refused.
		err = nil
	}
	for _, wait := range removalRetries {
		if err != nil && !isUnknownPort(err) {
			time.Sleep(wait)
			err = e.undo()
		}
	}
	if err != nil && !isUnknownPort(err) {
		e.warn(err, "RootlessKit may hold a host port: it failed to remove it")
	} else if adding {
		e.warn(nil, "RootlessKit answered a port request after it was given up: undone")
	}
}

func (e *exposed) warn(err error, message string) {
	log.G(e.ctx).WithFields(log.Fields{"hostIP": e.at.Addr(), "port": e.at.Port(), "proto": e.proto, "error": err}).Warn(message)
}

// wait asks on another thread, and waits for the answer. If it gives up, it returns an *unsettled. The thread
// also makes asking cheaper: the caller's is locked in the child namespace. While RootlessKit is silent, only
// a removal is sent once there is no time to wait for it.
func (e *exposed) wait() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	start := time.Now()
	until, ok := e.begin(start, e.removed.Load())
	if !ok {
		meterSilences.Inc()
		return fmt.Errorf("%w to others: not asked", errNoAnswer)
	}
	e.answered = false
	go e.ask()
	for !e.answered {
		now := time.Now()
		if !now.Before(until) {
			// An answer to another call gives this one more time.
			if until = e.since.Add(patience); !now.Before(until) {
				if !e.silent {
					e.silent, e.full = true, time.Time{}
				}
				e.waiting--
				e.settled = make(chan struct{})
				meterSilences.Inc()
				return &unsettled{fmt.Errorf("%w (%s)", errNoAnswer, now.Sub(start).Round(time.Millisecond)), e.settled}
			}
		}
		e.rouse(until.Sub(now))
		e.news.Wait()
	}
	return e.answer
}

// begin takes note of a call, unless it isn't to be made, and returns until when it may be waited for. What a
// silence allows is spent with that.
func (s *silence) begin(now time.Time, needed bool) (until time.Time, ok bool) {
	if !s.silent {
		if s.waiting++; s.waiting == 1 {
			s.since = now
		}
		return s.since.Add(patience), true
	}
	wait := allowance - max(s.full.Sub(now), 0)/time.Duration(allowancePeriod/allowance)
	if wait < minWait && !needed {
		return now, false
	}
	s.full = now.Add(allowancePeriod)
	s.waiting++
	return now.Add(wait), true
}

// rouse wakes those who wait after a while, to see whether their time is up. Each sets the alarm anew: they
// share a deadline, but in a silence, where one may so wait a tenth longer.
func (s *silence) rouse(after time.Duration) {
	if s.alarm != nil {
		s.alarm.Reset(after)
		return
	}
	s.news.L = &s.mu
	s.alarm = time.AfterFunc(after, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.news.Broadcast()
	})
}
