//go:build integration

package faults

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/api/client"
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
	rlk        client.Client // not through the proxy
	docker     *http.Client
	containers int // started so far
	faults     int // injected so far

	left     []binding    // RootlessKit has these, because of faults so far
	reserved map[int]bool // and dockerd keeps these ports from everyone
	own      []string     // listeners of RootlessKit's own
	before   counts       // of dockerd, without containers
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
		d:        stacktest.Start(t, "dockerd", stack.Options{Env: stacktest.Behind(t, proxy.Socket)}),
		proxy:    proxy,
		reserved: map[int]bool{},
	}
	r.rlk, err = client.New(s.RootlessKitSocket())
	assert.NilError(t, err)
	t.Cleanup(func() { r.rlk.Close() })
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

// keep takes note of a port that dockerd can't remove, and whether RootlessKit has it.
func (r *rig) keep(b binding, held bool) {
	r.reserved[b.port] = true
	if held {
		r.left = append(r.left, b)
	}
}

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
	list, err := r.rlk.PortManager().ListPorts(t.Context())
	assert.NilError(t, err)
	var ports []binding
	for _, st := range list {
		ports = append(ports, binding{st.Spec.Proto, st.Spec.ParentIP, st.Spec.ParentPort})
	}
	slices.SortFunc(ports, compare)
	return ports
}

// listeners has the addresses where the stack's RootlessKit listens for TCP on the host.
func listeners(t *testing.T, s *stack.Stack) []string {
	t.Helper()
	p, err := s.Process(t.Context(), "docker-rootlesskit")
	assert.NilError(t, err)
	pid := p.PID
	dir := fmt.Sprintf("/proc/%d/", pid)
	sockets := map[string]bool{}
	for _, link := range descriptors(t, pid) {
		if inode, ok := strings.CutPrefix(link, "socket:["); ok {
			sockets[strings.TrimSuffix(inode, "]")] = true
		}
	}
	var list []string
	for _, file := range []string{"tcp", "tcp6"} {
		data, err := os.ReadFile(dir + "net/" + file)
		assert.NilError(t, err)
		for line := range strings.Lines(string(data)) {
			f := strings.Fields(line)
			const listen = "0A" // include/net/tcp_states.h
			if len(f) > 9 && f[3] == listen && sockets[f[9]] {
				list = append(list, address(t, f[1]))
			}
		}
	}
	slices.Sort(list)
	return list
}

// address reads /proc/net/tcp's "0100007F:5000".
func address(t *testing.T, s string) string {
	t.Helper()
	hex, port, _ := strings.Cut(s, ":")
	n, err := strconv.ParseUint(port, 16, 16)
	assert.NilError(t, err)
	// Words of 32 bits, each in the host's order of bytes: little-endian, on what Berth runs on.
	ip := make([]byte, len(hex)/2)
	for i := range ip {
		b, err := strconv.ParseUint(hex[2*i:2*i+2], 16, 8)
		assert.NilError(t, err)
		ip[i/4*4+3-i%4] = byte(b)
	}
	return net.JoinHostPort(net.IP(ip).String(), strconv.FormatUint(n, 10))
}

// descriptors has where the descriptors of a process lead to.
func descriptors(t *testing.T, pid int) []string {
	t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	assert.NilError(t, err)
	assert.Assert(t, len(links) > 0, "the descriptors of process %d cannot be seen", pid)
	var to []string
	for _, l := range links {
		if target, err := os.Readlink(l); err == nil { // else it's closed since
			to = append(to, target)
		}
	}
	return to
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
	c.descriptors += len(descriptors(t, p.PID))
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

// Warn lines about host ports.
var (
	undoneLine = regexp.MustCompile(`level=warning msg="RootlessKit answered a port request after it was given up: undone".* port=(\d+)`)
	// This one is the bridge driver's.
	failedLine = regexp.MustCompile(`level=warning msg="driver failed revoking external connectivity on endpoint".*failed to remove host port ([^ ]+): `)
	heldLine   = regexp.MustCompile(`level=warning msg="RootlessKit may hold a host port.*failed to remove host port ([^ ]+): `)
)

// said has what the daemon has warned of since the mark: a word for the line, and its port.
func (r *rig) said(t *testing.T, mark int64) []string {
	t.Helper()
	f, err := os.Open(r.d.Options.Log)
	assert.NilError(t, err)
	defer f.Close()
	_, err = f.Seek(mark, io.SeekStart)
	assert.NilError(t, err)
	var said []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line := lines.Text()
		lost, isLost := stacktest.LostPort(line)
		switch {
		case isLost:
			said = append(said, "lost "+lost)
		case undoneLine.MatchString(line):
			said = append(said, "undone "+undoneLine.FindStringSubmatch(line)[1])
		case failedLine.MatchString(line):
			said = append(said, "failed "+failedLine.FindStringSubmatch(line)[1])
		case heldLine.MatchString(line):
			said = append(said, "held "+heldLine.FindStringSubmatch(line)[1])
		case strings.Contains(line, "level=warning") && strings.Contains(line, "RootlessKit"):
			said = append(said, line) // one that no test expects
		}
	}
	assert.NilError(t, lines.Err())
	return said
}
