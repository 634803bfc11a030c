package nat

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
)

const (
	// searchLimit is how long a search may take. The bridge driver calls
	// MapPorts with its configNetwork lock held: meanwhile, none of the
	// daemon's containers starts, stops or joins a network.
	searchLimit = 10 * time.Second
	// lastCall is how long before its end a search asks for the last time: who
	// has not answered by then has had some time for it.
	lastCall = time.Second
	// restLimit is how long to wait, in all, for a port to come free once
	// each port of the range was refused.
	restLimit = time.Second
	// firstRest is about how long the first of those waits is. They double.
	firstRest = 20 * time.Millisecond
	// inOrder is how many ports of the dynamic range are tried one after the
	// other, as people know it, before the search jumps: taken ports often
	// come in blocks.
	inOrder = 8
	// maxUnsure is how many refusals that do not say why are put up with.
	maxUnsure = 64
	// allocatorTries is how many ports OSAllocator.RequestPortsInRange tries to
	// bind in a range before it returns an error (its maxAllocateAttempts).
	allocatorTries = 10
)

var tooLong = fmt.Sprintf("none was had in %s", searchLimit)

// search decides which port is tried next, and when to stop. Its caller asks
// the allocator for a port in [begin, last] after each next that returns true,
// then tells what became of it.
type search struct {
	ctx   context.Context
	reqs  []portmapperapi.PortBindingReq
	addrs []net.IP // addrs has the child addresses of reqs, without duplicates.
	proto types.Protocol
	start time.Time
	limit *time.Timer // limit fires at the end of searchLimit.
	view  *hostView   // view is nil when the host can't be seen.

	// begin and last are the range to ask the allocator for; it gives out the
	// ports of one range in order. A range of one is a port of the search's
	// own choice: the allocator remembers each range it is asked for, but
	// nothing of a single port.
	begin, last int

	err         error // err is why the search ended, if it failed.
	lastRefusal error
	attempts    int  // attempts is the number of ports tried, those tried again included.
	tried       int  // tried is the number of different ports tried.
	unsure      int  // unsure is the number of refusals with the verdict maybe.
	jumps       int  // jumps is how often the view was made to look elsewhere.
	kept        bool // kept is set when the last attempt's port stays reserved.

	// The rest is about the current pass over the range.
	passed    int           // passed is the number of ports tried.
	shuffled  []int         // shuffled has the ports yet to be tried, once inOrder were.
	exhausted bool          // exhausted is set when there are no more.
	mayClear  bool          // mayClear is set when a refused port may come free.
	held      []heldPort    // held has the refused ports.
	rest      time.Duration // rest is about how long to wait before the next pass.
	restUntil time.Time     // restUntil is when restLimit is over.
}

// heldPort is a refused port. It stays reserved, so that it isn't handed out
// to this search or another one again.
type heldPort struct {
	port    int
	verdict verdict
}

// newSearch starts a search for a port that serves all of reqs, which differ
// only in their addresses. view is nil if the host can't be seen.
func newSearch(ctx context.Context, reqs []portmapperapi.PortBindingReq, view *hostView) search {
	s := search{
		ctx:   ctx,
		reqs:  reqs,
		addrs: make([]net.IP, 0, len(reqs)),
		proto: reqs[0].Proto,
		start: time.Now(),
		limit: time.NewTimer(searchLimit),
		view:  view,
		rest:  firstRest,
	}
	for _, req := range reqs {
		if !slices.ContainsFunc(s.addrs, req.ChildHostIP.Equal) {
			s.addrs = append(s.addrs, req.ChildHostIP)
		}
	}
	return s
}

// next sets begin and last to what is to be tried next, or returns false if
// the search is over: s.err says why.
func (s *search) next() bool {
	for s.err == nil {
		switch {
		case s.ctx.Err() != nil:
			s.err = s.failure("the request was given up by its caller", s.ctx.Err())
		case time.Since(s.start) >= searchLimit-lastCall:
			s.err = s.failure(tooLong, s.lastRefusal)
		case s.choose():
			return true
		case s.err == nil:
			s.passAgain()
		}
	}
	return false
}

// choose picks the next port, or range, of this pass. It returns false if
// there are none left.
func (s *search) choose() bool {
	first, end := s.portRange()
	switch {
	case s.exhausted:
		return false
	case s.view != nil && (!s.fixed() || s.view.implicit):
		return s.chooseFree()
	case !s.dynamic() || s.passed < inOrder:
		s.begin, s.last = int(s.reqs[0].HostPort), int(s.reqs[0].HostPortEnd)
		return s.passed == 0 || s.passed <= end-first // The allocator tells of an invalid range.
	case s.shuffled == nil:
		s.shuffled = make([]int, 0, end-first+1)
		for _, i := range rand.Perm(end - first + 1) {
			if !slices.ContainsFunc(s.held, func(h heldPort) bool { return h.port == first+i }) {
				s.shuffled = append(s.shuffled, first+i)
			}
		}
	}
	if len(s.shuffled) == 0 {
		return false
	}
	s.begin, s.last = s.shuffled[0], s.shuffled[0]
	s.shuffled = s.shuffled[1:]
	return true
}

// chooseFree is choose where the host can be seen: it picks a port that is free
// there.
func (s *search) chooseFree() bool {
	if s.dynamic() && s.attempts >= (s.jumps+1)*inOrder {
		// The port driver knows more of the host than can be seen.
		s.jumps++
		s.view.jump()
	}
	port, passed, err := s.view.free()
	if r := (*hostRefusal)(nil); errors.As(err, &r) {
		s.err = s.failure("", err)
		return false
	}
	if err != nil {
		log.G(s.ctx).WithFields(log.Fields{"error": err}).Debug("Cannot look at the host's ports")
		s.view = nil
		return s.choose()
	}
	s.passed += passed
	s.tried = max(s.tried, min(s.passed, s.view.count()))
	if port != 0 {
		s.begin, s.last = port, port
		return true
	}
	if s.fixed() {
		s.err = s.failure("", s.view.refusal())
		return false
	}
	s.exhausted = true
	others := s.view.taken && s.othersHold()
	s.mayClear = s.mayClear || others
	if s.lastRefusal == nil {
		s.lastRefusal = s.view.refusal()
		if s.view.taken && !others {
			s.lastRefusal = errAllAllocated
		}
	}
	return false
}

// othersHold tells whether another process holds a port of the range: one that
// is dynamic, and that this daemon does not have on any address.
func (s *search) othersHold() bool {
	first, last := s.portRange()
	for port := first; port <= last; port++ {
		if !s.view.reserved.has(port) && isUnallocated(s.proto, port) {
			return true
		}
	}
	return false
}

// isUnallocated tells whether this daemon has port on none of its addresses.
func isUnallocated(proto types.Protocol, port int) bool {
	// The allocator gives a port on these only if it has given it on no other.
	wildcards := []net.IP{net.IPv4zero, net.IPv6zero}
	_, err := portallocator.Get().RequestPortsInRange(wildcards, proto.String(), port, port)
	if err == nil {
		portallocator.NewOSAllocator().ReleasePorts(wildcards, proto, port)
	}
	return err == nil
}

// passAgain waits a little and starts another pass over the range, if that can
// help: if another process holds a port of it, and the time for it is not over.
func (s *search) passAgain() {
	if s.restUntil.IsZero() {
		s.restUntil = time.Now().Add(restLimit)
	}
	left := time.Until(s.restUntil)
	if !s.mayClear || left <= 0 {
		s.err = s.failure(fmt.Sprintf("%d tried, and none can be had", s.tried), s.lastRefusal)
		return
	}
	s.release(func(h heldPort) bool { return h.verdict.mayClear() })
	s.passed, s.shuffled, s.exhausted, s.mayClear = 0, nil, false, false
	if s.view != nil {
		s.view.restart()
	}

	jittered := s.rest/2 + rand.N(s.rest)
	s.rest *= 2
	select {
	case <-time.After(min(jittered, left)):
	case <-s.ctx.Done():
	case <-s.limit.C:
	}
}

// refusedInChild takes note of the allocator's error: no port of [begin, last]
// could be reserved and bound in the child namespace.
func (s *search) refusedInChild(err error) {
	aRange := s.begin != s.last || s.begin == 0
	switch {
	case isExhausted(err), isAllocated(err) && !s.fixed():
		// Not a refusal: the ports left are this daemon's own.
		s.exhausted = aRange
		if s.lastRefusal == nil {
			s.lastRefusal = err
		}
		return
	case aRange:
		s.passed += allocatorTries - 1
	}
	s.refused(childVerdict(err), &childRefusal{err})
}

// refusedOnHost takes note of the port driver's error for a's port, which is
// still reserved.
func (s *search) refusedOnHost(a *attempt, err error) {
	if errors.Is(err, errNoAnswer) {
		// Its reservation is no longer this search's.
		if s.lastRefusal != nil {
			err = fmt.Errorf("%w, and then %w", s.lastRefusal, err)
		}
		s.err = s.failure(tooLong, err)
		return
	}
	v := driverVerdict(err)
	if r := (*hostRefusal)(nil); v == maybe && s.view != nil && errors.As(err, &r) {
		// The kernel knows what the port driver doesn't say.
		if seen := s.view.look(r.hostIP, a.port); seen != nil {
			err = fmt.Errorf("%w: %w", err, seen)
			v = driverVerdict(err)
		}
	}
	if s.kept = a.kept; !s.kept {
		s.held = append(s.held, heldPort{a.port, v})
	}
	s.refused(v, err)
}

// refused takes note of a refusal, and ends the search if no other port would
// help or is wanted.
func (s *search) refused(v verdict, err error) {
	first, end := s.portRange()
	s.attempts++
	s.passed++
	s.tried = max(s.tried, min(s.passed, end-first+1))
	s.lastRefusal = err
	s.mayClear = s.mayClear || v.mayClear()
	if v == maybe {
		s.unsure++
	}
	log.G(s.ctx).WithFields(log.Fields{"attempt": s.attempts, "verdict": v, "error": err}).Debug("Host port refused")

	switch {
	case s.ctx.Err() != nil: // For next to tell.
	case v == no, s.fixed():
		s.err = s.failure("", err)
	case s.unsure == maxUnsure:
		s.err = s.failure(fmt.Sprintf("%d refusals do not say why", s.unsure), err)
	}
}

// published takes note of success.
func (s *search) published(a *attempt) {
	if s.view != nil && s.dynamic() {
		hostCursor.Store(int32(a.port))
	}
	for _, pb := range a.bindings {
		if pb.BoundSocket == nil {
			sharedPorts.join(pb)
		}
	}
	if s.view != nil && s.view.implicit {
		ownPorts.add(s.proto, a.port, len(a.bindings))
		s.view.keepForPasta(a.port)
	}
	if s.attempts == 0 {
		return
	}
	log.G(s.ctx).WithFields(log.Fields{
		"port":        a.port,
		"proto":       s.proto,
		"hostAddrs":   hostAddrs(s.reqs),
		"attempts":    s.attempts + 1,
		"duration":    time.Since(s.start).Round(time.Microsecond),
		"lastRefusal": s.lastRefusal,
	}).Info("Published a host port after refusals of others")
}

// end releases what the search holds, after the last next.
func (s *search) end() {
	s.limit.Stop()
	s.release(func(heldPort) bool { return true })
}

// release ends the reservations of the held ports that it is to.
func (s *search) release(isTo func(heldPort) bool) {
	s.held = slices.DeleteFunc(s.held, func(h heldPort) bool {
		if !isTo(h) {
			return false
		}
		portallocator.NewOSAllocator().ReleasePorts(s.addrs, s.proto, h.port)
		return true
	})
}

// fixed tells whether one host port was asked for.
func (s *search) fixed() bool {
	return !s.dynamic() && s.reqs[0].HostPort == s.reqs[0].HostPortEnd
}

// dynamic tells whether any host port was asked for.
func (s *search) dynamic() bool {
	return s.reqs[0].HostPort == 0 && s.reqs[0].HostPortEnd == 0
}

// portRange returns the first and the last host port that will do. Upstream has
// GetPortRange for tests only: there's no other way to know the range that
// RequestPortsInRange takes for 0, and where in it to jump.
func (s *search) portRange() (first, last int) {
	f, l := s.reqs[0].HostPort, s.reqs[0].HostPortEnd
	switch {
	case s.view != nil:
		return s.view.first, s.view.last
	case s.dynamic():
		f, l = portallocator.GetPortRange()
	}
	return int(f), int(l)
}

// failure describes how the search ended, and what the user can do about it.
func (s *search) failure(how string, cause error) error {
	first, last := s.portRange()
	ports := fmt.Sprintf("host port %d", first)
	switch {
	case s.dynamic():
		ports = fmt.Sprintf("a dynamic host port (%d-%d)", first, last)
	case !s.fixed():
		ports = fmt.Sprintf("a host port in %d-%d", first, last)
	}
	if how != "" {
		how += ": "
	}
	if cause == nil {
		cause = errors.New("no port was refused")
	}
	who := ""
	if r := (*hostRefusal)(nil); s.fixed() && s.view != nil && errors.As(cause, &r) && driverVerdict(cause) == taken {
		s.end() // Its own reservation does not make the port this daemon's.
		if !s.kept && !isUnallocated(s.proto, r.port) {
			who = "; a container of this daemon has it on another host address"
		} else if who = s.view.holder(r.hostIP, r.port); who != "" {
			who = "; " + who + " has it"
		}
	}
	return fmt.Errorf("cannot publish container port %d/%s on %s of %s: %s%w%s%s",
		s.reqs[0].Port, s.proto, ports, hostAddrs(s.reqs), how, cause, who, advice(cause, first, s.proto))
}

// hostAddrs lists the host addresses of reqs.
func hostAddrs(reqs []portmapperapi.PortBindingReq) string {
	var addrs []string
	for _, req := range reqs {
		addr := addrOf(req.HostIP).String()
		if addrOf(req.HostIP).Is6() {
			addr = "[" + addr + "]"
		}
		if !slices.Contains(addrs, addr) {
			addrs = append(addrs, addr)
		}
	}
	return strings.Join(addrs, ", ")
}
