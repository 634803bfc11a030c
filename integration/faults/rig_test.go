//go:build integration

package faults

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"berth/hack/stack"
	"berth/integration/faultproxy"
	"berth/integration/stacktest"
)

// rig is a stack with a proxy in front of its RootlessKit, and what is to be left there.
type rig struct {
	d          *stacktest.Daemon
	proxy      *faultproxy.Proxy
	docker     *http.Client
	containers int // started so far
	faults     int // injected so far

	left   []binding // RootlessKit has these, because of faults so far
	own    []string  // listeners of RootlessKit's own
	before counts    // of dockerd, without containers
}

// binding is a host port on one address, as RootlessKit has it.
type binding struct {
	proto, ip string
	port      int
}

func (b binding) String() string {
	return fmt.Sprintf("%s/%s", net.JoinHostPort(b.ip, strconv.Itoa(b.port)), strings.TrimRight(b.proto, "46"))
}

func bindingOf(t *testing.T, c faultproxy.Call) binding {
	t.Helper()
	spec, err := c.Spec()
	assert.NilError(t, err)
	return binding{spec.Proto, spec.ParentIP, spec.ParentPort}
}

// counts is what a leak would show in.
type counts struct{ descriptors, goroutines int }

func start(t *testing.T) *rig {
	t.Helper()
	s := stacktest.At(t)
	proxy, err := faultproxy.Start(s.RootlessKitSocket(), s.UID())
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, proxy.Close()) })
	r := &rig{
		d:     stacktest.Start(t, "dockerd", stack.Options{Env: stacktest.Behind(t, proxy.Socket)}),
		proxy: proxy,
	}
	r.docker = stacktest.HTTP(s)
	r.own = listeners(t, r.d.Stack)

	// The first starts leave what a daemon has from then on, like connections to containerd.
	for range 3 {
		container, err := r.run("0:80", "20399:80")
		assert.NilError(t, err)
		r.remove(t, container)
	}
	assert.Assert(t, len(proxy.Calls()) == 3*4*2, "dockerd does not ask RootlessKit through the proxy: %+v", proxy.Calls())
	proxy.Inject(nil)
	var steady int
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		now := r.counts(t)
		if now != r.before {
			r.before, steady = now, 0
			return poll.Continue("dockerd's descriptors and goroutines still change")
		}
		if steady++; steady < 5 {
			return poll.Continue("not steady for long enough")
		}
		return poll.Success()
	}, poll.WithTimeout(time.Minute), poll.WithDelay(200*time.Millisecond))
	r.settled(t)
	return r
}

// keep takes note of a port that RootlessKit has and dockerd can't remove.
func (r *rig) keep(b binding) { r.left = append(r.left, b) }

// settled waits until nothing is left on the host, in RootlessKit and in dockerd, but what
// keep was told of.
func (r *rig) settled(t *testing.T) {
	t.Helper()
	wantListeners := slices.Clone(r.own)
	for _, b := range r.left {
		wantListeners = append(wantListeners, net.JoinHostPort(b.ip, strconv.Itoa(b.port)))
	}
	slices.Sort(wantListeners)
	want := slices.Clone(r.left)
	slices.SortFunc(want, compare)
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if has := r.ports(t); !slices.Equal(has, want) {
			return poll.Continue("RootlessKit has the ports %v, want %v", has, want)
		}
		if has := listeners(t, r.d.Stack); !slices.Equal(has, wantListeners) {
			return poll.Continue("RootlessKit listens at %v, want %v", has, wantListeners)
		}
		if g := r.goroutines(t); slices.ContainsFunc(g, isOfNat) {
			return poll.Continue("the port mapper is still at work: %s", g[slices.IndexFunc(g, isOfNat)])
		}
		if now := r.counts(t); now.descriptors > r.before.descriptors || now.goroutines > r.before.goroutines {
			return poll.Continue("dockerd has %+v, had %+v", now, r.before)
		}
		return poll.Success()
	}, poll.WithTimeout(time.Minute))
}

func compare(a, b binding) int {
	return cmp.Or(strings.Compare(a.proto, b.proto), strings.Compare(a.ip, b.ip), cmp.Compare(a.port, b.port))
}

// ports is RootlessKit's own list.
func (r *rig) ports(t *testing.T) []binding {
	t.Helper()
	var ports []binding
	for _, st := range stacktest.Exposed(t, r.d.Stack) { // not through the proxy
		ports = append(ports, binding{st.Spec.Proto, st.Spec.ParentIP, st.Spec.ParentPort})
	}
	slices.SortFunc(ports, compare)
	return ports
}

// listeners has the addresses where the stack's RootlessKit listens for TCP on the host.
func listeners(t *testing.T, s *stack.Stack) (list []string) {
	t.Helper()
	p, err := s.Process(t.Context(), "docker-rootlesskit")
	assert.NilError(t, err)
	for _, socket := range stacktest.SocketsOf(t, p.PID) {
		if strings.HasPrefix(socket.Network, "tcp") {
			list = append(list, socket.At.String())
		}
	}
	slices.Sort(list)
	return list
}

// counts is what dockerd has now, without its idle connections to RootlessKit: how many there
// are depends on the faults of the moment before.
func (r *rig) counts(t *testing.T) counts {
	t.Helper()
	p, err := r.d.Process(t.Context(), "dockerd")
	assert.NilError(t, err)
	var c counts
	for _, g := range r.goroutines(t) {
		switch {
		case strings.Contains(g, "net/http.(*persistConn).readLoop"):
			c.descriptors--
		case strings.Contains(g, "net/http.(*persistConn).writeLoop"):
		default:
			c.goroutines++
		}
	}
	c.descriptors += len(stacktest.Descriptors(t, p.PID))
	return c
}

// goroutines has the stacks of dockerd's goroutines.
func (r *rig) goroutines(t *testing.T) []string {
	t.Helper()
	resp, err := r.docker.Get("http://docker/debug/pprof/goroutine?debug=2")
	assert.NilError(t, err)
	defer resp.Body.Close()
	assert.Equal(t, resp.StatusCode, http.StatusOK)
	dump, err := io.ReadAll(resp.Body)
	assert.NilError(t, err)
	return strings.Split(strings.TrimSpace(string(dump)), "\n\n")
}

func isOfNat(goroutine string) bool {
	return strings.Contains(goroutine, "libnetwork/portmappers/nat.")
}

// mark is where the log ends now.
func (r *rig) mark(t *testing.T) int64 {
	t.Helper()
	info, err := os.Stat(r.d.Options.Log)
	assert.NilError(t, err)
	return info.Size()
}

// said has what the daemon has warned of since the mark: a word for the line, and its port.
func (r *rig) said(t *testing.T, mark int64) (said []string) {
	t.Helper()
	for _, l := range r.d.ReadLog(t, mark) {
		_, removal, isRemoval := strings.Cut(l.Error, "failed to remove host port ")
		removal, _, _ = strings.Cut(removal, ": ")
		switch {
		case l.Level != "warning":
		case l.IsLost():
			said = append(said, "lost "+l.HostPort())
		case l.Message == "RootlessKit answered a port request after it was given up: undone":
			said = append(said, fmt.Sprint("undone ", l.Port))
		case l.Message == "driver failed revoking external connectivity on endpoint" && isRemoval: // the bridge driver's
			said = append(said, "failed "+removal)
		case strings.HasPrefix(l.Message, "RootlessKit did not answer the removal of a host port"):
			said = append(said, "unanswered "+l.HostPort())
		case strings.HasPrefix(l.Message, "RootlessKit may hold a host port"):
			said = append(said, "held "+l.HostPort())
		case strings.Contains(l.Message+l.Error, "RootlessKit"):
			said = append(said, l.Message+": "+l.Error) // one that no test expects
		}
	}
	return said
}
