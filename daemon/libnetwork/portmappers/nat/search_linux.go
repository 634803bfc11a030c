package nat

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"
)

const (
	// searchTime is how long a search tries. The daemon's lock is held meanwhile.
	searchTime = 2 * time.Second
	// maxUnclear is how many refusals that do not say why are put up with.
	maxUnclear = 64
	// inOrder is how many ports of the dynamic range are tried one after the
	// other, as people know it, before the search jumps: taken ports often come
	// in blocks. It jumps sooner if they have taken inOrderTime.
	inOrder     = 8
	inOrderTime = 250 * time.Millisecond
	// allocatorTries is how many ports OSAllocator.RequestPortsInRange tries to
	// bind in a range before it returns an error (its maxAllocateAttempts).
	allocatorTries = 10
)

// source is where a search has its ports from, each of them once.
type source interface {
	// next returns what to ask the allocator for, or false if there is no more.
	next() (first, last int, ok bool)
	// refused takes note that n ports of the last next can't be had, or all of
	// them if n < 0. port is the one that the port driver refused, 0 if it was not
	// the driver.
	refused(n, port int)
	// count returns the number of ports that were tried, or seen to be taken.
	count() int
	// ports returns the range that is gone through.
	ports() (first, last int)
}

// search goes through the ports of a source, once, until one can be published.
type search struct {
	req    *request
	driver PortDriverClient // nil: nobody is asked.
	leases *reservations
	source source
	view   *look // nil: the host can't be seen.
}

// run returns the attempt that succeeded, or why there is none.
func (s *search) run(ctx context.Context) (*attempt, *failure) {
	var (
		start    = time.Now()
		f        failure
		tries    int
		unclears int
		others   bool       // f.last is not this daemon's own.
		refused  []*attempt // They stay reserved, so as not to be had again.
	)
	defer func() {
		for _, a := range refused {
			a.letGo()
		}
	}()
	fail := func(how string, cause error) (*attempt, *failure) {
		f.how, f.tried = how, s.source.count()
		if cause != nil {
			f.last = cause
		}
		return nil, &f
	}
	for {
		if err := ctx.Err(); err != nil && (s.driver != nil || tries > 0) {
			return fail("then its caller gave up", err)
		}
		if tries > 0 && time.Since(start) >= searchTime {
			return fail(fmt.Sprintf("none was had in %s", searchTime), nil)
		}
		first, last, ok := s.source.next()
		if !ok {
			if s.req.fixed() {
				return fail("", nil)
			}
			if !others {
				f.last = s.lastTaken(f.last)
			}
			return fail("and none can be had", nil)
		}
		a, err := try(ctx, s.req, s.driver, s.leases, first, last)
		if err == nil {
			if tries > 0 {
				log.G(ctx).WithFields(log.Fields{
					"port": a.port, "proto": s.req.proto.String(), "hostAddrs": s.req.on(), "attempts": tries + 1,
					"duration": time.Since(start).Round(time.Microsecond), "lastRefusal": f.last,
				}).Info("Published a host port after refusals of others")
			}
			return a, nil
		}
		tries++
		port := 0
		if a != nil {
			port = a.port
			refused = append(refused, a)
		}
		s.source.refused(portsOf(err, first == last), port)
		c := s.judge(err)
		if f.last == nil || c != ours {
			f.last, others = err, c != ours
		}
		log.G(ctx).WithFields(log.Fields{"attempt": tries, "verdict": c.verdict(), "error": err}).Debug("Host port refused")
		if c == unclear {
			unclears++
		}
		switch {
		case ctx.Err() != nil: // For the next round to tell.
		case c.verdict() == no:
			return fail("", err)
		case unclears == maxUnclear:
			return fail(fmt.Sprintf("%d refusals do not say why", unclears), err)
		}
	}
}

// judge tells what a refusal is about. Where the driver doesn't say, and the
// host can be seen, the kernel says.
func (s *search) judge(err error) cause {
	if s.view == nil {
		return causeOf(err, 0)
	}
	c := causeOf(err, 0)
	var r *hostRefusal
	if c == unclear && errors.As(err, &r) {
		var seen error
		onHost(func() { seen = s.view.refusal(r.host, r.port) })
		if seen != nil {
			r.err = fmt.Errorf("%w: %w", r.err, seen)
		}
	}
	if c == unclear || c == privileged {
		c = causeOf(err, hostUnprivileged())
	}
	return c
}

// lastTaken returns a refusal for the last port that is not this daemon's own,
// where a look has passed it, else the refusal that is known, if any.
func (s *search) lastTaken(known error) error {
	if s.source.count() == 0 && known == nil {
		return errors.New("all of them are reserved (net.ipv4.ip_local_reserved_ports)")
	}
	if s.view == nil {
		return known
	}
	own := s.leases.ports(s.req.proto)
	first, port := s.source.ports()
	onHost(func() {
		for looks := 0; port >= first && looks < maxUnclear; port-- {
			if own.has(port) {
				continue
			}
			looks++
			for _, addr := range s.view.addrs {
				if err := s.view.refusal(addr, port); err != nil {
					known = &hostRefusal{host: addr, port: port, proto: s.req.proto, err: err}
					return
				}
			}
		}
	})
	return known
}

// portsOf returns how many of the ports that the allocator was asked for an
// error is about, -1 for all.
func portsOf(err error, one bool) int {
	var child *childRefusal
	switch {
	case one || !errors.As(err, &child):
		return 1
	case strings.Contains(err.Error(), textAllAllocated):
		return -1
	}
	return allocatorTries
}

// allocatorPorts is the source of the ports in the allocator's order: of a
// user's own range to its end, of the dynamic range until it jumps.
type allocatorPorts struct {
	req         *request
	first, last int
	start       time.Time
	tried       int
	over        bool     // over is set when the allocator has no more.
	held        []uint16 // held has the ports that were refused by the driver.
	left        []uint16 // left has the ports to choose from, once it jumps.
}

func newAllocatorPorts(r *request) *allocatorPorts {
	s := &allocatorPorts{req: r, start: time.Now()}
	s.first, s.last = r.ports()
	return s
}

func (s *allocatorPorts) next() (first, last int, ok bool) {
	switch {
	case s.over, s.left == nil && s.tried > max(s.last-s.first, 0):
		return 0, 0, false
	case !s.req.dynamic(), s.tried == 0, s.left == nil && s.tried < inOrder && time.Since(s.start) < inOrderTime:
		return s.req.first, s.req.last, true
	case s.left == nil:
		s.jump()
	}
	if len(s.left) == 0 {
		return 0, 0, false
	}
	i, n := rand.N(len(s.left)), len(s.left)-1
	port := int(s.left[i])
	s.left[i], s.left = s.left[n], s.left[:n]
	return port, port, true
}

// jump collects what is left: without the ports that the kernel reserves, which
// the allocator leaves out of the range, but not one by one.
func (s *allocatorPorts) jump() {
	text, _ := os.ReadFile(reservedPorts)
	reserved, _ := parsePortSet(strings.TrimSpace(string(text)))
	s.left = make([]uint16, 0, s.last-s.first+1)
	for port := s.first; port <= s.last; port++ {
		if !reserved.has(port) && !slices.Contains(s.held, uint16(port)) {
			s.left = append(s.left, uint16(port))
		}
	}
}

func (s *allocatorPorts) refused(n, port int) {
	if s.over = n < 0; s.over {
		return
	}
	s.tried += n
	if s.left == nil && port != 0 {
		s.held = append(s.held, uint16(port))
	}
}

func (s *allocatorPorts) count() int { return min(s.tried, s.last-s.first+1) }

func (s *allocatorPorts) ports() (first, last int) { return s.first, s.last }
