//go:build integration

// Package e2e shows the whole thing on real stacks and real containers: what stock fails
// at, Berth publishes.
package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/procfs"
	"gotest.tools/v3/assert"

	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
)

func TestMain(m *testing.M) { stacktest.Main(m) }

// scenario is a start that has a free host port to come out at, but not the first one.
type scenario struct {
	name    string
	publish []string

	// hold is what another process has on the host; next is the port that the daemon would
	// take for a dynamic one.
	hold func(next int) hostload.Load

	stockSays string // in the error that stock fails with
	port      int    // the only host port that will do; 0 if there are many
	root      string // why only root can run it
}

const needsAddresses = "host addresses other than loopback are added in a network namespace, which takes root"

var scenarios = []scenario{
	{
		name:    "dynamic port",
		publish: []string{"0:80"},
		hold: func(next int) hostload.Load {
			return hostload.Load{Network: "tcp4", Ports: hostload.Range(next, next+9)}
		},
		stockSays: "address already in use",
	},
	{
		name:    "dynamic UDP port",
		publish: []string{"0:80/udp"},
		hold: func(next int) hostload.Load {
			return hostload.Load{Network: "udp4", Ports: hostload.Range(next, next+9)}
		},
		stockSays: "address already in use",
	},
	{
		name:    "range with only the last one free",
		publish: []string{"20000-20019:80"},
		hold: func(int) hostload.Load {
			return hostload.Load{Network: "tcp4", Ports: hostload.Range(20000, 20018)}
		},
		stockSays: "address already in use",
		port:      20019,
	},
	{
		name:      "range that begins with privileged ports",
		publish:   []string{"1000-1100:80"},
		stockSays: "permission denied",
		port:      1024,
	},
	{
		name:      "two host addresses, dynamic port",
		publish:   []string{stacktest.Addresses[0] + "::80", stacktest.Addresses[1] + "::80"},
		stockSays: "address already in use",
		root:      needsAddresses,
	},
	{
		name:    "two host addresses, dynamic port, taken on the second",
		publish: []string{stacktest.Addresses[0] + "::80", stacktest.Addresses[1] + "::80"},
		hold: func(next int) hostload.Load {
			return hostload.Load{Network: "tcp4", Address: stacktest.Addresses[1], Ports: hostload.Range(next, next+9)}
		},
		stockSays: "address already in use",
		root:      needsAddresses,
	},
	{
		name:      "two host addresses, fixed port",
		publish:   []string{stacktest.Addresses[0] + ":20100:80", stacktest.Addresses[1] + ":20100:80"},
		stockSays: "address already in use",
		port:      20100,
		root:      needsAddresses,
	},
}

func TestStockFails(t *testing.T) {
	d := stacktest.Start(t, "dockerd-stock", stack.Options{})
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			s.prepare(t, d)
			_, err := d.Run(t, s.publish...)
			assert.ErrorContains(t, err, s.stockSays)
		})
	}
}

func TestBerthPublishes(t *testing.T) {
	d := stacktest.Start(t, "dockerd", stack.Options{})
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			s.prepare(t, d)
			id, err := d.Run(t, s.publish...)
			assert.NilError(t, err)
			published := d.Published(t, id)
			assert.Assert(t, len(published) >= len(s.publish), "published at %v", published)
			for _, a := range published {
				assert.Equal(t, a.Port(), published[0].Port(), "published at %v", published)
				stacktest.AssertAnswers(t, s.network(), a, id)
			}
			if s.port != 0 {
				assert.Equal(t, int(published[0].Port()), s.port)
			}
		})
	}
}

func (s scenario) network() string { return networkOf(s.publish[0]) }

func networkOf(publish string) string {
	if strings.HasSuffix(publish, "/udp") {
		return "udp"
	}
	return "tcp"
}

// prepare takes the host ports that the scenario wants taken.
func (s scenario) prepare(t *testing.T, d *stacktest.Daemon) {
	t.Helper()
	if s.root != "" && os.Getuid() != 0 {
		t.Skip(s.root)
	}
	if s.hold != nil {
		stacktest.Hold(t, s.hold(nextPort(t, d, s.network())))
	}
}

// nextPort is the port after the one that the daemon publishes now.
func nextPort(t *testing.T, d *stacktest.Daemon, network string) int {
	t.Helper()
	id, err := d.Run(t, "0:80/"+network)
	assert.NilError(t, err)
	next := int(d.Published(t, id)[0].Port()) + 1
	_, err = d.Docker("rm", "-f", id)
	assert.NilError(t, err)
	return next
}

func TestStopFreesTheHostPort(t *testing.T) {
	d := stacktest.Start(t, "dockerd", stack.Options{})
	id, err := d.Run(t, "0:80", "0:80/udp")
	assert.NilError(t, err)
	published := d.Published(t, id)
	_, err = d.Docker("stop", id)
	assert.NilError(t, err)
	for _, a := range published {
		l, err := net.Listen("tcp", a.String())
		assert.NilError(t, err)
		assert.NilError(t, l.Close())
		u, err := net.ListenPacket("udp", a.String())
		assert.NilError(t, err)
		assert.NilError(t, u.Close())
	}
}

func TestFixedPortInUse(t *testing.T) {
	d := stacktest.Start(t, "dockerd", stack.Options{})
	stacktest.Hold(t, hostload.Load{Network: "tcp4", Ports: []int{20200}})
	_, err := d.Run(t, "20200:80")
	assert.ErrorContains(t, err, "listen tcp4 0.0.0.0:20200")
	assert.ErrorContains(t, err, "address already in use")
	// The kernel hides whose it is, and /proc which one, from a user namespace.
	who := "another process of this user has it"
	if os.Getuid() == 0 {
		who = "another user's process has it"
	}
	assert.ErrorContains(t, err, who+"; stop what holds it (sudo ss -ltnp 'sport = :20200')")
	if os.Getuid() == 0 {
		out, err := exec.Command("ss", "-ltnp", "sport = :20200").Output()
		assert.NilError(t, err)
		assert.Assert(t, strings.Contains(string(out), "users:(("), "the advice names nobody: %s", out)
	}
}

func TestDownLeavesNothing(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("without a network namespace of the tests' own, others' sockets come and go: that takes root")
	}
	s := stacktest.At(t)
	before := machine(t, s)
	d := stacktest.Start(t, "dockerd", stack.Options{})
	for range 3 {
		_, err := d.Run(t, "0:80", "0:80/udp")
		assert.NilError(t, err)
	}
	assert.Assert(t, machine(t, s) != before, "the stack is not seen")
	_, err := s.Purge(t.Context(), d.Options)
	assert.NilError(t, err)
	assert.Equal(t, machine(t, s), before)
}

// machine says what there is on the machine that a stack makes: processes, mounts, sockets
// and files. It finds them in another way than [stack.Stack.Down] does.
func machine(t *testing.T, s *stack.Stack) string {
	t.Helper()
	var b strings.Builder
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	assert.NilError(t, err)
	fmt.Fprintf(&b, "mounts:\n%s", mounts)

	fmt.Fprintf(&b, "sockets:\n%s", sockets(t))

	fmt.Fprintln(&b, "processes:")
	processes, err := filepath.Glob("/proc/[0-9]*")
	assert.NilError(t, err)
	for _, p := range processes {
		for _, file := range []string{"environ", "cmdline", "mountinfo"} {
			if data, err := os.ReadFile(filepath.Join(p, file)); err == nil && strings.Contains(string(data), s.Dir) {
				fmt.Fprintln(&b, p)
				break
			}
		}
	}

	fmt.Fprintln(&b, "files:")
	user, err := user.Lookup(s.User())
	assert.NilError(t, err)
	for _, dir := range []string{s.Dir, os.TempDir(), "/dev/shm", "/run", "/run/user/" + user.Uid} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			assert.Assert(t, errors.Is(err, os.ErrNotExist), err)
		}
		for _, e := range entries {
			info, err := e.Info()
			if err != nil || dir != s.Dir && fmt.Sprint(info.Sys().(*syscall.Stat_t).Uid) != user.Uid {
				continue
			}
			fmt.Fprintln(&b, filepath.Join(dir, e.Name()))
		}
	}
	return b.String()
}

// sockets lists those that can be reached on the host, a line each; the network namespace is the tests' own.
func sockets(t *testing.T) string {
	t.Helper()
	var lines []string
	for _, s := range stacktest.Sockets(t) {
		lines = append(lines, s.String()+"\n")
	}
	unix, err := procfs.NewDefaultFS()
	assert.NilError(t, err)
	paths, err := unix.NetUNIX()
	assert.NilError(t, err)
	for _, s := range paths.Rows {
		if s.Path != "" {
			lines = append(lines, "unix "+s.Path+"\n")
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}
