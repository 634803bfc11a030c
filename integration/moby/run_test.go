//go:build integration

package moby

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"berth/hack/checkout"
	"berth/hack/pins"
)

const (
	rootless    = "rootless"
	rootful     = "rootful"
	stockDaemon = "dockerd-stock"
	berthDaemon = "dockerd"

	sayEvery = 30 * time.Second
)

// suite is which of upstream's tests to run, and on what kind of host.
type suite struct {
	Mode     string
	Packages []string
	Run      []string `json:",omitempty"` // the tests' names; nil is all of them
	Times    int      // each
	Hold     []string `json:",omitempty"` // networks of which the host's first dynamic ports are held
}

// binaries are upstream's tests, built.
type binaries struct {
	root string // the checkout
	tree string // the base's, relative to build/
	dir  string // where the binaries are, relative to build/
}

// prepare builds what is not built yet.
func prepare(t *testing.T) binaries {
	t.Helper()
	needRoot(t)
	root, err := checkout.Root()
	assert.NilError(t, err)
	list, err := pins.Load(filepath.Join(root, "vendor.conf"))
	assert.NilError(t, err)
	base, err := pins.Base(list, "")
	assert.NilError(t, err)
	b := binaries{root: root, tree: "tree/" + base.Version + "/stock", dir: "moby/" + base.Version}
	b.build(t, root, "test2json", "build", "cmd/test2json")
	for _, pkg := range packages {
		if *all || pkg == packages[0] {
			b.build(t, filepath.Join(root, "build", b.tree), filepath.Base(pkg)+".test", "test", "-c", "./"+pkg)
		}
	}
	return b
}

// build builds a program that depends on the base alone, and so is built once. The first one takes minutes.
func (b binaries) build(t *testing.T, dir, name, verb string, args ...string) {
	t.Helper()
	file := filepath.Join(b.root, "build", b.dir, name)
	if _, err := os.Stat(file); err == nil {
		return
	}
	t.Logf("building %s", name)
	assert.NilError(t, os.MkdirAll(filepath.Dir(file), 0o755))
	// As `berth build` compiles, for its cache.
	cmd := exec.CommandContext(t.Context(), "go", slices.Concat([]string{verb, "-trimpath", "-buildvcs=false", "-o", file + ".tmp"}, args)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=-mod=readonly")
	out, err := cmd.CombinedOutput()
	assert.NilError(t, err, "%s", out)
	assert.NilError(t, os.Rename(file+".tmp", file))
}

// both runs the tests with stock and with Berth at once, each on a host of its own: much of what they do is to wait.
func (b binaries) both(t *testing.T, s suite) (stock, berth map[string]tally) {
	t.Helper()
	before := cgroups(t)
	ran := t.Run("both", func(t *testing.T) {
		t.Run("stock", func(t *testing.T) {
			t.Parallel()
			stock = b.run(t, stockDaemon, s)
		})
		t.Run("Berth", func(t *testing.T) {
			t.Parallel()
			berth = b.run(t, berthDaemon, s)
		})
	})
	for _, dir := range slices.Backward(cgroups(t)) {
		if !slices.Contains(before, dir) {
			assert.Check(t, os.Remove(dir))
		}
	}
	if !ran {
		t.FailNow()
	}
	if *all {
		keep(t, b.root, record{stockDaemon, s, stock}, record{berthDaemon, s, berth})
	}
	return stock, berth
}

// run runs the tests on a host of their own, and returns what became of each, by package and name. What they said is in build/log.
func (b binaries) run(t *testing.T, dockerd string, s suite) map[string]tally {
	t.Helper()
	j := job{Build: filepath.Join(b.root, "build"), Dockerd: dockerd, Rootless: s.Mode == rootless, Hold: held(s.Hold), Test2JSON: b.dir + "/test2json"}
	pattern := "."
	if s.Run != nil {
		pattern = "^(" + strings.Join(s.Run, "|") + ")$"
	}
	for _, pkg := range s.Packages {
		j.Runs = append(j.Runs, testRun{
			Package: pkg, Dir: b.tree + "/" + pkg, Binary: b.dir + "/" + filepath.Base(pkg) + ".test",
			Args: []string{"-test.run=" + pattern, "-test.count=" + fmt.Sprint(s.Times), "-test.timeout=3h"},
		})
	}
	name := strings.Join(slices.Concat([]string{"moby", s.Mode, dockerd, fmt.Sprint("x", s.Times)}, s.Hold), "-") + ".log"
	log, err := os.Create(checkout.Log(b.root, name))
	assert.NilError(t, err)
	defer log.Close()

	results := map[string]tally{}
	start := time.Now()
	err = j.do(log, func(e event) { count(t, results, e, s.Mode+", "+dockerd, &start) })
	assert.NilError(t, err, "the whole log: build/log/%s", name)
	sum := total(results)
	t.Logf("%s, %s: %v; the log: build/log/%s", s.Mode, dockerd, sum, name)
	assert.Assert(t, sum.Pass+sum.Fail > 0, "no test ran")
	if s.Run != nil {
		assert.DeepEqual(t, topLevel(maps.Keys(results)), slices.Sorted(slices.Values(s.Run)))
	}
	return results
}

// event is one of test2json's.
type event struct{ Action, Package, Test, Output string }

// do does the job on a host of its own, and tells saw what the tests tell. Nothing of the host is left when it returns.
func (j job) do(log io.Writer, saw func(event)) error {
	data, err := json.Marshal(j)
	if err != nil {
		return err
	}
	cmd := &exec.Cmd{Path: "/proc/self/exe", Args: []string{outsideName, string(data)}, Stderr: log}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true, // a Ctrl-C is for us
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
	}
	// The host lives as long as this is open, and nobody but us has it.
	alive, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	defer alive.Close()
	events, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start a host: %w", err)
	}
	defer context.AfterFunc(interrupted, func() { alive.Close() })()
	for dec := json.NewDecoder(events); ; {
		var e event
		if err = dec.Decode(&e); err != nil {
			break
		}
		_, _ = io.WriteString(log, e.Output)
		saw(e)
	}
	alive.Close()
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return errors.Join(interrupted.Err(), err, cmd.Wait())
}

// count counts what an event tells, and tells it on where it is news.
func count(t *testing.T, results map[string]tally, e event, where string, said *time.Time) {
	name := e.Package + "." + e.Test
	r := results[name]
	switch e.Action {
	case "pass":
		r.Pass++
	case "skip":
		r.Skip++
	case "fail":
		r.Fail++
	default:
		return
	}
	if e.Test == "" { // the package's, which is worth something only when no test of its says why
		if e.Action == "fail" && total(results).Fail == 0 {
			t.Errorf("%s: %s failed, and none of its tests did", where, e.Package)
		}
		return
	}
	results[name] = r
	if time.Since(*said) > sayEvery {
		*said = time.Now()
		t.Logf("%s: %v so far; %s: %s", where, total(results), e.Action, name)
	}
}

func total(results map[string]tally) tally {
	var sum tally
	for _, r := range results {
		sum = add(sum, r)
	}
	return sum
}

// cgroups lists what a rootful daemon makes in the machine's cgroups, which it shares: parents before children.
func cgroups(t *testing.T) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(path+"/", "/docker/") {
			list = append(list, path)
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) { // somebody else's, gone since
			return nil
		}
		return err
	})
	assert.NilError(t, err)
	return list
}
