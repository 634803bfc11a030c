package nat

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/log"
	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"
)

var (
	oddsStarts = flag.Int("odds.starts", 2000, "how many starts TestOdds simulates with each way to search")
	oddsSeed   = flag.Uint64("odds.seed", 1, "what TestOdds draws its hosts by")
	oddsFile   = flag.String("odds.json", "", "write what came of TestOdds to this `file`")
)

// What things cost on the simulated host, in a time of its own: `make bench` measures them on a real one.
const (
	oddsAttempt = 280 * time.Microsecond // A port is bound in the child, asked for, and let go of.
	oddsLook    = 75 * time.Microsecond  // A thread of the host is asked for a free port,
	oddsPassed  = 750 * time.Nanosecond  // and passes a taken one.

	oddsTurnover = time.Millisecond // How often a stranger lets go of a port, and another takes one.
	oddsRunning  = 30               // How many containers of its own a daemon has: the oldest ends when one starts.
	oddsRedraw   = 256              // After how many starts a host's ports are drawn anew.
)

// oddsTable is what strangers hold of the dynamic ports, and in blocks of how many. What takes long gets less
// of the starts.
var (
	oddsTaken = []struct {
		share  float64
		starts int // of 1,000
	}{{0.999, 4}, {0.99, 18}, {0.9, 100}, {0.6, 180}, {0.3, 200}, {0.1, 200}, {0, 298}}
	oddsBlocks = []int{1, 10, 100, 1000, 20_000}
)

// oddsWay is a way to search for a port.
type oddsWay struct {
	name  string
	start func(*oddsHost) *attempt
	// odds is the probability that a start fails, where there is a formula for it.
	odds func(*oddsHost) float64
	// most is the probability that it promises to stay below, elsewhere.
	most func(taken float64) float64
}

var oddsWays = []oddsWay{
	{
		name: "give up at once", start: func(h *oddsHost) *attempt { return h.inOrder(1) },
		odds: func(h *oddsHost) float64 { return h.allTaken(1) },
	},
	{
		name: "ten in a row", start: func(h *oddsHost) *attempt { return h.inOrder(10) },
		odds: func(h *oddsHost) float64 { return h.rowTaken(10) },
	},
	{
		name: "ten at random", start: func(h *oddsHost) *attempt { return h.atRandom(10) },
		odds: func(h *oddsHost) float64 { return h.allTaken(10) },
	},
	{
		name: "Berth without a view", start: func(h *oddsHost) *attempt { return h.search(false) },
		// As many tries at random as there is time for. It asks for none twice, which is no worse.
		most: func(taken float64) float64 { return math.Pow(taken, float64(searchTime/oddsAttempt)) },
	},
	{
		name: "Berth with a view", start: func(h *oddsHost) *attempt { return h.search(true) },
		most: func(float64) float64 { return 0 },
	},
}

// oddsReport is what TestOdds writes.
type oddsReport struct {
	Schema   int        `json:"schema"` // 1: the number goes up when a field's meaning changes.
	Date     time.Time  `json:"date"`
	Machine  string     `json:"machine"`
	Seed     uint64     `json:"seed"`
	Seconds  float64    `json:"seconds"` // How long all took.
	Ports    int        `json:"ports"`   // How many dynamic ports a host has.
	Attempt  float64    `json:"attemptMs"`
	Look     float64    `json:"lookMs"`
	Passed   float64    `json:"passedMs"`
	Turnover float64    `json:"turnoverMs"`
	Cells    []oddsCell `json:"cells"`
}

// oddsCell is what came of one way to search, on hosts of one kind.
type oddsCell struct {
	Way       string   `json:"way"`
	Taken     float64  `json:"taken"` // The share of the host's dynamic ports that strangers hold,
	Block     int      `json:"block"` // in blocks of so many.
	Starts    int      `json:"starts"`
	Failed    int      `json:"failed"`
	Low       float64  `json:"low"` // Wilson's 95% interval of the share that fails.
	High      float64  `json:"high"`
	Formula   *float64 `json:"formula,omitempty"` // What it should be, where there is a formula.
	CallsMean float64  `json:"callsMean"`         // AddPort calls of a start that published.
	CallsP99  int      `json:"callsP99"`
	LockMean  float64  `json:"lockMeanMs"` // How long a start, whatever came of it, had the daemon's lock.
	LockP99   float64  `json:"lockP99Ms"`

	way oddsWay
}

// The search against hosts whose ports come and go, beside what others do there: how many starts fail, and
// what they cost. All of it is real but for the sockets, RootlessKit, and the time.
func TestOdds(t *testing.T) {
	begun := time.Now()
	var cells []oddsCell
	for _, taken := range oddsTaken {
		for _, block := range oddsBlocks {
			starts := *oddsStarts * taken.starts / 1000 / len(oddsBlocks)
			if taken.share == 0 {
				starts *= len(oddsBlocks)
			}
			for _, way := range oddsWays {
				cells = append(cells, oddsCell{way: way, Way: way.name, Taken: taken.share, Block: block, Starts: max(starts, 1)})
			}
			if taken.share == 0 {
				break
			}
		}
	}
	defer portallocator.Get().ReleaseAll()
	t.Run("cells", func(t *testing.T) {
		for i := range cells {
			c := &cells[i]
			t.Run(fmt.Sprintf("%s/%g/%d", c.Way, c.Taken, c.Block), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) { c.run(t, i) })
			})
		}
	})
	first, last := portallocator.GetPortRange()
	report := oddsReport{
		Schema: 1, Date: begun.UTC().Truncate(time.Second), Seed: *oddsSeed, Ports: int(last-first) + 1, Cells: cells,
		Machine: fmt.Sprintf("%s/%s, %d processors, %s", runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), runtime.Version()),
		Attempt: milliseconds(oddsAttempt), Look: milliseconds(oddsLook), Passed: milliseconds(oddsPassed), Turnover: milliseconds(oddsTurnover),
		Seconds: time.Since(begun).Seconds(),
	}
	if *oddsFile != "" {
		data, err := json.MarshalIndent(report, "", "\t")
		assert.NilError(t, err)
		assert.NilError(t, os.WriteFile(*oddsFile, data, 0o644))
	}
	report.check(t)
}

// check holds what came out against the formulas, and against what the search promises.
func (r *oddsReport) check(t *testing.T) {
	formulas, outside := 0.0, 0.0
	for _, c := range r.Cells {
		what := fmt.Sprintf("%s, %g taken in blocks of %d: %d of %d failed", c.Way, c.Taken, c.Block, c.Failed, c.Starts)
		if c.Formula == nil {
			most := c.way.most(c.Taken)
			assert.Check(t, float64(c.Failed) <= most*float64(c.Starts) || agrees(c.Failed, c.Starts, most), "%s: %g should at most", what, most)
			continue
		}
		assert.Check(t, agrees(c.Failed, c.Starts, *c.Formula), "%s: %g should", what, *c.Formula)
		if formulas++; *c.Formula < c.Low || c.High < *c.Formula {
			outside++
		}
	}
	most := 0.05*formulas + 4*math.Sqrt(0.05*0.95*formulas)
	assert.Check(t, outside <= most, "%v of %v formulas are outside of their 95%% intervals", outside, formulas)
	t.Logf("%v of %v formulas are inside of their 95%% intervals", formulas-outside, formulas)
}

// agrees tells whether chance explains so many failures where each start fails with a probability. It does not
// see that once in 10,000 times at most, by Chernoff's bound, which holds for few starts and rare failures, too.
func agrees(failed, starts int, probability float64) bool {
	p := float64(failed) / float64(starts)
	part := func(of, by float64) float64 {
		if of == 0 {
			return 0
		}
		return of * math.Log(of/by)
	}
	return float64(starts)*(part(p, probability)+part(1-p, 1-probability)) <= math.Log(2*10_000)
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// wilson returns Wilson's score interval, z standard deviations wide to each side.
func wilson(failed, starts int, z float64) (low, high float64) {
	n := float64(starts)
	p, zz := float64(failed)/n, z*z/n
	middle, half := p+zz/2, z*math.Sqrt(p*(1-p)/n+zz/(4*n))
	// Rounding would leave out the ends.
	return max((middle-half)/(1+zz)-1e-12, 0), min((middle+half)/(1+zz)+1e-12, 1)
}

func (c *oddsCell) run(t *testing.T, i int) {
	h := newOddsHost(t, c, i)
	if c.way.odds != nil {
		odds := c.way.odds(h)
		c.Formula = &odds
	}
	var calls []int
	var locked []time.Duration
	for n := range c.Starts {
		if n%oddsRedraw == 0 {
			h.draw()
		}
		h.begin()
		begun := time.Now()
		a := c.way.start(h)
		locked = append(locked, time.Since(begun)+h.owed)
		if a == nil {
			c.Failed++
			continue
		}
		calls = append(calls, h.calls)
		if h.running = append(h.running, a); len(h.running) > oddsRunning {
			h.running[0].undo()
			h.running[0].letGo()
			h.running = h.running[1:]
		}
	}
	c.Low, c.High = wilson(c.Failed, c.Starts, 1.96)
	c.CallsMean, c.CallsP99 = meanAndP99(calls)
	mean, p99 := meanAndP99(locked)
	c.LockMean, c.LockP99 = mean/float64(time.Millisecond), milliseconds(p99)
}

func meanAndP99[T int | time.Duration](of []T) (mean float64, p99 T) {
	if len(of) == 0 {
		return 0, 0
	}
	for _, v := range of {
		mean += float64(v) / float64(len(of))
	}
	slices.SortFunc(of, cmp.Compare)
	return mean, of[(len(of)*99+99)/100-1]
}

// oddsHost is a host some of whose ports strangers hold, and a daemon on it. It is the daemon's port driver,
// its look, and its allocator's sockets.
type oddsHost struct {
	t           *testing.T
	rng         *rand.Rand
	ctx         context.Context
	first, size int
	block       int

	taken  []bool // What strangers hold, by place. A port's place is shift from it.
	blocks [][2]int
	free   []int // The places that nobody holds,
	inFree []int // and where in free each of them is.
	shift  int
	moved  time.Time // When a block has come and gone last.

	child   netip.Addr
	leases  *reservations
	cursor  atomic.Int32
	running []*attempt
	own     [65536]bool
	calls   int
	owed    time.Duration // What looks have cost since time has passed last.
}

func newOddsHost(t *testing.T, c *oddsCell, i int) *oddsHost {
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.SetLevel(logrus.ErrorLevel)
	first, last := portallocator.GetPortRange()
	h := &oddsHost{
		t: t, rng: rand.New(rand.NewPCG(*oddsSeed, uint64(i))), ctx: log.WithLogger(context.Background(), logrus.NewEntry(logger)),
		first: int(first), size: int(last-first) + 1, block: c.Block,
		child: netip.AddrFrom4([4]byte{127, 90, byte(i / 200), byte(i%200 + 2)}), leases: newReservations(),
	}
	h.leases.allocator = h
	for left := int(math.Round(c.Taken * float64(h.size))); left > 0; left -= c.Block {
		h.blocks = append(h.blocks, [2]int{0, min(c.Block, left)})
	}
	h.draw()
	return h
}

// draw puts the blocks anywhere, each way to do so as likely as any other.
func (h *oddsHost) draw() {
	h.taken, h.free, h.inFree = make([]bool, h.size), h.free[:0], make([]int, h.size)
	things := len(h.blocks) + h.size // The blocks, and the places that are free.
	for _, b := range h.blocks {
		things -= b[1]
	}
	h.rng.Shuffle(len(h.blocks), func(i, j int) { h.blocks[i], h.blocks[j] = h.blocks[j], h.blocks[i] })
	at, left := 0, len(h.blocks)
	for ; things > 0; things-- {
		if h.rng.IntN(things) < left {
			left--
			b := &h.blocks[left]
			b[0] = at
			h.hold(*b, true)
			at += b[1]
		} else {
			h.inFree[at] = len(h.free)
			h.free = append(h.free, at)
			at++
		}
	}
}

// hold marks a block's places as taken. It keeps free up to date once all are drawn.
func (h *oddsHost) hold(b [2]int, drawing bool) {
	for i := range b[1] {
		at := (b[0] + i) % h.size
		if h.taken[at] = true; drawing {
			continue
		}
		hole, end := h.inFree[at], len(h.free)-1
		h.free[hole] = h.free[end]
		h.inFree[h.free[hole]] = hole
		h.free = h.free[:end]
	}
}

// begin makes it any moment on any such host, before a start.
func (h *oddsHost) begin() {
	h.shift, h.calls, h.owed = h.rng.IntN(h.size), 0, 0
	h.moved = time.Now()
}

// pass lets time pass. What strangers hold comes and goes meanwhile, a block at a time, where there is room.
func (h *oddsHost) pass(d time.Duration) {
	time.Sleep(d)
	if len(h.blocks) == 0 {
		return
	}
move:
	for took := time.Duration(h.block) * oddsTurnover; time.Since(h.moved) >= took; h.moved = h.moved.Add(took) {
		b, to := &h.blocks[h.rng.IntN(len(h.blocks))], h.free[h.rng.IntN(len(h.free))]
		for i := range b[1] {
			if h.taken[(to+i)%h.size] {
				continue move
			}
		}
		for i := range b[1] {
			at := (b[0] + i) % h.size
			h.taken[at], h.inFree[at] = false, len(h.free)
			h.free = append(h.free, at)
		}
		b[0] = to
		h.hold(*b, false)
	}
}

func (h *oddsHost) isTaken(port int) bool { return h.taken[(port-h.first+h.shift)%h.size] }

// allTaken is the probability that tries ports, each another one, are all taken: about the share of those that
// are to the power of tries.
func (h *oddsHost) allTaken(tries int) float64 {
	p := 1.0
	for i := range tries {
		p *= float64(h.size-len(h.free)-i) / float64(h.size-i)
	}
	return max(p, 0)
}

// rowTaken is the same for ports in a row: they begin in a block, which is long enough, or followed by another.
func (h *oddsHost) rowTaken(tries int) float64 {
	if h.block == 1 {
		return h.allTaken(tries)
	}
	p, others := 0.0, float64(len(h.blocks)-1)
	for _, b := range h.blocks {
		p += float64(max(b[1]-tries+1, 0)) + float64(min(tries-1, b[1]))*others/(others+float64(len(h.free)))
	}
	return p / float64(h.size)
}

// inOrder is what Docker does: the allocator's next ports, so many of them.
func (h *oddsHost) inOrder(tries int) *attempt {
	r := h.request()
	for range tries {
		a, err := try(h.ctx, r, h, h.leases, 0, 0)
		if err == nil {
			return a
		}
		a.letGo()
	}
	return nil
}

// atRandom tries so many ports, each another one, of those that aren't its own.
func (h *oddsHost) atRandom(tries int) *attempt {
	r, seen := h.request(), map[int]bool{}
	for len(seen) < tries {
		port := h.first + h.rng.IntN(h.size)
		if seen[port] || h.own[port] {
			continue
		}
		seen[port] = true
		a, err := try(h.ctx, r, h, h.leases, port, port)
		if err == nil {
			return a
		}
		a.letGo()
	}
	return nil
}

// search is Berth's, put together as MapPorts does.
func (h *oddsHost) search(view bool) *attempt {
	r := h.request()
	s := search{req: r, driver: h, leases: h.leases}
	if view {
		s.view = look{proto: r.proto, addrs: r.addrs}
		ports, err := newHostPorts(&s.view, r, h.leases, &h.cursor)
		assert.NilError(h.t, err)
		ports.look = h
		s.ports = ports
	} else {
		s.ports = newAllocatorPorts(r)
	}
	a, _ := s.run(h.ctx)
	return a
}

func (h *oddsHost) request() *request {
	r, err := newRequest(ask(types.TCP, 0, 0, "0.0.0.0"), h)
	assert.NilError(h.t, err)
	return r
}

func (h *oddsHost) ChildHostIP(string, netip.Addr) netip.Addr { return h.child }

var errOddsTaken = errors.New(answerPrefix + "listen tcp4 0.0.0.0:32768: bind: address already in use")

func (h *oddsHost) AddPort(_ context.Context, _ string, _, _ netip.Addr, port int) (func() error, error) {
	h.calls++
	h.pass(h.owed + oddsAttempt)
	h.owed = 0
	if h.isTaken(port) {
		return nil, errOddsTaken
	}
	h.own[port] = true
	return func() error {
		h.own[port] = false
		return nil
	}, nil
}

// find looks as the view does. The time passes when a port is asked for: no thread of the host's sleeps.
func (h *oddsHost) find(next func() int) (free int, taken netip.Addr) {
	h.owed += oddsLook
	for free = next(); free != 0 && h.isTaken(free); free = next() {
		h.owed += oddsPassed
		taken = netip.IPv4Unspecified()
	}
	return free, taken
}

// RequestPortsInRange reserves as OSAllocator does, and binds nothing: the child's ports are all free.
func (h *oddsHost) RequestPortsInRange(ips []net.IP, proto types.Protocol, first, last int) (int, []*os.File, error) {
	port, err := portallocator.Get().RequestPortsInRange(ips, proto.String(), first, last)
	return port, nil, err
}
