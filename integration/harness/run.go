package harness

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"

	"berth/hack/stack"
	"berth/integration/whoami"
)

const (
	// answerWithin is how long a published port may take to be answered by its own container.
	answerWithin = 5 * time.Second
	startWithin  = time.Minute
)

// Options say what is measured.
type Options struct {
	Contenders, Loads, Requests []string // by name; none is all
	Dockerd                     string   // a program of one's own, as the contender "file"
	Full                        bool     // not by name, but all that docs/measuring.md says
	Starts, Parallel            int      // of a cell
	Seed                        uint64

	Root     string // the checkout
	File     string // that results are kept in
	Progress *Progress
}

// Run measures what is not in the file yet. What was measured before ctx ended is there.
func Run(ctx context.Context, o Options) (*Results, error) {
	results, err := LoadResults(o.File)
	if err != nil {
		return nil, err
	}
	list, err := o.scenes()
	if err != nil {
		return nil, err
	}
	r := run{Options: o, results: results, sums: map[string]string{}}
	if r.machine, err = thisMachine(); err != nil {
		return nil, err
	}
	for _, s := range list {
		for _, c := range s.contenders {
			if cell, _ := r.cell(s, c); !r.measured(cell) {
				o.Progress.total += o.starts(s, c)
			}
		}
	}
	defer o.Progress.start()()
	for _, s := range list {
		// What one leaves behind is said in the end; the others are measured all the same.
		if err = errors.Join(err, r.scene(ctx, s)); ctx.Err() != nil {
			break
		}
	}
	return results, err
}

// wanted is how many starts of a contender are kept.
func (o *Options) wanted(s scene, c Contender) int {
	return o.Starts / s.Request.share * s.turns(c) / turns
}

// starts is how many it makes.
func (o *Options) starts(s scene, c Contender) int { return o.wanted(s, c) * len(s.shares(c)) }

type run struct {
	Options
	results *Results
	machine Machine
	sums    map[string]string // of programs
}

// cell is one that is to be measured, with an error if its program is not there.
func (r *run) cell(s scene, c Contender) (*Cell, error) {
	program, err := place{Contender: c, root: r.Root}.binary(), error(nil)
	if r.sums[program] == "" {
		r.sums[program], err = stack.Sum(program)
	}
	return &Cell{Contender: c.Name, Load: s.Load.Name, Request: s.Request.Name, SHA256: r.sums[program], Machine: r.machine,
		Date: time.Now().UTC().Truncate(time.Second), Seed: r.Seed, Parallel: r.Parallel, Wanted: r.wanted(s, c)}, err
}

func (r *run) measured(c *Cell) bool { return slices.ContainsFunc(r.results.Cells, c.done) }

// running is a contender that takes its turns.
type running struct {
	Contender
	turns   int
	cell    *Cell
	host    *host
	daemons []*daemon
}

// scene has the contenders take turns, but those that have been here before.
func (r *run) scene(ctx context.Context, s scene) (retErr error) {
	var here []*running
	defer func() {
		r.Progress.now("stopping the daemons")
		for _, c := range here {
			retErr = errors.Join(retErr, c.down())
		}
	}()
	for _, contender := range s.contenders {
		p := place{Context: ctx, Contender: contender, root: r.Root}
		cell, err := r.cell(s, contender)
		if r.measured(cell) {
			fmt.Fprintf(r.Progress, "%s: measured before\n", cell.key())
			continue
		}
		r.Progress.now(cell.key() + ": starting the daemon")
		c := &running{Contender: contender, turns: s.turns(contender), cell: cell}
		if err == nil {
			err = c.bringUp(p, s.second)
		}
		if ctx.Err() != nil {
			return errors.Join(context.Cause(ctx), c.down())
		}
		if err != nil {
			cell.CannotRun = err.Error()
			r.Progress.skip(cell, r.starts(s, contender))
			if err := errors.Join(r.results.put(cell), c.down()); err != nil {
				return err
			}
			continue
		}
		here = append(here, c)
	}
	for turn := range turns * often {
		for _, c := range here {
			if turn >= c.turns || c.cell.CannotRun != "" {
				continue
			}
			r.Progress.now(c.cell.key())
			err := c.host.do(func() error { return r.turn(ctx, s, c, turn) })
			if err != nil && ctx.Err() == nil {
				c.cell.CannotRun = fmt.Sprintf("turn %d: %v", turn, err)
			}
			if len(c.cell.Starts) > 0 || c.cell.CannotRun != "" { // of an interrupted turn, too
				if err := r.results.put(c.cell); err != nil {
					return err
				}
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
	}
	return nil
}

// secondUser has a daemon of its own where the load says so. hack/deps.sh makes it.
const secondUser = "berth2"

func (c *running) bringUp(p place, second bool) (err error) {
	if c.host, err = newHost(); err != nil {
		return err
	}
	users := []string{stack.DefaultUser}
	if second {
		if users = append(users, secondUser); os.Getuid() != 0 {
			return errors.New("a second user's daemon takes root")
		}
	}
	return c.host.do(func() error {
		for i, user := range users {
			if p.user = user; i > 0 && p.beside != nil {
				p.up = p.beside
			}
			d, err := p.start()
			if err != nil {
				return err
			}
			c.daemons = append(c.daemons, d)
		}
		c.cell.Daemon = c.daemons[0].version
		return nil
	})
}

func (c *running) down() (err error) {
	if c.host == nil {
		return nil
	}
	defer c.host.close()
	return c.host.do(func() (err error) {
		for _, d := range c.daemons {
			err = errors.Join(err, d.down())
		}
		return err
	})
}

// turn is one of a contender's, on a thread of its host.
func (r *run) turn(ctx context.Context, s scene, c *running, turn int) error {
	shares := s.shares(c.Contender)
	var own Turn
	var idle float64
	var failed error
	for i := range shares {
		// Whatever one of them warms up helps the next: they change places.
		which := (i + turn) % len(shares)
		t, starts, err := r.share(ctx, shares[which], c, turn)
		if which == 0 {
			own = t
			c.cell.Starts = append(c.cell.Starts, starts...)
		}
		if err != nil {
			failed = err
			break
		}
		if which == 1 {
			idle = t.Seconds
		}
	}
	if own.Idle = idle; own.Starts > 0 {
		c.cell.Turns = append(c.cell.Turns, own)
	}
	return failed
}

// share is a turn's share of the starts, under the load, until they are removed.
func (r *run) share(ctx context.Context, s scene, c *running, turn int) (t Turn, starts []Start, retErr error) {
	n := c.cell.Wanted*(turn+1)/c.turns - c.cell.Wanted*turn/c.turns
	held, stop, err := s.Load.start(s.network, n*len(s.ports), r.Seed)
	if err != nil {
		return t, nil, err
	}
	defer func() { retErr = errors.Join(retErr, stop()) }()
	from := []int{0}
	if s.hostPort == "" {
		if from, err = ranges(held); err != nil {
			return t, nil, err
		}
	}
	starts = make([]Start, n)
	of := func(i int) *daemon { return c.daemons[i%len(c.daemons)] }
	check := func(i int) {
		if starts[i].Outcome != published {
			return
		}
		if err := c.check(ctx, of(i), &starts[i], s.Request); err != nil {
			starts[i].Outcome, starts[i].Error = misdelivered, err.Error()
		}
	}
	begun := time.Now()
	each(r.Parallel, n, func(i int) {
		if ctx.Err() != nil {
			return
		}
		starts[i] = start(ctx, of(i), s.Request.container(from[i%len(from)]))
		starts[i].Turn = turn
		// Whoever asks needs a port, too.
		if !s.spare {
			check(i)
		}
		r.Progress.done(starts[i].Outcome)
	})
	seconds := time.Since(begun).Seconds()
	if s.spare {
		err = stop()
		each(r.Parallel, n, check)
	}
	if c.berth {
		err = errors.Join(err, tell(c.daemons, starts))
	}
	errs := make([]error, n)
	each(r.Parallel, n, func(i int) {
		if starts[i].id != "" {
			_, errs[i] = of(i).ContainerRemove(context.WithoutCancel(ctx), starts[i].id, client.ContainerRemoveOptions{Force: true})
		}
	})
	starts = slices.DeleteFunc(starts, func(s Start) bool { return s.Outcome == "" }) // we were stopped before
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return Turn{Held: len(held), Starts: len(starts), Seconds: seconds}, starts, errors.Join(append(errs, err)...)
}

// each calls f for 0 to n-1, so many at a time.
func each(parallel, n int, f func(i int)) {
	var wg sync.WaitGroup
	next := make(chan int)
	for range min(parallel, n) {
		wg.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// start starts a container. Once begun, it is not stopped.
func start(ctx context.Context, d *daemon, container client.ContainerCreateOptions) (s Start) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startWithin)
	defer cancel()
	begun := time.Now()
	made, err := d.ContainerCreate(ctx, container)
	if err == nil {
		_, err = d.ContainerStart(ctx, made.ID, client.ContainerStartOptions{})
	}
	s.id, s.MS, s.Outcome = made.ID, ms(time.Since(begun)), published
	if err != nil {
		s.Outcome, s.Error = cause(err), err.Error()
	}
	return s
}

// cause is why a start was refused.
func cause(err error) string {
	text := err.Error()
	switch {
	case strings.Contains(text, " tried, "): // a search that has ended says of how many
		return gaveUp
	case strings.Contains(text, "address already in use"), strings.Contains(text, "port is already allocated"):
		return inUse
	}
	return other
}

// check asks each port that is published, at each address, who is there.
func (c *running) check(ctx context.Context, d *daemon, s *Start, r Request) error {
	found, err := d.ContainerInspect(context.WithoutCancel(ctx), s.id, client.ContainerInspectOptions{})
	if err != nil {
		return err
	}
	ports := found.Container.NetworkSettings.Ports
	for _, p := range r.ports {
		port := network.MustParsePort(p)
		if len(ports[port]) == 0 {
			return fmt.Errorf("port %v is published nowhere", port)
		}
		for _, b := range ports[port] {
			at, err := address(b)
			if err != nil {
				return err
			}
			if name := b.HostPort + "/" + string(port.Proto()); !slices.Contains(s.ports, name) {
				s.ports = append(s.ports, name)
			}
			if err := c.host.do(func() error { return whoami.Await(string(port.Proto()), at, s.id, answerWithin) }); err != nil {
				return err
			}
		}
	}
	return nil
}

// address is a binding's. podman names none for all of them.
func address(b network.PortBinding) (netip.AddrPort, error) {
	port, err := strconv.ParseUint(b.HostPort, 10, 16)
	ip := b.HostIP
	if !ip.IsValid() {
		ip = netip.IPv4Unspecified()
	}
	return netip.AddrPortFrom(ip, uint16(port)), err
}
