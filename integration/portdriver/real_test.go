//go:build integration

package portdriver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
	"gotest.tools/v3/golden"

	"berth/daemon/libnetwork/portmappers/nat"
	"berth/hack/checkout"
	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
)

// As in dockerd, the main thread stays on the host: the others are started from it.
func init() { runtime.LockOSThread() }

// TestMain is the tests', and the "dockerd" of the stacks that the tests start:
// the suite runs where dockerd does.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "dockerd" {
		fmt.Fprintln(os.Stderr, serve())
		os.Exit(1)
	}
	stacktest.Main(m)
}

// serve runs the suite when it is asked to, at dockerd's socket.
func serve() error {
	stateDir := os.Getenv("ROOTLESSKIT_STATE_DIR")
	// The suite is about what the driver answers: without this, the port mapper
	// does not look at the host's ports first.
	if err := os.Unsetenv("ROOTLESSKIT_STATE_DIR"); err != nil {
		return err
	}
	http.HandleFunc("/_ping", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("/run", func(w http.ResponseWriter, r *http.Request) {
		results, err := runInChild(r.Context(), stateDir, r.FormValue("rootlesskit"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_ = json.NewEncoder(w).Encode(results) // whoever asks finds out
	})
	http.HandleFunc("/contract", func(w http.ResponseWriter, r *http.Request) {
		cmd := exec.CommandContext(r.Context(), os.Getenv(contract), "-test.v", "-test.parallel=2", "-test.run=^TestContractOfRootlessKit$")
		cmd.Env = append(os.Environ(), "BERTH_TEST_IN_NAMESPACE=1", "ROOTLESSKIT_STATE_DIR="+stateDir,
			"BERTH_CONTRACT_VERSION="+r.FormValue("rootlesskit"), "BERTH_CONTRACT_PORT="+r.FormValue("port"))
		out, err := cmd.CombinedOutput()
		if err != nil {
			http.Error(w, fmt.Sprintf("%v\n%s", err, out), http.StatusInternalServerError)
			return
		}
		_, _ = w.Write(out) // as above
	})
	l, err := net.Listen("unix", filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "docker.sock"))
	if err != nil {
		return err
	}
	return http.Serve(l, nil)
}

func runInChild(ctx context.Context, stateDir, version string) ([]Result, error) {
	rlk, err := Dial(ctx, version, filepath.Join(stateDir, "api.sock"))
	if err != nil {
		return nil, err
	}
	child := filepath.Join(stateDir, "netns")
	h := host{next: 20000}
	d := Driver{
		Client: rlk,
		Mapper: func(c Client) portmapperapi.PortMapper {
			return childMapper{nat.NewPortMapper(nat.Config{RlkClient: c}), child}
		},
		Hold:  hold,
		Ports: h.ports,
	}
	results, err := d.Run(ctx)
	if err != nil {
		return nil, err
	}
	left, err := rlk.ListPorts(ctx)
	if err != nil {
		return nil, err
	}
	if len(left) > 0 {
		return nil, fmt.Errorf("RootlessKit still has %v", left)
	}
	return results, h.waitUntilFree()
}

// childMapper is a port mapper that works in the child namespace.
type childMapper struct {
	nat.PortMapper
	netns string
}

func (m childMapper) MapPorts(ctx context.Context, reqs []portmapperapi.PortBindingReq) (pbs []portmapperapi.PortBinding, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlock it: the thread ends with the goroutine
		var ns *os.File
		if ns, err = os.Open(m.netns); err != nil {
			return
		}
		defer ns.Close()
		if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return
		}
		pbs, err = m.PortMapper.MapPorts(ctx, reqs)
	}()
	<-done
	return pbs, err
}

func hold(network, addr string, first, count int) (release func() error, err error) {
	p, err := hostload.Start(hostload.Load{Network: network, Address: addr, Ports: hostload.Range(first, first+count-1)})
	if err != nil {
		return nil, err
	}
	return func() error {
		_, err := p.Stop()
		return err
	}, nil
}

// host gives out ports that are free, none twice.
type host struct {
	next int
	used []int
}

func (h *host) ports(count int) (int, error) {
	for first := h.next; first < 30000; first++ {
		free := true
		for p := first; p < first+count && free; p++ {
			free = isFree(p)
		}
		if free {
			h.next = first + count
			for p := first; p < h.next; p++ {
				h.used = append(h.used, p)
			}
			return first, nil
		}
	}
	return 0, fmt.Errorf("no %d free ports in a row", count)
}

// isFree tells whether nobody has the port, on any address.
func isFree(port int) bool {
	for _, addr := range []string{"0.0.0.0", "::"} {
		at := net.JoinHostPort(addr, strconv.Itoa(port))
		l, err := net.Listen("tcp", at)
		if err != nil {
			return false
		}
		l.Close()
		u, err := net.ListenPacket("udp", at)
		if err != nil {
			return false
		}
		u.Close()
	}
	return true
}

// waitUntilFree returns an error if the driver does not release what was
// exposed: some do so a moment after they said it.
func (h *host) waitUntilFree() error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		h.used = slices.DeleteFunc(h.used, isFree)
		if len(h.used) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("host ports that nobody released: %v", h.used)
		}
	}
}

// rootlessKit is a port driver, with a network driver that serves it.
type rootlessKit struct{ version, binary, network, driver string }

var rootlessKits = []rootlessKit{
	{"2.3.6", "rootlesskit2", "slirp4netns", "builtin"},
	{"3.1.0", "rootlesskit31", "gvisor-tap-vsock", "builtin"},
	{"3.3.0", "rootlesskit", "gvisor-tap-vsock", "builtin"},
	{"3.1.0", "rootlesskit31", "gvisor-tap-vsock", "gvisor-tap-vsock"},
	{"3.3.0", "rootlesskit", "gvisor-tap-vsock", "gvisor-tap-vsock"},
	{"2.3.6", "rootlesskit2", "slirp4netns", "slirp4netns"},
	{"3.1.0", "rootlesskit31", "slirp4netns", "slirp4netns"},
	{"3.3.0", "rootlesskit", "slirp4netns", "slirp4netns"},
	{"3.3.0", "rootlesskit", "pasta", "pesto"},
}

// options are those of a stack with this test in dockerd's place.
func (k rootlessKit) options(t *testing.T, root, what string) stack.Options {
	t.Helper()
	self, err := os.Executable()
	assert.NilError(t, err)
	bin := checkout.Bin(root)
	o := stack.Options{
		Bin:         bin,
		Dockerd:     self,
		RootlessKit: filepath.Join(bin, k.binary),
		Net:         k.network,
		PortDriver:  k.driver,
		Log:         checkout.Log(root, "test", what+"-"+k.version+"-"+k.driver+".log"),
	}
	t.Cleanup(func() {
		if !t.Failed() {
			assert.NilError(t, os.Remove(o.Log))
			return
		}
		t.Logf("the stack's log: %s", o.Log)
	})
	return o
}

// ask asks what is in dockerd's place of the stack.
func ask(s *stack.Stack, path string) (string, error) {
	resp, err := stacktest.HTTP(s).Get("http://suite/" + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(string(body))
	}
	return string(body), err
}

// Seen is what the suite saw of a port driver, as it is in build/results.
type Seen struct {
	Driver, RootlessKit, Network string
	Results                      []Result
}

func TestPortDrivers(t *testing.T) {
	needs(t)
	root, err := checkout.Root()
	assert.NilError(t, err)
	var fake map[string][]Result
	t.Run("fake", func(t *testing.T) { fake = runFake(t, root) })
	var all []Seen
	for _, k := range rootlessKits {
		t.Run(k.version+"/"+k.driver, func(t *testing.T) {
			o := k.options(t, root, "portdriver")
			s := stacktest.At(t)
			assert.NilError(t, s.Up(t.Context(), o))
			answer, err := ask(s, "run?rootlesskit="+k.version)
			assert.NilError(t, err)
			var results []Result
			assert.NilError(t, json.Unmarshal([]byte(answer), &results))
			all = append(all, Seen{k.driver, k.version, k.network, results})
			cases := Cases()
			for i, r := range results {
				t.Run(r.Case, func(t *testing.T) {
					if i < len(cases) {
						check(t, k.driver, cases[i], r)
					}
					if fake != nil {
						assert.DeepEqual(t, does(fake[k.driver][i]), does(r))
					}
				})
			}
		})
	}
	if len(all) != len(rootlessKits) {
		return // -run chose some
	}
	stacktest.WriteResults(t, "port-drivers.json", all)
	t.Run("documentation", func(t *testing.T) {
		defer func() {
			if t.Failed() {
				t.Log("`make docs` writes docs/port-drivers.md anew: look at what has changed")
			}
		}()
		golden.Assert(t, document(all), filepath.Join(root, "docs", "port-drivers.md"))
	})
}

// needs skips the test where the cases cannot be made. Root has a network
// namespace for them.
func needs(t *testing.T) {
	t.Helper()
	data, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	assert.NilError(t, err)
	if got := strings.TrimSpace(string(data)); got != strconv.Itoa(LastPrivileged+1) {
		t.Skipf("net.ipv4.ip_unprivileged_port_start is %s here, not the kernel's default", got)
	}
	for _, at := range []string{"0.0.0.0:1024", "[::]:1024", "[::1]:0"} {
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Skip(err)
		}
		l.Close()
	}
}

// natTests is `go test` of the patch's tests, with those of testdata among them:
// the patch's folder imports nothing of this module, so what brings the two
// together is laid over it.
func natTests(t *testing.T, root string, args ...string) *exec.Cmd {
	t.Helper()
	replace := map[string]string{}
	for _, file := range []string{"fake_linux_test.go", "contract_linux_test.go"} {
		replace[filepath.Join(root, "daemon/libnetwork/portmappers/nat/portdriver_"+file)] = filepath.Join(root, "integration/portdriver/testdata", file)
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	assert.NilError(t, err)
	file := filepath.Join(t.TempDir(), "overlay")
	assert.NilError(t, os.WriteFile(file, overlay, 0o644))
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"test", "-overlay=" + file}, args...)...)
	cmd.Args = append(cmd.Args, "./daemon/libnetwork/portmappers/nat")
	cmd.Dir = root
	return cmd
}

// runFake runs the suite against the fake of the patch's tests, by driver.
func runFake(t *testing.T, root string) map[string][]Result {
	dir := t.TempDir()
	cmd := natTests(t, root, "-count=1", "-run=^TestPortDriverSuite$")
	cmd.Env = append(os.Environ(), "BERTH_PORTDRIVER_RESULTS="+filepath.Join(dir, "results"))
	out, err := cmd.CombinedOutput()
	assert.NilError(t, err, "%s", out)
	data, err := os.ReadFile(filepath.Join(dir, "results"))
	assert.NilError(t, err)
	var results map[string][]Result
	assert.NilError(t, json.Unmarshal(data, &results))
	return results
}

// does is what the fake must have in common with the driver: all but the words.
func does(r Result) Result {
	if r.Answer != "" {
		r.Answer = "refused"
	}
	for _, o := range []*Outcome{&r.Fixed, &r.Range} {
		if o.Error != "" {
			o.Error = "failed"
		}
	}
	return r
}

// check holds what came of a case against what a user of the driver may expect.
func check(t *testing.T, driver string, c Case, r Result) {
	free := c.Free
	if len(r.Served) == 0 {
		free = -1
	} else if driver == "pesto" && len(c.Own) == 0 {
		free = 0 // as it says
	} else if other6 := len(c.Held) == 1 && c.Held[0][3] == '6' && !slices.ContainsFunc(r.Served, isIPv6); other6 {
		free = 0
		if driver == "gvisor-tap-vsock" {
			free = 1 // its IPv4 wildcard is IPv6's, too
		}
	}
	assert.Check(t, is.Equal(r.Answer == "", free == 0), r.Answer)

	fixed := -1
	if free == 0 {
		fixed = 0
	}
	checkOutcome(t, r, r.Fixed, fixed, 1)
	checkOutcome(t, r, r.Range, free, c.Size)
}

// checkOutcome checks what came of a request for size ports: free is the one to
// be had, -1 if there is none.
func checkOutcome(t *testing.T, r Result, o Outcome, free, size int) {
	t.Helper()
	last := size - 1
	if r.Verdict == No {
		last = 0
	}
	var asked, published []string
	if free >= 0 {
		last = free
		for _, addr := range r.Served {
			published = append(published, addr+" "+name(free, 0))
		}
	}
	for p := 0; p <= last && len(r.Served) > 0; p++ {
		asked = append(asked, name(p, 0))
	}
	assert.Check(t, is.DeepEqual(o.Asked, asked))
	assert.Check(t, is.DeepEqual(o.Published, published))
	assert.Check(t, is.Equal(o.Error == "", free >= 0), o.Error)
}

func isIPv6(addr string) bool { return strings.Contains(addr, ":") }
