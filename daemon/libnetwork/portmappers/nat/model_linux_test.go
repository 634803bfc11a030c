package nat

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/log"
	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
)

var (
	modelSeed  = flag.Int("model.seed", 0, "the one seed that TestRandomOperations is to run")
	modelSeeds = flag.Int("model.seeds", 2000, "how many seeds TestRandomOperations is to run")
)

// Callers map and unmap ports while RootlessKit hangs, is late, loses answers
// and refuses. After each step the child ports that are reserved are those of
// live bindings and of unsettled calls; at the end nothing is left.
func TestRandomOperations(t *testing.T) {
	first, last := 1, *modelSeeds
	if *modelSeed != 0 {
		first, last = *modelSeed, *modelSeed
	}
	log.L.Logger.SetOutput(io.Discard) // What the allocator has to say.
	defer log.L.Logger.SetOutput(os.Stderr)
	for seed := first; seed <= last; seed++ {
		if seed%16 == 0 {
			freeFilters() // Not all that a run binds gets to the driver, which counts.
		}
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			portallocator.Get().ReleaseAll() // A run does by itself what it does after others.
			f := newFake(t)                  // Its check that nothing is left comes last.
			synctest.Test(t, func(t *testing.T) { newModel(t, f, seed).run(30) })
			if t.Failed() {
				t.Logf("again: go test -run '^TestRandomOperations$' -model.seed %d", seed)
			}
		})
	}
}

const (
	modelCallers   = 3
	modelFirst     = 21000
	modelLast      = 21005
	modelRemovals  = 3 // How often a removal fails, at most: so often is it tried again.
	untilResumed   = time.Duration(-1)
	silenceLeeway  = time.Second // What calls may wait for a RootlessKit that is silent, in all.
	modelsLongWait = 2 * time.Minute
)

// modelHosts are what the requests of a run are for: some share a child address.
var modelHosts = [][]string{
	{"0.0.0.0"}, {"0.0.0.0", "::"}, {"192.0.2.1"}, {"192.0.2.2"}, {"192.0.2.1", "192.0.2.2"},
	{"2001:db8::1"}, {"2001:db8::1", "2001:db8::2"}, {"192.0.2.2", "::"},
}

// model is a fake driver on whose host things go wrong, and what is known of it.
type model struct {
	*fakeDriver
	t      *testing.T
	rng    *rand.Rand
	pm     PortMapper
	proto  types.Protocol
	start  time.Time
	steps  []string
	groups [][]modelBinding // What MapPorts returned, call by call.

	lock     sync.Mutex
	ops      []*modelOp
	calls    map[*modelCall]bool // The calls that are not answered yet.
	leases   []*modelLease
	fates    []fate             // Of the next calls.
	hangs    chan struct{}      // Closed when RootlessKit goes on; nil: it doesn't hang.
	answered time.Time          // When the last call was answered.
	vain     time.Time          // When a fixed port was last waited for in vain.
	lost     map[childPort]bool // Reserved for good, since an answer was lost, or (false) perhaps.
	leaked   map[mapping]bool   // On the host for good, since an answer was lost.
	ports    []int              // The ports that calls were for.
}

// modelOp is a call of MapPorts, or of UnmapPorts, that has not returned yet.
type modelOp struct {
	what      string
	start     time.Time
	fixed     int
	hosts     []string
	asked     []int
	contended bool // Another caller has had the fixed port meanwhile.
	cancel    func()
}

// modelCall is a call of the driver.
type modelCall struct {
	at     childPort
	start  time.Time
	waited bool // Somebody waits for its answer, or has.
	again  bool // It is another try of a removal.
}

// modelLease is what the host has of a successful AddPort.
type modelLease struct {
	to       mapping
	at       childPort
	live     bool // MapPorts has returned it.
	unmaps   int  // How often UnmapPorts was called for it.
	unmapped bool // UnmapPorts has returned.
	called   bool // Its removal was called.
	busy     bool // Its removal is being called.
	gone     bool // Its removal has succeeded.
	failed   int  // How often its removal has failed.
}

type modelBinding struct {
	portmapperapi.PortBinding
	lease *modelLease
}

// fate is what becomes of a call.
type fate struct {
	takes time.Duration
	after bool  // It is done at once, and the answer takes that long.
	err   error // The answer.
	done  bool  // It is done, whatever the answer.
}

func (f fate) String() string {
	takes := f.takes.String()
	if f.takes == untilResumed {
		takes = "until RootlessKit goes on"
	}
	return fmt.Sprintf("takes %s (done before: %t), done: %t, answer: %v", takes, f.after, f.err == nil || f.done, f.err)
}

type opKey struct{}

func newModel(t *testing.T, f *fakeDriver, seed int) *model {
	m := &model{
		fakeDriver: f,
		t:          t,
		rng:        rand.New(rand.NewPCG(uint64(seed), 0)),
		start:      time.Now(),
		calls:      map[*modelCall]bool{},
		lost:       map[childPort]bool{},
		leaked:     map[mapping]bool{},
	}
	f.forgets = true
	for port := modelFirst; port <= modelLast; port++ {
		m.ports = append(m.ports, port)
	}
	if m.rng.IntN(4) > 0 { // As the builtin port driver; else as slirp4netns.
		f.child4 = netip.MustParseAddr("127.0.0.1")
	}
	m.proto = []types.Protocol{types.TCP, types.UDP}[m.rng.IntN(2)]
	m.pm = NewPortMapper(Config{RlkClient: m})
	return m
}

// childAddr returns what stands in for a host address in the child namespace.
func (m *model) childAddr(host string) netip.Addr {
	return m.pm.rooms.driver.ChildHostIP(m.proto.String(), netip.MustParseAddr(host))
}

func (m *model) child(host netip.Addr, port int) childPort {
	return childPort{m.proto, netip.AddrPortFrom(host, uint16(port))}
}

func (m *model) AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, port int) (func() error, error) {
	o := ctx.Value(opKey{}).(*modelOp)
	c := &modelCall{at: m.child(childIP, port), start: time.Now(), waited: true}
	to := mapping{proto, hostIP, port}
	m.lock.Lock()
	o.asked = append(o.asked, port)
	if !slices.Contains(m.ports, port) {
		m.ports = append(m.ports, port)
	}
	m.lock.Unlock()

	var remove func() error
	done, late, err := m.carryOut(c, func(f *fate) {}, func() (err error) {
		remove, err = m.fakeDriver.AddPort(ctx, proto, hostIP, childIP, port)
		return err
	})
	m.lock.Lock()
	defer m.lock.Unlock()
	defer m.answer(c)
	if isLost(errors.Join(err)) && !hostIP.IsUnspecified() && !(childIP.Is4() && childIP.IsLoopback()) {
		m.lost[c.at] = m.lost[c.at] || !late
	}
	if done && err != nil {
		m.leaked[to] = true
	}
	if err != nil {
		return nil, err
	}
	l := &modelLease{to: to, at: c.at}
	m.leases = append(m.leases, l)
	return func() error { return m.remove(l, remove) }, nil
}

func (m *model) remove(l *modelLease, remove func() error) error {
	m.lock.Lock()
	c := &modelCall{at: l.at, start: time.Now(), waited: l.live && !l.called, again: l.called}
	if l.busy || l.gone {
		m.fail("%s:%d is removed twice", l.to.ip, l.to.port)
	}
	l.called, l.busy = true, true
	m.lock.Unlock()
	_, _, err := m.carryOut(c, func(f *fate) {
		switch {
		case l.failed == modelRemovals:
			f.err = nil
		case f.err != nil && !isLost(f.err):
			f.err = errors.New(removalPrefix + "boom")
		}
	}, remove)
	m.lock.Lock()
	defer m.lock.Unlock()
	defer m.answer(c)
	l.busy, l.gone = false, err == nil || isUnknownPort(err)
	if !l.gone {
		l.failed++
	}
	return err
}

// carryOut lets a call have its fate, which bend may change, and tells whether it
// was done, and may have been given up.
func (m *model) carryOut(c *modelCall, bend func(*fate), do func() error) (done, late bool, err error) {
	m.lock.Lock()
	m.calls[c] = true
	var f fate
	if len(m.fates) > 0 {
		f, m.fates = m.fates[0], m.fates[1:]
	}
	bend(&f)
	resumed := m.hangs
	if f.takes == untilResumed && resumed == nil {
		resumed = make(chan struct{})
		m.hangs = resumed
	}
	m.lock.Unlock()
	wait := func() {
		if resumed != nil {
			<-resumed
		}
		time.Sleep(f.takes)
	}
	if !f.after {
		wait()
	}
	if f.err == nil || f.done {
		err = do()
		done = err == nil
	}
	if f.after {
		wait()
	}
	if f.err != nil && (err == nil || isUnknownPort(err)) {
		err = f.err
	}
	return done, resumed != nil || f.takes > 0, err
}

func (m *model) answer(c *modelCall) {
	delete(m.calls, c)
	m.answered = time.Now()
}

// run takes n steps.
func (m *model) run(n int) {
	for range n {
		m.step()
		m.check()
		if m.t.Failed() {
			break
		}
	}
	m.end()
	if m.t.Failed() {
		m.t.Log(strings.Join(m.steps, "\n"))
	}
}

func (m *model) note(format string, args ...any) {
	m.steps = append(m.steps, fmt.Sprintf("%8s  ", time.Since(m.start))+fmt.Sprintf(format, args...))
}

// fail is called with the lock held, as note is.
func (m *model) fail(format string, args ...any) {
	m.note("FAILED: "+format, args...)
	m.t.Errorf(format, args...)
}

func (m *model) step() {
	m.lock.Lock()
	running, hangs, groups := slices.Clone(m.ops), m.hangs != nil, len(m.groups)
	m.lock.Unlock()
	switch n := m.rng.IntN(16); {
	case n < 5 && len(running) < modelCallers:
		m.mapPorts()
	case n < 8 && len(running) < modelCallers && groups > 0:
		m.unmapPorts()
	case n < 10:
		m.decide()
	case n < 12:
		m.hang(!hangs)
	case n == 12 && len(running) > 0:
		o := running[m.rng.IntN(len(running))]
		m.lock.Lock()
		m.note("%s: its caller gives up", o.what)
		m.lock.Unlock()
		o.cancel()
	case n == 13:
		m.mu.Lock()
		at := mapping{m.proto.String(), netip.MustParseAddr(m.hosts1()), modelFirst + m.rng.IntN(2)}
		m.others[at] = !m.others[at]
		m.mu.Unlock()
	default:
		d := []time.Duration{time.Millisecond, 150 * time.Millisecond, time.Second, 5 * time.Second, 11 * time.Second}[m.rng.IntN(5)]
		time.Sleep(d)
	}
}

// hosts1 is one of the host addresses.
func (m *model) hosts1() string {
	hosts := modelHosts[m.rng.IntN(len(modelHosts))]
	return hosts[m.rng.IntN(len(hosts))]
}

// decide chooses the fate of the next calls.
func (m *model) decide() {
	m.lock.Lock()
	defer m.lock.Unlock()
	for range 1 + m.rng.IntN(3) {
		f := fate{after: m.rng.IntN(2) == 0}
		switch m.rng.IntN(5) {
		case 0:
			f.takes = time.Duration(m.rng.IntN(15000)) * time.Millisecond
		case 1:
			f.takes = untilResumed
		}
		switch m.rng.IntN(5) {
		case 0:
			f.err = errInUse
		case 1:
			f.err = errors.New(answerPrefix + slirpShrug)
		case 2:
			f.err, f.done = errLost, m.rng.IntN(2) == 0
		}
		m.fates = append(m.fates, f)
		m.note("a call's fate: %s", f)
	}
}

func (m *model) hang(hang bool) {
	m.lock.Lock()
	defer m.lock.Unlock()
	switch {
	case hang && m.hangs == nil:
		m.note("RootlessKit hangs")
		m.hangs = make(chan struct{})
	case !hang && m.hangs != nil:
		m.note("RootlessKit goes on")
		close(m.hangs)
		m.hangs = nil
	}
}

// begin starts an operation.
func (m *model) begin(o *modelOp, f func(context.Context)) {
	ctx, _ := logged()
	ctx, cancel := context.WithCancel(context.WithValue(ctx, opKey{}, o))
	o.start, o.cancel = time.Now(), cancel
	m.lock.Lock()
	o.what = fmt.Sprintf("%d: %s", len(m.steps), o.what)
	m.note("%s: begins", o.what)
	m.ops = append(m.ops, o)
	m.lock.Unlock()
	go func() {
		defer cancel()
		f(ctx)
	}()
}

// over takes note of an operation's end, with the lock held.
func (m *model) over(o *modelOp, err error) {
	m.note("%s: ends: %v", o.what, err)
	m.checkTime(o)
	m.contend()
	m.ops = slices.DeleteFunc(m.ops, func(p *modelOp) bool { return o == p })
}

func (m *model) mapPorts() {
	o := &modelOp{hosts: modelHosts[m.rng.IntN(len(modelHosts))]}
	first, last := 0, 0
	switch m.rng.IntN(8) {
	case 0:
	case 1, 2:
		first, last = modelFirst, modelFirst+2
	default:
		first = modelFirst + m.rng.IntN(modelLast-modelFirst+1)
		last, o.fixed = first, first
	}
	o.what = fmt.Sprintf("map %d-%d on %v", first, last, o.hosts)
	m.begin(o, func(ctx context.Context) {
		pbs, err := m.pm.MapPorts(ctx, ask(m.proto, first, last, o.hosts...))
		gaveUp := ctx.Err() != nil
		m.lock.Lock()
		defer m.lock.Unlock()
		m.over(o, err)
		if err == nil {
			var group []modelBinding
			for _, pb := range pbs {
				l := m.newest(pb)
				if l == nil || l.called {
					m.fail("%s is not on the host", pb)
					return
				}
				l.live = true
				group = append(group, modelBinding{pb, l})
				if pb.HostPort != pbs[0].HostPort || first != 0 && (int(pb.HostPort) < first || int(pb.HostPort) > last) {
					m.fail("%s is not what was asked for", pb)
				}
			}
			m.groups = append(m.groups, group)
			return
		}
		// A fixed port of nobody else's is waited for.
		if o.fixed != 0 && strings.Contains(err.Error(), "already allocated") && !gaveUp && !o.contended {
			switch {
			case time.Since(o.start) >= patience:
				m.vain = time.Now()
			case m.vain.IsZero() || m.vain.Before(m.answered):
				m.fail("%s: its own removal was not waited for: %v", o.what, err)
			}
		}
	})
}

// newest returns the lease that a binding has been made of.
func (m *model) newest(pb portmapperapi.PortBinding) *modelLease {
	for _, l := range slices.Backward(m.leases) {
		if l.to.ip == addr(pb.HostIP) && l.to.port == int(pb.HostPort) {
			return l
		}
	}
	return nil
}

func (m *model) unmapPorts() {
	m.lock.Lock()
	i := m.rng.IntN(len(m.groups))
	bs := m.groups[i]
	if len(bs) > 1 && m.rng.IntN(2) == 0 {
		n := m.rng.IntN(len(bs))
		bs = bs[n : n+1]
	}
	if m.rng.IntN(8) > 0 { // Else it is unmapped again later.
		m.groups[i] = slices.DeleteFunc(slices.Clone(m.groups[i]), func(b modelBinding) bool {
			return slices.ContainsFunc(bs, func(o modelBinding) bool { return o.lease == b.lease })
		})
		if len(m.groups[i]) == 0 {
			m.groups = slices.Delete(m.groups, i, i+1)
		}
	}
	m.lock.Unlock()
	m.unmap(bs)
}

func (m *model) unmap(bs []modelBinding) {
	o := &modelOp{what: "unmap"}
	fresh := true
	var pbs []portmapperapi.PortBinding
	m.lock.Lock()
	for _, b := range bs {
		pbs, o.asked = append(pbs, b.PortBinding), append(o.asked, b.lease.to.port)
		b.lease.unmaps++
		o.what += fmt.Sprintf(" %s:%d", b.lease.to.ip, b.lease.to.port)
	}
	m.lock.Unlock()
	m.begin(o, func(ctx context.Context) {
		err := m.pm.UnmapPorts(ctx, pbs)
		m.lock.Lock()
		defer m.lock.Unlock()
		m.over(o, err)
		for _, b := range bs {
			fresh, b.lease.unmapped = fresh && b.lease.unmaps == 1 && b.lease.failed == 0, true
		}
		if fresh && err != nil {
			m.fail("%s: %v", o.what, err)
		}
	})
}

// check sees that what is reserved is what somebody needs, and that nobody waits
// for longer than is right.
func (m *model) check() {
	synctest.Wait()
	m.lock.Lock()
	defer m.lock.Unlock()
	needed, maybe := map[childPort]string{}, map[childPort]bool{}
	for _, l := range m.leases {
		if l.unmapped && !l.called {
			m.fail("%s:%d was not removed", l.to.ip, l.to.port)
		}
		if l.live && !l.called {
			needed[l.at] = fmt.Sprintf("the binding at %s:%d", l.to.ip, l.to.port)
			if !m.onHost(l.to) {
				m.fail("%s:%d is not on the host", l.to.ip, l.to.port)
			}
		}
		if l.failed > 0 && !l.gone {
			maybe[l.at] = true // If it was given up, until it is tried again.
		}
	}
	for c := range m.calls {
		if maybe[c.at] = true; !c.again {
			needed[c.at] = "a call that is not settled"
		}
	}
	for at, sure := range m.lost {
		if maybe[at] = true; sure {
			needed[at] = "an answer that was lost"
		}
	}
	for _, o := range m.ops {
		for _, port := range o.asked {
			for _, host := range o.hosts {
				needed[m.child(m.childAddr(host), port)] = o.what
			}
		}
		m.checkTime(o)
	}
	var children []netip.Addr
	for _, hosts := range modelHosts {
		for _, host := range hosts {
			children = append(children, m.childAddr(host))
		}
	}
	slices.SortFunc(children, netip.Addr.Compare)
	for _, child := range slices.Compact(children) {
		for _, port := range m.ports {
			at := m.child(child, port)
			_, err := portallocator.Get().RequestPort(child.AsSlice(), m.proto.String(), port)
			if err == nil {
				portallocator.Get().ReleasePort(child.AsSlice(), m.proto.String(), port)
			}
			switch why := needed[at]; {
			case err == nil && why != "":
				m.fail("%s is not reserved, and needed by %s", at.at, why)
			case err != nil && why == "" && !maybe[at]:
				m.fail("%s is reserved, and nobody needs it", at.at)
			}
		}
	}
	m.contend()
}

func (m *model) onHost(to mapping) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.exposed[to]
	return ok
}

// contend takes note of who has a port that another caller asks for.
func (m *model) contend() {
	for _, o := range m.ops {
		if o.fixed == 0 {
			continue
		}
		for _, l := range m.leases {
			o.contended = o.contended || l.live && !l.called && int(l.at.at.Port()) == o.fixed
		}
		for at := range m.lost {
			o.contended = o.contended || int(at.at.Port()) == o.fixed
		}
		for _, other := range m.ops {
			o.contended = o.contended || other != o && (slices.Contains(other.asked, o.fixed) || other.fixed == o.fixed)
		}
	}
}

// checkTime sees that a silence is not waited for too long: until a call that
// began since the last answer is old, and then hardly at all.
func (m *model) checkTime(o *modelOp) {
	since, limit := o.start, silenceLeeway
	if m.answered.After(since) {
		since = m.answered
	}
	if o.fixed != 0 {
		limit += patience
	}
	old := since.Add(patience)
	for c := range m.calls {
		if t := c.start.Add(patience); c.waited && !c.start.Before(m.answered) && t.Before(old) {
			old = t
		}
	}
	if old.Before(o.start) {
		old = o.start
	}
	if time.Since(old) > limit {
		m.fail("%s: waits for %s, and %s after it is known that nobody answers", o.what, time.Since(o.start), time.Since(old))
	}
}

// end lets all that is late come, unmaps what is mapped, and sees that nothing
// is left.
func (m *model) end() {
	m.lock.Lock()
	m.fates = nil
	m.lock.Unlock()
	m.hang(false)
	time.Sleep(modelsLongWait)
	if !m.t.Failed() {
		m.check()
	}
	m.lock.Lock()
	groups := m.groups
	m.groups = nil
	m.lock.Unlock()
	for _, bs := range groups {
		m.unmap(bs)
	}
	time.Sleep(modelsLongWait)
	synctest.Wait()
	m.lock.Lock()
	for _, o := range m.ops {
		m.fail("%s: it never ended", o.what)
	}
	m.lock.Unlock()
	if !m.t.Failed() {
		m.check()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for to := range m.leaked {
		delete(m.exposed, to)
	}
	for at := range m.lost {
		portallocator.Get().ReleasePort(at.at.Addr().AsSlice(), m.proto.String(), int(at.at.Port()))
	}
}
