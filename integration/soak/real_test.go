//go:build integration

package soak

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/prometheus/procfs"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"gotest.tools/v3/assert"

	"berth/hack/stack"
	"berth/integration/faultproxy"
	"berth/integration/hostload"
	"berth/integration/stacktest"
	"berth/integration/whoami"
)

var (
	duration      = flag.Duration("duration", time.Minute, "how long the soak takes")
	noDetachNetns = flag.Bool("no-detach-netns", false, "keep the daemon from seeing the host, so that it is refused ports")
)

func TestMain(m *testing.M) { stacktest.Main(m) }

const (
	atOnce     = 8
	line       = time.Minute      // between two lines of progress
	restLimit  = 30 * time.Second // for what is under way to end, on a busy machine
	answerWait = 30 * time.Second // for a container's program to serve
	lifeLimit  = 2 * time.Minute  // longer than all that the daemon does for a container, and waits for
	// A daemon that is gone fails thousands of starts a second.
	afterFailure = time.Second
	shown        = 10 // failures that are told in full
	faultShare   = 0.01
)

// The stack starts and stops containers for long, while other processes hold a third of the
// host's ports and let go of one and take another all the time, and one request in a hundred
// between dockerd and RootlessKit meets a fault. What there is each minute, with all containers
// gone, is also written to build/results/soak.json.
func TestSoak(t *testing.T) {
	place := stacktest.At(t)
	socket := place.RootlessKitSocket()
	proxy, err := faultproxy.Start(socket, place.UID())
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, proxy.Close()) })
	d := stacktest.Start(t, "dockerd", stack.Options{NoDetachNetns: *noDetachNetns, Env: stacktest.Behind(t, proxy.Socket)})
	ctx, stop := signal.NotifyContext(t.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	status, err := d.Status(ctx)
	assert.NilError(t, err)
	s := soak{t: t, ctx: ctx, d: d, proxy: proxy, processes: status.Processes, begun: time.Now()}
	random := rand.New(rand.NewPCG(1, 2))
	proxy.Inject(func(faultproxy.Call) faultproxy.Fault {
		if random.Float64() >= faultShare {
			return faultproxy.Fault{}
		}
		return faultproxy.Faults[random.IntN(len(faultproxy.Faults))]
	})
	// The stack's own at rest, and other programs of the user where the host is not one of the tests' own.
	s.alien = listeners(t, d)
	var loads []*hostload.Process
	for _, l := range []hostload.Load{
		{Network: "tcp4", Hold: 6000, Churn: time.Millisecond, Seed: 1},
		{Network: "udp4", Hold: 2000, Churn: 5 * time.Millisecond, Seed: 2},
	} {
		var err error
		l.Ports, err = hostload.DynamicPorts(20000)
		assert.NilError(t, err)
		load, err := hostload.Start(l)
		assert.NilError(t, err)
		loads = append(loads, load)
		if os.Getuid() != 0 && strings.HasPrefix(l.Network, "tcp") {
			s.alien += l.Hold // the load is the same user's as the stack
		}
	}

	// The first quarter of a short soak is its warm-up.
	round := min(line, *duration/4)
	var samples []Sample
	fmt.Fprintln(t.Output(), Header)
	for end := s.begun.Add(*duration); len(samples) < 2 || time.Now().Add(round/2).Before(end); {
		s.work(time.Now().Add(round))
		if ctx.Err() != nil {
			t.Fatal("interrupted") // stacktest takes the stack down
		}
		samples = append(samples, s.atRest(samples))
		fmt.Fprintln(t.Output(), samples[len(samples)-1])
	}

	for _, load := range loads {
		report, err := load.Stop()
		assert.NilError(t, err)
		assert.Assert(t, report.Churned > 0, "the host did not churn")
	}
	stacktest.WriteResults(t, "soak.json", samples)
	wrong := Verdict(samples[0], samples[len(samples)-1])
	for _, w := range wrong {
		t.Error(w)
	}
	if len(wrong) == 0 {
		fmt.Fprintln(t.Output(), "no failures but those injected, no growth, nothing left")
	}
}

type soak struct {
	t     *testing.T
	ctx   context.Context // ends when the soak is interrupted
	d     *stacktest.Daemon
	proxy *faultproxy.Proxy
	begun time.Time
	// processes are the stack's. They are asked for once: each time, dockerd, stock's as well, opens another
	// connection to RootlessKit for its version, and keeps it.
	processes []stack.Process
	alien     int // listeners that are not those of published ports
	peak      int // the most listeners that there were at once

	mu                         sync.Mutex
	starts, injected, failures int
}

// publishes are what containers ask for, in turn.
var publishes = []network.PortMap{
	{tcp80: {{}}},
	{tcp80: {{}}, udp80: {{}}},
	{tcp80: {{HostIP: netip.AddrFrom4([4]byte{127, 0, 0, 1})}}},
	{tcp80: {{HostPort: "20000-20063"}}},
}

var tcp80, udp80 = network.MustParsePort("80/tcp"), network.MustParsePort("80/udp")

// work starts and stops containers until the end, and returns when all are gone.
func (s *soak) work(end time.Time) {
	var wg sync.WaitGroup
	for range atOnce {
		wg.Go(func() {
			for s.ctx.Err() == nil && time.Now().Before(end) {
				s.mu.Lock()
				n := s.starts
				s.starts++
				s.mu.Unlock()
				if err := s.container(s.ctx, n); err != nil && s.ctx.Err() == nil && !s.isInjected(err) {
					s.failed(n, err)
					time.Sleep(afterFailure)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		s.peak = max(s.peak, listeners(s.t, s.d)-s.alien)
		select {
		case <-done:
			return
		case <-tick.C:
		}
	}
}

// isInjected tells whether a start failed since the proxy lost an answer, and counts those.
func (s *soak) isInjected(err error) bool {
	for _, c := range s.proxy.Calls() {
		if c.Op == faultproxy.AddPort && c.IsLost() && strings.Contains(err.Error(), "host port "+hostPort(s.t, c)+": ") && strings.Contains(err.Error(), "EOF") {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.injected++
			return true
		}
	}
	return false
}

// hostPort is the host port that c asks for, such as "[::1]:8080/tcp".
func hostPort(t *testing.T, c faultproxy.Call) string {
	t.Helper()
	spec, err := c.Spec()
	assert.NilError(t, err)
	return hostPortOf(spec)
}

func hostPortOf(s port.Spec) string {
	return net.JoinHostPort(s.ParentIP, strconv.Itoa(s.ParentPort)) + "/" + strings.TrimRight(s.Proto, "46")
}

func (s *soak) failed(n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures++
	if s.failures <= shown {
		fmt.Fprintf(s.t.Output(), "start %d: %v\n", n, err)
	}
}

// container is the life of the n-th one.
func (s *soak) container(ctx context.Context, n int) (retErr error) {
	ctx, cancel := context.WithTimeout(ctx, lifeLimit)
	defer cancel()
	id, err := s.d.Create(ctx, publishes[n%len(publishes)])
	if err != nil {
		return err
	}
	defer func() {
		_, err := s.d.API.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true})
		if err != nil && retErr == nil {
			retErr = err
		}
	}()
	if _, err := s.d.API.ContainerStart(ctx, id, client.ContainerStartOptions{}); err != nil {
		return err
	}
	published, err := s.d.Ports(ctx, id)
	if err != nil {
		return err
	}
	for p := range publishes[n%len(publishes)] {
		if len(published[p]) == 0 {
			return fmt.Errorf("%s of container %.12s is not published: %v", p, id, published)
		}
		for _, at := range published[p] {
			if err := whoami.Await(string(p.Proto()), at, id, answerWait); err != nil {
				return err
			}
		}
	}
	// The other half is removed as it runs.
	if n/len(publishes)%2 == 0 {
		_, err := s.d.API.ContainerStop(ctx, id, client.ContainerStopOptions{})
		return err
	}
	return nil
}

// atRest is what there is when the daemon has come to rest: it is waited for to be like the
// first sample, since there are things that end after their container.
func (s *soak) atRest(samples []Sample) Sample {
	s.d.API.Close() // its idle connections
	for end := time.Now().Add(restLimit); ; time.Sleep(500 * time.Millisecond) {
		sample := s.sample()
		first := sample
		if len(samples) > 0 {
			first = samples[0]
		}
		if len(Grown(first, sample)) == 0 || time.Now().After(end) {
			return sample
		}
	}
}

func (s *soak) sample() Sample {
	t := s.t
	t.Helper()
	ctx := t.Context()
	sample := Sample{Minutes: time.Since(s.begun).Minutes(), Starts: s.starts, Injected: s.injected, Failures: s.failures, Peak: s.peak}
	for _, c := range s.proxy.Calls() {
		if c.Fault != (faultproxy.Fault{}) {
			sample.Faults++
		}
		if c.Op == faultproxy.AddPort && c.IsLost() {
			sample.Lost++
		}
	}
	var named map[string]bool
	sample.Refusals, named = readLog(t, s.d)
	for _, p := range stacktest.Exposed(t, s.d.Stack) { // not through the proxy
		if named[hostPortOf(p.Spec)] && (os.Getuid() == 0 || strings.HasPrefix(p.Spec.Proto, "tcp")) { // as listeners does
			sample.Named++
		}
	}
	containers, err := s.d.API.ContainerList(ctx, client.ContainerListOptions{All: true})
	assert.NilError(t, err)
	sample.Containers = len(containers.Items)
	info, err := s.d.API.Info(ctx, client.InfoOptions{})
	assert.NilError(t, err)
	sample.Goroutines = info.Info.NGoroutines
	s.d.API.Close()
	sample.Listeners = listeners(t, s.d) - s.alien - sample.Named

	for _, p := range s.processes {
		switch p.Program {
		case "dockerd":
			sample.RSS = rss(t, p.PID)
			sample.Descriptors = len(stacktest.Descriptors(t, p.PID))
		case "docker-rootlesskit":
			sample.RootlessKitFDs += len(stacktest.Descriptors(t, p.PID))
		}
	}
	assert.Assert(t, sample.RSS > 0 && sample.RootlessKitFDs > 0, "%v", s.processes)
	return sample
}

// readLog counts the refusals that the daemon's log tells of, of searches that came out at a
// port, and returns the host ports that RootlessKit may have though nobody knows.
func readLog(t *testing.T, d *stacktest.Daemon) (refusals int, named map[string]bool) {
	t.Helper()
	named = map[string]bool{}
	for _, l := range d.ReadLog(t, 0) {
		if l.IsLost() {
			named[l.HostPort()] = true
		}
		if l.Message == "Published a host port after refusals of others" {
			refusals += l.Attempts - 1
		}
	}
	return refusals, named
}

// listeners counts the sockets of the stack's user that listen on the host. A UDP socket does
// not: only on a host of the tests' own are all of them the stack's.
func listeners(t *testing.T, d *stacktest.Daemon) (n int) {
	t.Helper()
	for _, s := range stacktest.Sockets(t) {
		if s.UID == d.UID() && (os.Getuid() == 0 || strings.HasPrefix(s.Network, "tcp")) {
			n++
		}
	}
	return n
}

func rss(t *testing.T, pid int) (kib int) {
	t.Helper()
	p, err := procfs.NewProc(pid)
	assert.NilError(t, err)
	stat, err := p.Stat()
	assert.NilError(t, err)
	return stat.ResidentMemory() >> 10
}
