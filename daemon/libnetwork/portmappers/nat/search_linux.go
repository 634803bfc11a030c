package nat

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/log"
)

const (
	// searchTime is how long a search tries. The daemon's lock is held meanwhile.
	searchTime = 2 * time.Second
	// maxUnclear is how many refusals that do not say why are put up with.
	maxUnclear = 64
	// maxUnbound is how many ports may fail to bind in the child. Nothing paces those, and for each the allocator
	// writes a line to the log and the kernel frees a socket filter, some thousand of which at once are too much
	// for Linux 6.18. So many find one free port in a hundred but for once in 23,000 times.
	maxUnbound = 1000
	// allocatorTries is how many ports OSAllocator.RequestPortsInRange tries to bind in a range before it
	// returns an error (its maxAllocateAttempts).
	allocatorTries = 10
)

// source is where a search has its ports from, each of them once.
type source interface {
	// next returns what to ask the allocator for, or false if there is no more.
	next() (first, last int, ok bool)
	// refused takes note that n ports of the last next can't be had, or all of them if n < 0. port is the one
	// that the port driver refused, 0 if it was not the driver.
	refused(n, port int)
	// seen returns the range that is gone through, the number of ports that were tried, and why the last one
	// can't be had that was passed without a try, if any.
	seen() (first, last, tried int, taken error)
}

// search goes through the ports of a source, once, until one can be published.
type search struct {
	req    *request
	driver PortDriverClient // nil: nobody is asked.
	leases *reservations
	ports  source
	view   look // Without addresses: the host can't be seen.

	tries    int
	unclears int
	unbound  int
	last     error // last is the last refusal, of those that are not this daemon's own if any.
	others   bool  // others is set when last isn't its own.
	held     []*attempt
}

// run returns the attempt that succeeded, or why there is none. What was refused stays reserved until then,
// so as not to be had again.
func (s *search) run(ctx context.Context) (*attempt, *failure) {
	defer func() {
		for _, a := range s.held {
			a.letGo()
		}
	}()
	for start := time.Now(); ; {
		first, last, ok := s.ports.next()
		switch {
		case !ok && s.req.fixed():
			return nil, s.failure("", nil)
		case !ok:
			return nil, s.failure("and none can be had", nil)
		}
		a, err := try(ctx, s.req, s.driver, s.leases, first, last)
		if s.tries++; err == nil {
			if s.tries > 1 {
				log.G(ctx).WithFields(log.Fields{
					"port": a.port, "proto": s.req.proto.String(), "hostAddrs": s.req.on(), "attempts": s.tries,
					"duration": time.Since(start).Round(time.Microsecond), "lastRefusal": s.last,
				}).Info("Published a host port after refusals of others")
			}
			return a, nil
		}
		verdict := s.refused(a, err, first == last)
		if l := log.G(ctx); l.Logger.IsLevelEnabled(log.DebugLevel) { // Fields are not for nothing.
			l.WithFields(log.Fields{"attempt": s.tries, "verdict": verdict, "error": err}).Debug("Host port refused")
		}
		switch {
		case ctx.Err() != nil:
			return nil, s.failure("then its caller gave up", ctx.Err())
		case verdict == no:
			return nil, s.failure("", err)
		case s.unbound >= maxUnbound:
			return nil, s.failure(fmt.Sprintf("%d did not bind in the child", s.unbound), nil)
		case s.unclears == maxUnclear:
			return nil, s.failure(fmt.Sprintf("%d refusals do not say why", s.unclears), err)
		case !s.req.fixed() && time.Since(start) >= searchTime:
			return nil, s.failure(fmt.Sprintf("none was had in %s", searchTime), nil)
		}
	}
}

// refused takes note of a refusal, of one port or of the next ones of a range. Where the driver doesn't say
// why, and the host can be seen, the kernel says.
func (s *search) refused(a *attempt, err error, one bool) verdict {
	n, port := 1, 0
	if a != nil {
		port = a.port
		s.held = append(s.held, a)
	} else if strings.Contains(err.Error(), textAllAllocated) {
		n = -1
	} else if !one {
		n = allocatorTries
	}
	s.ports.refused(n, port)

	limit := s.limit()
	c := causeOf(err, limit)
	if r := (*hostRefusal)(nil); s.view.addrs != nil && c == unclear && errors.As(err, &r) {
		onHost(func() {
			if seen := s.view.refusal(r.host, r.port); seen != nil {
				r.err = fmt.Errorf("%w: %w", r.err, seen)
				c = causeOf(err, limit)
			}
		})
	}
	if c == unclear {
		s.unclears++
	}
	if a == nil && c != ours { // This daemon's own ports cost no socket.
		s.unbound += n
	}
	if s.last == nil || c != ours {
		s.last, s.others = err, c != ours
	}
	return c.verdict()
}

// limit returns the host's first port that takes no privilege, or 0 if it can't be seen.
func (s *search) limit() int {
	if s.view.addrs == nil {
		return 0
	}
	return hostUnprivileged()
}

// failure tells how the search ended. Without a cause, it's the last refusal that is not this daemon's own.
func (s *search) failure(how string, cause error) *failure {
	first, last, tried, taken := s.ports.seen()
	switch {
	case cause != nil:
	case taken != nil && !s.others:
		cause = taken
	case s.last != nil:
		cause = s.last
	default:
		cause = errors.New("all of them are reserved (net.ipv4.ip_local_reserved_ports)")
	}
	return &failure{req: s.req, how: how, last: cause, tried: tried, first: first, end: last}
}
