// Package stacktest gives a test a real stack in two lines:
//
//	func TestMain(m *testing.M) { stacktest.Main(m) }
//	d := stacktest.Start(t, "dockerd", stack.Options{})
//
// It needs build/bin, and what hack/deps.sh installs.
package stacktest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"berth/hack/checkout"
	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/whoami"
)

// Addresses are the host's addresses other than loopback, for tests run by root: Main makes them.
var Addresses = [2]string{"10.0.0.1", "10.0.0.2"}

// Users are those whose stacks root's tests run: a test can have one of each. hack/deps.sh makes them.
var Users = [3]string{stack.DefaultUser, "berth2", "berth3"}

const inNamespace = "BERTH_TEST_NETNS"

// standIn names what [Start] runs where a test asks for the patched daemon, dockerd:
// dockerd-race has the race detector in it.
const standIn = "BERTH_TEST_DOCKERD"

// Main runs the tests. Root's run in a network namespace that is made for them, with
// [Addresses]: every port is free there, and the machine's own are not touched. Another
// user's run in the namespace where the user is, since making one would cost the sub-ids
// that RootlessKit needs.
func Main(m *testing.M) {
	if os.Getuid() == 0 && os.Getenv(inNamespace) == "" {
		os.Exit(runInNamespace())
	}
	var stop func()
	interrupted, stop = signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(interrupted, downAndExit)
	if os.Getuid() == 0 {
		addAddresses()
	}
	code := m.Run()
	if interrupted.Err() != nil {
		select {} // downAndExit does
	}
	os.Exit(code)
}

// prepared names what [MainAfter] has made to the process that runs in the tests' own network.
const prepared = "BERTH_TEST_PREPARED"

// MainAfter is [Main] for tests that need what only the machine's own network has: modules to compile, a package to unpack.
// prepare makes it, and returns the path that [Prepared] tells.
func MainAfter(m *testing.M, prepare func() (path string, _ error)) {
	if Prepared() == "" {
		path, err := prepare()
		if err != nil {
			fmt.Fprintln(os.Stderr, "what the tests need:", err)
			os.Exit(1)
		}
		os.Setenv(prepared, path)
	}
	Main(m)
}

// Prepared is the path of what [MainAfter] has made.
func Prepared() string { return os.Getenv(prepared) }

// interrupted ends the start of a stack; what is up then is taken down by downAndExit.
var interrupted context.Context

func downAndExit() {
	purgeAt := func(user, name string) {
		s, err := place(user, name)
		for deadline := time.Now().Add(10 * time.Second); err == nil && time.Now().Before(deadline); {
			// The test may be at work there itself, for a moment.
			if _, err := s.Purge(interrupted, stack.Options{}); err == nil {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	for _, user := range Users {
		purgeAt(user, "")
	}
	beside.Lock()
	for _, name := range beside.names {
		purgeAt(Users[0], name)
	}
	os.Exit(1)
}

func addAddresses() {
	commands := [][]string{
		{"link", "set", "lo", "up"},
		// A way out that leads nowhere: without one, pasta serves IPv6 even if told not to.
		{"link", "add", "way-out", "type", "veth", "peer", "name", "nowhere"},
		{"link", "set", "nowhere", "up"},
		{"link", "set", "way-out", "up"},
		{"address", "add", "192.0.2.1/24", "dev", "way-out"}, // RFC 5737's
		{"route", "add", "default", "dev", "way-out"},
	}
	for _, a := range Addresses {
		commands = append(commands, []string{"address", "add", a + "/32", "dev", "lo"})
	}
	for _, c := range commands {
		if out, err := exec.Command("ip", c...).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "ip %s: %v: %s", strings.Join(c, " "), err, out)
			os.Exit(1)
		}
	}
}

// runInNamespace runs this program again, in a network namespace of its own.
func runInNamespace() int {
	// The death signal comes when the thread that started the process ends.
	runtime.LockOSThread()
	cmd := &exec.Cmd{Path: "/proc/self/exe", Args: os.Args}
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGTERM}
	// Ctrl-C reaches the process, too, and is answered there.
	signal.Ignore(os.Interrupt)
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() > 0 {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "run the tests in a network namespace:", err)
		return 1
	}
	return 0
}

// Daemon is the daemon of a running stack that has the test image.
type Daemon struct {
	*stack.Stack
	Options stack.Options // that it was started with
	Log     string        // file with the stack's output
	API     *client.Client
	docker  string
}

// Start starts a stack for the test with the daemon of that name from build/bin, or o.Bin,
// and imports the test image into it. The stack ends with the test, which fails if it leaves
// anything. Its log is kept in build/log when the test fails.
func Start(t testing.TB, dockerd string, o stack.Options) *Daemon {
	t.Helper()
	return StartAs(t, Users[0], dockerd, o)
}

// StartAs is [Start] for root, with the one of [Users] that the stack runs as.
func StartAs(t testing.TB, asUser, dockerd string, o stack.Options) *Daemon {
	t.Helper()
	root, err := checkout.Root()
	assert.NilError(t, err)
	s := at(t, asUser, "")
	if o.Bin == "" {
		o.Bin = checkout.Bin(root)
	}
	if name := os.Getenv(standIn); name != "" && dockerd == "dockerd" {
		dockerd = name
	}
	o.Dockerd = filepath.Join(o.Bin, dockerd)
	o.Args = append([]string{"--log-format", "json"}, o.Args...) // see ReadLog
	// Another package may have a test of that name, and run it now.
	o.Log = checkout.Log(root, "test", strings.ReplaceAll(tests()+"-"+t.Name(), "/", "-")+"-"+s.User()+".log")
	t.Cleanup(func() {
		purge(t, s)
		checkRaces(t, o.Log)
		if !t.Failed() {
			assert.NilError(t, os.Remove(o.Log))
			return
		}
		t.Logf("the stack's log: %s", o.Log)
	})
	assert.NilError(t, s.Up(interrupted, o))
	d := &Daemon{Stack: s, Options: o, Log: o.Log, docker: filepath.Join(o.Bin, "docker")}
	d.API, err = s.Client()
	assert.NilError(t, err)
	t.Cleanup(func() { d.API.Close() })
	assert.NilError(t, whoami.Import(t.Context(), root, d.API))
	return d
}

// At returns the test's place for a stack, with nothing there: what a killed test has left
// is removed first. What is there when the test ends is removed, too. The tests of a
// package share a place; packages are tested side by side.
func At(t testing.TB) *stack.Stack {
	t.Helper()
	return at(t, Users[0], "")
}

// Beside is [At] for a stack that is there beside the package's others. Its name is the test's own.
func Beside(t testing.TB, name string) *stack.Stack {
	t.Helper()
	beside.Lock()
	beside.names = append(beside.names, "-"+name)
	beside.Unlock()
	return at(t, Users[0], "-"+name)
}

// beside has the names that tests have given to stacks.
var beside struct {
	sync.Mutex
	names []string
}

func at(t testing.TB, asUser, name string) *stack.Stack {
	t.Helper()
	s, err := place(asUser, name)
	assert.NilError(t, err)
	purge(t, s)
	t.Cleanup(func() { purge(t, s) })
	return s
}

func purge(t testing.TB, s *stack.Stack) {
	t.Helper()
	_, err := s.Purge(context.Background(), stack.Options{Progress: t.Output()})
	assert.Check(t, err)
}

// Hold has another process hold host ports until the end of the test.
func Hold(t testing.TB, l hostload.Load) {
	t.Helper()
	p, err := hostload.Start(l)
	assert.NilError(t, err)
	t.Cleanup(func() {
		_, err := p.Stop()
		assert.NilError(t, err)
	})
}

// Kill ends that program of the stack, and does not let it clean up.
func Kill(t *testing.T, s *stack.Stack, program string) {
	t.Helper()
	p, err := s.Process(t.Context(), program)
	assert.NilError(t, err)
	assert.NilError(t, p.Signal(unix.SIGKILL))
}

func place(asUser, name string) (*stack.Stack, error) {
	return stack.AtUser("test-"+tests()+name, asUser)
}

// tests names the package whose tests this program runs.
func tests() string { return strings.TrimSuffix(filepath.Base(os.Args[0]), ".test") }

// behindAPI runs dockerd with another socket in the place of RootlessKit's API. It does so in
// RootlessKit's child, whose mounts are its own: on the host, RootlessKit's socket stays where it is.
const behindAPI = `#!/bin/sh
set -eu
api="$ROOTLESSKIT_STATE_DIR/api.sock"
# RootlessKit makes it when the child runs already.
until [ -S "$api" ]; do sleep 0.05; done
mount --bind "$BERTH_TEST_API" "$api"
exec dockerd "$@"
`

// Behind is the Env of a stack whose dockerd finds the socket where RootlessKit's API is. The
// stack's user must be able to connect to it.
func Behind(t *testing.T, socket string) []string {
	t.Helper()
	dir, err := os.MkdirTemp("", "berth-behind-") // t.TempDir keeps others out
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, os.RemoveAll(dir)) })
	assert.NilError(t, os.Chmod(dir, 0o755))
	script := filepath.Join(dir, "dockerd-behind-api")
	assert.NilError(t, os.WriteFile(script, []byte(behindAPI), 0o755))
	assert.NilError(t, os.Chmod(script, 0o755)) // whatever the umask
	return []string{"DOCKERD=" + script, "BERTH_TEST_API=" + socket}
}

// Docker runs the docker CLI and returns its output; the error has what it said.
func (d *Daemon) Docker(args ...string) (string, error) {
	cmd := exec.Command(d.docker, args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+d.Host())
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(string(out)), err
}

// Run runs the test image with each of the ports published, until the end of the test, and
// returns the container's id.
func (d *Daemon) Run(t *testing.T, publish ...string) (id string, _ error) {
	t.Helper()
	args := []string{"run", "-d", "--label", "test=" + t.Name()}
	for _, p := range publish {
		args = append(args, "-p", p)
	}
	t.Cleanup(func() {
		if !d.Running(context.Background()) {
			return
		}
		// A container that could not be started is there, too.
		ids, err := d.Docker("ps", "-aq", "--filter", "label=test="+t.Name())
		assert.NilError(t, err)
		if ids != "" {
			_, err = d.Docker(append([]string{"rm", "-f"}, strings.Fields(ids)...)...)
			assert.NilError(t, err)
		}
	})
	return d.Docker(append(args, whoami.Image)...)
}

// Published returns the host addresses where the container's ports are published.
func (d *Daemon) Published(t *testing.T, id string) []netip.AddrPort {
	t.Helper()
	ports, err := d.Ports(t.Context(), id)
	assert.NilError(t, err)
	var list []netip.AddrPort
	for _, at := range ports {
		list = append(list, at...)
	}
	slices.SortFunc(list, netip.AddrPort.Compare)
	return list
}

// Ports returns the host addresses of the running container's ports.
func (d *Daemon) Ports(ctx context.Context, id string) (map[network.Port][]netip.AddrPort, error) {
	found, err := d.API.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if err != nil {
		return nil, err
	}
	published := map[network.Port][]netip.AddrPort{}
	for port, bindings := range found.Container.NetworkSettings.Ports {
		for _, b := range bindings {
			hostPort, err := strconv.ParseUint(b.HostPort, 10, 16)
			if err != nil {
				return nil, fmt.Errorf("container %.12s, port %s: %w", id, port, err)
			}
			published[port] = append(published[port], netip.AddrPortFrom(b.HostIP, uint16(hostPort)))
		}
	}
	return published, nil
}

// Create makes a container of the test image with the ports published, and returns its id.
func (d *Daemon) Create(ctx context.Context, ports network.PortMap) (id string, _ error) {
	made, err := d.API.ContainerCreate(ctx, client.ContainerCreateOptions{
		Image:      whoami.Image,
		HostConfig: &container.HostConfig{PortBindings: ports},
	})
	return made.ID, err
}

// HTTP returns a client of the API of whatever is in the stack's place of a daemon, at any URL, for what dockerd's own client
// does not ask.
func HTTP(s *stack.Stack) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       s.Dial,
	}}
}

// AssertAnswers checks that a container of the test image is what answers at the address, which
// may be all of a family; network is tcp or udp.
func AssertAnswers(t *testing.T, network string, at netip.AddrPort, id string) {
	t.Helper()
	assert.NilError(t, whoami.Await(network, at, id, answerLimit))
}

// answerLimit is for a container's program to serve, on a busy machine.
const answerLimit = 30 * time.Second

// WriteResults keeps what a test has seen in build/results, as JSON.
func WriteResults(t *testing.T, name string, results any) {
	t.Helper()
	report, err := json.MarshalIndent(results, "", "  ")
	assert.NilError(t, err)
	WriteText(t, name, string(report))
}

// WriteText is [WriteResults] for what people read; it ends the last line.
func WriteText(t *testing.T, name, text string) {
	t.Helper()
	root, err := checkout.Root()
	assert.NilError(t, err)
	dir := checkout.Results(root)
	assert.NilError(t, os.MkdirAll(dir, 0o755))
	assert.NilError(t, os.WriteFile(filepath.Join(dir, name), []byte(strings.TrimRight(text, "\n")+"\n"), 0o644))
}
