package nat

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// inChild moves the test to a network namespace of its own, as dockerd does
// before it calls MapPorts. The rest of the process stays on the host.
func inChild(t testing.TB) {
	runtime.LockOSThread()
	assert.NilError(t, unix.Unshare(unix.CLONE_NEWNET))
	assert.NilError(t, bringUpLoopback())
	stateDir := t.TempDir()
	assert.NilError(t, os.Symlink(fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid()), filepath.Join(stateDir, "netns")))
	t.Setenv("ROOTLESSKIT_STATE_DIR", stateDir)
	t.Cleanup(func() {
		fd, err := unix.Open("/proc/self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0) // The main thread's.
		assert.NilError(t, err)
		defer unix.Close(fd)
		assert.NilError(t, unix.Setns(fd, unix.CLONE_NEWNET))
		runtime.UnlockOSThread()
	})
}

// newHostFake is newFake with a port driver that listens on the host.
func newHostFake(t testing.TB) *fakeDriver {
	f := newFake(t)
	f.listens = true
	return f
}

// occupy makes another process hold the host's ports from first to last.
func occupy(t testing.TB, proto, ip string, first, last int) {
	for port := first; port <= last; port++ {
		l, err := listenOnHost(t, mapping{proto, netip.MustParseAddr(ip), port})
		assert.NilError(t, err)
		t.Cleanup(func() { l.Close() })
	}
}

// setSysctl sets a sysctl of the namespace that is the tests' host.
func setSysctl(t testing.TB, name, value string) {
	file := "/proc/sys/net/ipv4/" + name
	set := func(value []byte) {
		onHost(func() { assert.NilError(t, os.WriteFile(file, value, 0)) })
	}
	var before []byte
	onHost(func() {
		var err error
		before, err = os.ReadFile(file)
		assert.NilError(t, err)
	})
	set([]byte(value))
	t.Cleanup(func() { set(before) })
}

func TestTakenHostPortsAreNotAskedFor(t *testing.T) {
	for _, proto := range []types.Protocol{types.TCP, types.UDP} {
		t.Run(proto.String(), func(t *testing.T) {
			f := newHostFake(t)
			inChild(t)
			occupy(t, proto.String(), "0.0.0.0", 32768, 32867)
			// Free for IPv4, and for IPv6 only every other one.
			for port := 32868; port <= 32900; port += 2 {
				occupy(t, proto.String(), "::", port, port)
			}
			pm := NewPortMapper(Config{RlkClient: f})
			publish := func(addrs ...string) int {
				pbs, err := pm.MapPorts(context.Background(), ask(proto, 0, 0, addrs...))
				assert.NilError(t, err)
				t.Cleanup(func() { assert.Check(t, pm.UnmapPorts(context.Background(), pbs)) })
				return int(pbs[0].HostPort)
			}
			assert.Check(t, is.Equal(publish("0.0.0.0", "::"), 32869))
			assert.Check(t, is.DeepEqual(f.asked, []int{32768, 32869, 32869}), "only the first is asked for without a look")
			assert.Check(t, is.Equal(publish("127.0.0.1"), 32870), "the search goes on from the last one")
			assert.Check(t, is.Equal(f.calls, 4))
		})
	}
}

func TestUsersRangeIsLookedAtToo(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	occupy(t, "tcp", "127.0.0.1", 8000, 8039)
	assert.Check(t, is.Equal(published(t, f, ask(types.TCP, 8000, 8040, "0.0.0.0")), 8040))
	assert.Check(t, is.DeepEqual(f.asked, []int{8000, 8040}))
}

func TestRangeAllTakenOnTheHost(t *testing.T) {
	f := newHostFake(t)
	occupy(t, "tcp", "0.0.0.0", 8000, 8040)
	synctest.Test(t, func(t *testing.T) {
		inChild(t)
		start := time.Now()
		err := refused(t, f, context.Background(), ask(types.TCP, 8000, 8040, "0.0.0.0"))
		for _, want := range []string{"8000-8040", "41 tried, and none can be had", "bind: address already in use"} {
			assert.Check(t, is.ErrorContains(err, want))
		}
		assert.Check(t, is.Equal(time.Since(start), time.Duration(0)))
	})
	assert.Check(t, is.Equal(f.calls, 1))
}

// An exhausted range names the last refusal that is not this daemon's own.
func TestExhaustedRangeWithAViewNamesAnothers(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	pm := NewPortMapper(Config{RlkClient: f})
	pbs, err := pm.MapPorts(context.Background(), ask(types.TCP, 8000, 8002, "0.0.0.0"))
	assert.NilError(t, err)
	more, err := pm.MapPorts(context.Background(), ask(types.TCP, 8002, 8002, "0.0.0.0"))
	assert.NilError(t, err)
	pbs = append(pbs, more...)
	l, err := listenOnHost(t, mapping{"tcp", netip.IPv4Unspecified(), 8001})
	assert.NilError(t, err)
	_, err = pm.MapPorts(context.Background(), ask(types.TCP, 8000, 8002, "0.0.0.0"))
	assert.Check(t, is.ErrorContains(err, "2 tried, and none can be had: host port 0.0.0.0:8001/tcp: listen tcp4 0.0.0.0:8001: bind: address already in use"))
	assert.NilError(t, l.Close())

	last, err := pm.MapPorts(context.Background(), ask(types.TCP, 8000, 8002, "0.0.0.0"))
	assert.NilError(t, err)
	pbs = append(pbs, last...)
	_, err = pm.MapPorts(context.Background(), ask(types.TCP, 8000, 8002, "0.0.0.0"))
	assert.Check(t, is.ErrorContains(err, "port is already allocated; stop the container that has it"))
	assert.Check(t, pm.UnmapPorts(context.Background(), pbs))
}

func TestHostsDynamicRangeCounts(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	setSysctl(t, "ip_local_port_range", "40000 40005")
	setSysctl(t, "ip_local_reserved_ports", "40000,40002-40003")
	pm := NewPortMapper(Config{RlkClient: f})
	publish := func(first, last int) int {
		t.Helper()
		pbs, err := pm.MapPorts(context.Background(), ask(types.TCP, first, last, "0.0.0.0"))
		assert.NilError(t, err)
		t.Cleanup(func() { assert.Check(t, pm.UnmapPorts(context.Background(), pbs)) })
		return int(pbs[0].HostPort)
	}
	for _, want := range []int{40001, 40004, 40005} {
		assert.Check(t, is.Equal(publish(0, 0), want))
	}
	// The user's own word counts more.
	assert.Check(t, is.Equal(publish(40002, 40002), 40002))
	// An administrator's change counts for the next one.
	setSysctl(t, "ip_local_port_range", "41000 41005")
	assert.Check(t, is.Equal(publish(0, 0), 41000))

	setSysctl(t, "ip_local_reserved_ports", "41000-41005")
	err := refused(t, f, context.Background(), ask(types.TCP, 0, 0, "127.0.0.1"))
	assert.Check(t, is.ErrorContains(err, "dynamic host port (41000-41005)"))
	assert.Check(t, is.ErrorContains(err, "0 tried"))
	assert.Check(t, is.ErrorContains(err, "all of them are reserved"))
}

// TCP and UDP of one container come out at one number, as with stock.
func TestProtocolsKeepStep(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	pm := NewPortMapper(Config{RlkClient: f})
	// A user's own range is none of theirs.
	for want := 32768; want < 32773; want++ {
		unmap(t, pm, mapped(t, pm, ask(types.TCP, 50000, 50001, "0.0.0.0")))
		for _, proto := range []types.Protocol{types.TCP, types.UDP} {
			pbs, err := pm.MapPorts(context.Background(), ask(proto, 0, 0, "0.0.0.0", "::"))
			assert.NilError(t, err)
			assert.Check(t, is.Equal(int(pbs[0].HostPort), want))
			t.Cleanup(func() { assert.Check(t, pm.UnmapPorts(context.Background(), pbs)) })
		}
	}
}

// Where the kernel denies a port, RootlessKit is asked: it may have a capability
// that the daemon has not got on the host.
func TestPrivilegedHostPorts(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	setSysctl(t, "ip_unprivileged_port_start", "1050")
	f.answer = func(_ int, m mapping) error {
		if m.port < 1050 {
			return fmt.Errorf("%slisten tcp4 %s:%d: bind: permission denied", answerPrefix, m.ip, m.port)
		}
		return nil
	}
	assert.Check(t, is.Equal(published(t, f, ask(types.TCP, 1000, 1100, "0.0.0.0")), 1050))
	err := refused(t, f, context.Background(), ask(types.TCP, 1049, 1049, "0.0.0.0"))
	assert.Check(t, is.ErrorContains(err, "from 1050 up"))

	withoutCapability(t, unix.CAP_NET_BIND_SERVICE) // On this thread: those on the test's host have it.
	l := look{proto: types.TCP, addrs: []address{{host: netip.IPv4Unspecified()}}}
	ports := []int{1000}
	free, _ := l.find(func() int { p := ports[0]; ports = ports[1:]; return p })
	assert.Check(t, is.Equal(free, 1000))
}

// What was bound to look at a port that is free on the first address only is not in the way of the next one.
func TestPortsTakenOnOneOfTwoAddresses(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	for port, addr := range map[int]string{8000: "127.0.0.1", 8001: "127.0.0.2", 8002: "127.0.0.1"} {
		occupy(t, "tcp", addr, port, port)
	}
	assert.Check(t, is.Equal(published(t, f, ask(types.TCP, 8000, 8003, "127.0.0.1", "127.0.0.2")), 8003))
	assert.Check(t, is.DeepEqual(f.asked, []int{8000, 8003, 8003}), "only the first is asked for without a look")
}

// A connection that was served is in TIME_WAIT for a minute: RootlessKit can listen all the same.
func TestServedConnectionsDoNotMatterToALook(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	occupy(t, "tcp", "127.0.0.1", 5353, 5353)
	serveOnHost(t, "127.0.0.1:5354")
	assert.Check(t, is.Equal(published(t, f, ask(types.TCP, 5353, 5354, "127.0.0.1")), 5354))
}

// What the kernel says of a port, but that it's taken, is for RootlessKit to say.
func TestLookThatDoesNotHelp(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	err := refused(t, f, context.Background(), ask(types.TCP, 0, 0, "fe80::1")) // EINVAL: no zone.
	assert.Check(t, is.Equal(f.calls, 1))
	assert.Check(t, is.ErrorContains(err, "invalid argument"))
}

func TestAddressThatTheHostHasNot(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	occupy(t, "tcp", "127.0.0.1", 32768, 32768)
	err := refused(t, f, context.Background(), ask(types.TCP, 0, 0, "127.0.0.1", "192.0.2.1"))
	assert.Check(t, is.ErrorContains(err, "listen tcp4 192.0.2.1:"))
	assert.Check(t, is.ErrorContains(err, "cannot assign requested address; publish on an address that the host has"))
	assert.Check(t, is.DeepEqual(f.asked, []int{32768, 32769, 32769}))
}

// A port driver that refuses what looks free is asked in order, then at random.
func TestPortsThatOnlyThePortDriverRefuses(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	f.holdRange(32768, 32768+999)
	published(t, f, ask(types.TCP, 0, 0, "0.0.0.0"))
	assert.Check(t, f.calls > 8 && f.calls < 64, "%d calls", f.calls)

	f.taken = func(int) bool { return true }
	calls := f.calls
	err := refused(t, f, context.Background(), ask(types.TCP, 0, 0, "0.0.0.0"))
	assert.Check(t, is.ErrorContains(err, "address already in use"))
	assert.Check(t, is.Equal(f.calls, calls+64))
}

// A container of the host's network has them in the child, where that is none:
// each is asked for once.
func TestDynamicPortsAllTakenInTheChild(t *testing.T) {
	for _, n := range []int{7, 8, 16, 64} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			f := newHostFake(t)
			synctest.Test(t, func(t *testing.T) {
				inChild(t)
				setSysctl(t, "ip_local_port_range", fmt.Sprintf("40000 %d", 40000+n-1))
				for port := 40000; port < 40000+n; port++ {
					l, err := net.Listen("tcp", fmt.Sprintf("%s:%d", f.child4, port))
					assert.NilError(t, err)
					defer l.Close()
				}
				start := time.Now()
				err := refused(t, f, context.Background(), ask(types.TCP, 0, 0, "0.0.0.0"))
				assert.Check(t, is.ErrorContains(err, fmt.Sprintf("%d tried, and none can be had: child namespace: failed to bind host port", n)))
				assert.Check(t, is.Equal(time.Since(start), time.Duration(0)))
			})
			assert.Check(t, is.Equal(f.calls, 0))
		})
	}
}

// A search passes a block by jumping, and still comes to each port, whichever is free.
func TestBlockIsJumped(t *testing.T) {
	h := &hostPorts{walk: walk{first: 32768, last: 60999, at: 32768}, req: &request{}}
	seen := map[int]bool{}
	for i := range jumpAfter {
		assert.Assert(t, is.Equal(h.step(), 32768+i))
		seen[32768+i] = true
	}
	jumps, before := 0, 32768+jumpAfter-1
	for port := h.step(); port != 0; port = h.step() {
		assert.Assert(t, !seen[port], "%d after %d others", port, len(seen))
		seen[port] = true
		if port != before+1 {
			jumps++
		}
		before = port
	}
	assert.Check(t, jumps > 2, "%d jumps", jumps) // One takes it to the range's end and back.
	assert.Check(t, is.Equal(len(seen), 28232))

	one := walk{first: 8080, last: 8080}
	one.jump()
	assert.Check(t, one.step() == 8080 && one.step() == 0)
}

func TestLongListOfReservedPorts(t *testing.T) {
	inChild(t)
	var list []string
	for port := 40000; port < 42000; port += 2 {
		list = append(list, fmt.Sprint(port))
	}
	setSysctl(t, "ip_local_reserved_ports", strings.Join(list, ","))
	var reserved portSet
	reserved.parse(string(hostSetting(reservedPorts, make([]byte, 64))))
	for port := 40000; port < 42000; port++ {
		assert.Check(t, is.Equal(reserved.has(port), port%2 == 0), port)
	}
}

// What the daemon starts has none of the files that it keeps open.
func TestSettingsAreNotHandedDown(t *testing.T) {
	for name, fd := range settings() {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		assert.NilError(t, err)
		assert.Check(t, flags&unix.FD_CLOEXEC != 0, name)
	}
}

func TestWhatASlirpShrugMeans(t *testing.T) {
	f := newHostFake(t)
	f.shrugs = true
	inChild(t)
	f.taken = func(port int) bool { return true }
	occupy(t, "tcp", "0.0.0.0", 8080, 8080)
	for _, tc := range []struct {
		ip   string
		port int
		want string
	}{
		{"0.0.0.0", 8080, "slirp_add_hostfwd failed: listen tcp4 0.0.0.0:8080: bind: address already in use"},
		{"192.0.2.1", 8080, "slirp_add_hostfwd failed: listen tcp4 192.0.2.1:8080: bind: cannot assign requested address"},
		{"0.0.0.0", 8081, "slirp_add_hostfwd failed; see who has it"},
	} {
		err := refused(t, f, context.Background(), ask(types.TCP, tc.port, tc.port, tc.ip))
		assert.Check(t, is.ErrorContains(err, tc.want))
	}
	assert.Check(t, is.Equal(f.calls, 3))

	// In a search, an address that the host doesn't have ends it at once.
	err := refused(t, f, context.Background(), ask(types.TCP, 0, 0, "192.0.2.1"))
	assert.Check(t, is.ErrorIs(err, unix.EADDRNOTAVAIL))
	assert.Check(t, is.Equal(f.calls, 4))

	// A refusal that says why is not looked into.
	f.shrugs = false
	err = refused(t, f, context.Background(), ask(types.TCP, 8080, 8080, "0.0.0.0"))
	assert.Check(t, is.Equal(strings.Count(err.Error(), "address already in use"), 1), err)
}

// seesHost tells whether a mapper that is made here sees the host.
func seesHost() bool { return hostInSight(NewPortMapper(Config{}).rooms.child) }

func TestNoView(t *testing.T) {
	t.Run("the caller is not in the child", func(t *testing.T) {
		f := newFake(t)
		inChild(t)
		assert.Check(t, seesHost())
		fd, err := unix.Open("/proc/self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		assert.NilError(t, err)
		defer unix.Close(fd)
		assert.NilError(t, unix.Setns(fd, unix.CLONE_NEWNET))
		assert.Check(t, !seesHost())
		published(t, f, ask(types.TCP, 0, 0, "0.0.0.0"))
	})
	t.Run("the caller is in a third namespace", func(t *testing.T) {
		inChild(t)
		assert.NilError(t, unix.Unshare(unix.CLONE_NEWNET))
		assert.Check(t, seesHost()) // The test's link follows the thread.
		t.Setenv("ROOTLESSKIT_STATE_DIR", t.TempDir())
		assert.NilError(t, os.Symlink("/proc/1/ns/net", filepath.Join(os.Getenv("ROOTLESSKIT_STATE_DIR"), "netns")))
		assert.Check(t, !seesHost())
	})
	t.Run("no detached namespace", func(t *testing.T) {
		inChild(t)
		t.Setenv("ROOTLESSKIT_STATE_DIR", t.TempDir())
		assert.Check(t, !seesHost())
	})
	t.Run("SCTP", func(t *testing.T) {
		inChild(t)
		s := search{req: &request{proto: types.SCTP}}
		NewPortMapper(Config{RlkClient: newFake(t)}).rooms.lookAtHost(context.Background(), &s)
		assert.Check(t, s.view.addrs == nil)
	})
	t.Run("an invalid range", func(t *testing.T) {
		f := newHostFake(t)
		inChild(t)
		for _, first := range []int{0, 9000} {
			err := refused(t, f, context.Background(), ask(types.TCP, first, 8000, "0.0.0.0"))
			assert.Check(t, is.ErrorContains(err, "invalid port range"))
		}
	})
	t.Run("no thread on the host", func(t *testing.T) {
		f := newHostFake(t)
		inChild(t)
		f.listens = false
		f.holdRange(32768, 32768+5)
		before := hostNetNS
		hostNetNS = "net:[1]"
		defer func() { hostNetNS = before }()
		assert.Check(t, is.Equal(published(t, f, ask(types.TCP, 0, 0, "0.0.0.0")), 32774))
		assert.Check(t, is.Equal(f.calls, 7), "the port driver is asked")
	})
}

// Where the main thread was lent to a goroutine that moved it to the child
// namespace, /proc/self/ns/net is the child's. That may cost the view, no more.
func TestMisplacedMainThread(t *testing.T) {
	if os.Getenv(unlockedMain) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestMisplacedMainThread$", "-test.v")
		cmd.Env = append(os.Environ(), unlockedMain+"=1", inNamespace+"=1")
		out, err := cmd.CombinedOutput()
		assert.NilError(t, err, "%s", out)
		assert.Check(t, is.Contains(string(out), "the main thread is in the child"))
		return
	}
	f := newHostFake(t)
	occupy(t, "tcp", "0.0.0.0", 32768, 32867)
	stateDir := t.TempDir()
	t.Setenv("ROOTLESSKIT_STATE_DIR", stateDir)

	// Goroutines that all hold a thread, until one of them has the main one. It
	// ends with the thread locked: the runtime parks that thread for ever.
	moved := make(chan error)
	release := make(chan struct{})
	for range 100 {
		go func() {
			runtime.LockOSThread()
			if unix.Gettid() != os.Getpid() {
				<-release
				runtime.UnlockOSThread()
				return
			}
			err := unix.Unshare(unix.CLONE_NEWNET)
			if err == nil {
				err = bringUpLoopback()
			}
			moved <- err
		}()
	}
	select {
	case err := <-moved:
		assert.NilError(t, err)
	case <-time.After(time.Minute):
		t.Fatal("no goroutine got the main thread")
	}
	close(release)
	assert.Check(t, netNSAt("/proc/self/ns/net") != hostNetNS)
	t.Log("the main thread is in the child")

	runtime.LockOSThread() // For good: the process ends after this test.
	child, err := unix.Open("/proc/self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	assert.NilError(t, err)
	assert.NilError(t, unix.Setns(child, unix.CLONE_NEWNET))
	assert.NilError(t, unix.Close(child))
	assert.NilError(t, os.Symlink("/proc/self/ns/net", filepath.Join(stateDir, "netns")))
	port := published(t, f, ask(types.TCP, 0, 0, "0.0.0.0"))
	assert.Check(t, port > 32867, "%d is another process's", port)
}

func TestSettings(t *testing.T) {
	var set portSet
	set.parse("8080,9000-9010,a,1-b,-,1-2-3,65536,65535\n")
	for port, want := range map[int]bool{0: false, 1: false, 8079: false, 8080: true, 8081: false, 8999: false, 9000: true, 9010: true, 9011: false, 65535: true} {
		assert.Check(t, is.Equal(set.has(port), want), port)
	}
	fd := settings()[portRange]
	settings()[portRange] = -1
	assert.Check(t, is.Len(hostSetting(portRange, make([]byte, 64)), 0))
	settings()[portRange] = fd
}

// RootlessKit is this process's parent: here, a shell by its name.
func TestParentIsRootlessKit(t *testing.T) {
	const asChild = "BERTH_TEST_CHILD_OF_ROOTLESSKIT"
	if os.Getenv(asChild) != "" {
		fmt.Println("program:", rootlessKit(), "implicit:", portDriverIsImplicit())
		return
	}
	shell, err := os.ReadFile("/bin/sh")
	assert.NilError(t, err)
	self, err := os.Executable()
	assert.NilError(t, err)
	for name, arg := range map[string]string{"rootlesskit": "--port-driver=implicit", "other": "--port-driver=builtin"} {
		file := filepath.Join(t.TempDir(), name)
		assert.NilError(t, os.WriteFile(file, shell, 0o700))
		cmd := exec.Command(file, "-c", `"$0" -test.run='^TestParentIsRootlessKit$'; exit $?`, self, arg)
		cmd.Env = append(os.Environ(), asChild+"=1", inNamespace+"=1")
		out, err := cmd.CombinedOutput()
		assert.NilError(t, err, "%s", out)
		want := fmt.Sprintf("program: %s implicit: true\n", file)
		if name == "other" {
			want = "program: $(which rootlesskit) implicit: false\n"
		}
		assert.Check(t, is.Contains(string(out), want))
	}
}

// A range that can't be understood costs the look, no more.
func TestDynamicRangeThatCannotBeUnderstood(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	before := settings()[portRange]
	defer func() { settings()[portRange] = before }()
	for text, want := range map[string][2]int{
		"": {}, "1": {}, "a\tb": {}, "5\t4": {}, "0\t100": {}, "100\t65536": {}, "100 200": {},
		"40001\t40001": {40001, 40001}, "1\t65535": {1, 65535},
	} {
		file := filepath.Join(t.TempDir(), "range")
		assert.NilError(t, os.WriteFile(file, []byte(text+"\n"), 0o600))
		var err error
		settings()[portRange], err = unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		assert.NilError(t, err)
		ctx, hook := logged()
		s := search{req: &request{proto: types.TCP}}
		NewPortMapper(Config{RlkClient: f}).rooms.lookAtHost(ctx, &s)
		assert.NilError(t, unix.Close(settings()[portRange]))
		if want == [2]int{} {
			assert.Check(t, s.ports == nil, text)
			assert.Check(t, is.Len(entries(hook, logrus.WarnLevel), 1), text)
			continue
		}
		first, last, _, _ := s.ports.seen()
		assert.Check(t, is.Equal([2]int{first, last}, want))
		assert.Check(t, is.Len(entries(hook, logrus.WarnLevel), 0), text)
	}
}

// A search goes on where the one before it ended, as long as that is in the range.
func TestSearchGoesOnBehindTheCursor(t *testing.T) {
	inChild(t)
	setSysctl(t, "ip_local_port_range", "40000 40005")
	for at, want := range map[int32]int{0: 40000, 39998: 40000, 39999: 40000, 40000: 40001, 40004: 40005, 40005: 40000, 65535: 40000} {
		var cursor atomic.Int32
		cursor.Store(at)
		h, err := newHostPorts(nil, &request{proto: types.TCP}, nil, &cursor)
		assert.NilError(t, err)
		first, last, ok := h.next()
		assert.Check(t, ok && first == want && last == want, "%d behind %d", first, at)
	}
}

func TestBusyFixedPortSaysWhoHasIt(t *testing.T) {
	for _, proto := range []types.Protocol{types.TCP, types.UDP} {
		t.Run(proto.String(), func(t *testing.T) {
			f := newHostFake(t)
			synctest.Test(t, func(t *testing.T) { // holderLimit does not pass.
				inChild(t)
				occupy(t, proto.String(), "127.0.0.1", 8080, 8080)
				err := refused(t, f, context.Background(), ask(proto, 8080, 8080, "0.0.0.0"))
				assert.Check(t, is.ErrorContains(err, "; another process of this user has it; stop what holds it"))
			})
		})
	}
	t.Run("a container of this daemon", func(t *testing.T) {
		f := newHostFake(t)
		f.child4 = netip.MustParseAddr("127.0.0.1")
		inChild(t)
		pm := NewPortMapper(Config{RlkClient: f})
		pbs, err := pm.MapPorts(context.Background(), ask(types.TCP, 8080, 8080, "127.0.0.2"))
		assert.NilError(t, err)
		_, err = pm.MapPorts(context.Background(), ask(types.TCP, 8080, 8080, "0.0.0.0"))
		assert.Check(t, is.ErrorContains(err, "; a container of this daemon (on another host address) has it"))
		assert.Check(t, pm.UnmapPorts(context.Background(), pbs))
	})
	run := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) { synctest.Test(t, f) }) // holderLimit does not pass.
	}
	run("nobody", func(t *testing.T) {
		assert.Check(t, is.Equal(holder(types.TCP, netip.IPv4Unspecified(), 1), ""))
		// Nor do other addresses and ports matter, or a connection that is in TIME_WAIT.
		occupy(t, "tcp", "127.0.0.2", 8083, 8083)
		occupy(t, "tcp", "0.0.0.0", 8085, 8085)
		serveOnHost(t, "127.0.0.3:8083")
		for port, addrs := range map[int]map[string]string{
			8083: {"127.0.0.1": "", "127.0.0.2": "another process of this user", "127.0.0.3": ""},
			8084: {"127.0.0.1": "", "127.0.0.2": "", "127.0.0.3": ""},
			8085: {"127.0.0.1": "another process of this user"},
		} {
			for on, want := range addrs {
				assert.Check(t, is.Equal(holder(types.TCP, netip.MustParseAddr(on), port), want), "%s:%d", on, port)
			}
		}
	})
	run("IPv6 only", func(t *testing.T) {
		occupy(t, "tcp", "::", 8081, 8081)
		assert.Check(t, is.Equal(holder(types.TCP, netip.IPv4Unspecified(), 8081), ""))
		assert.Check(t, is.Equal(holder(types.TCP, netip.IPv6Loopback(), 8081), "another process of this user"))
	})
	run("IPv6 and IPv4", func(t *testing.T) {
		var l net.Listener
		onHost(func() {
			var err error
			l, err = net.Listen("tcp", ":8082")
			assert.NilError(t, err)
		})
		defer l.Close()
		assert.Check(t, is.Equal(holder(types.TCP, netip.IPv4Unspecified(), 8082), "another process of this user"))
	})
}

// What this daemon has on another host address says nothing of a range on this one.
func TestRangeOnTwoHostAddressesWithAView(t *testing.T) {
	for name, addrs := range map[string][]string{
		"addresses": {"127.0.0.1", "127.0.0.2", "127.0.0.1", "127.0.0.2"},
		"families":  {"::", "::", "0.0.0.0", "0.0.0.0"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newHostFake(t)
			inChild(t)
			pm := NewPortMapper(Config{RlkClient: f})
			for i, addr := range addrs {
				pbs, err := pm.MapPorts(context.Background(), ask(types.TCP, 8000, 8001, addr))
				assert.NilError(t, err, "container %d", i)
				t.Cleanup(func() { assert.Check(t, pm.UnmapPorts(context.Background(), pbs)) })
			}
		})
	}
}

func TestOtherPortsOfThisDaemonAreNotBlamed(t *testing.T) {
	f := newHostFake(t)
	synctest.Test(t, func(t *testing.T) { // holderLimit does not pass.
		inChild(t)
		pm := NewPortMapper(Config{RlkClient: f})
		pbs := mapped(t, pm, ask(types.TCP, 8080, 8080, "::"))
		pbs = append(pbs, mapped(t, pm, ask(types.TCP, 8081, 8081, "0.0.0.0"))...)
		pbs = append(pbs, mapped(t, pm, ask(types.UDP, 8080, 8080, "0.0.0.0"))...)
		occupy(t, "tcp", "0.0.0.0", 8080, 8080)
		_, err := pm.MapPorts(context.Background(), ask(types.TCP, 8080, 8080, "0.0.0.0"))
		assert.Check(t, is.ErrorContains(err, "another process of this user has it"))
		assert.Check(t, pm.UnmapPorts(context.Background(), pbs))
	})
}
