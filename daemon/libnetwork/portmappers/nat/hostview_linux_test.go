package nat

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
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
	hostCursor.Store(0)
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
		hostSysctls.readAt = time.Time{}
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
			assert.Check(t, is.Equal(published(t, f, request(proto, 0, 0, "0.0.0.0", "::")), 32869))
			assert.Check(t, is.Equal(f.calls, 2))
			assert.Check(t, is.Equal(published(t, f, request(proto, 0, 0, "127.0.0.1")), 32870), "the search goes on from the last one")
			assert.Check(t, is.Equal(f.calls, 3))
		})
	}
}

func TestUsersRangeIsLookedAtToo(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	occupy(t, "tcp", "127.0.0.1", 8000, 8039)
	assert.Check(t, is.Equal(published(t, f, request(types.TCP, 8000, 8040, "0.0.0.0")), 8040))
	assert.Check(t, is.Equal(f.calls, 1))
}

func TestRangeAllTakenOnTheHost(t *testing.T) {
	f := newHostFake(t)
	occupy(t, "tcp", "0.0.0.0", 8000, 8040)
	synctest.Test(t, func(t *testing.T) {
		inChild(t)
		start := time.Now()
		err := refused(t, f, context.Background(), request(types.TCP, 8000, 8040, "0.0.0.0"))
		for _, want := range []string{"8000-8040", "41 tried", "host port 0.0.0.0:8040/tcp: listen tcp4 0.0.0.0:8040: bind: address already in use"} {
			assert.Check(t, is.ErrorContains(err, want))
		}
		assert.Check(t, is.Equal(time.Since(start), restLimit), "another process may let go of one")
	})
	assert.Check(t, is.Equal(f.calls, 0))
}

func TestOwnPortsOfARangeAreNotWaitedForWithAView(t *testing.T) {
	f := newHostFake(t)
	synctest.Test(t, func(t *testing.T) {
		inChild(t)
		start := time.Now()
		published(t, f, request(types.TCP, 8000, 8001, "0.0.0.0"))
		published(t, f, request(types.TCP, 8000, 8001, "0.0.0.0"))
		err := refused(t, f, context.Background(), request(types.TCP, 8000, 8001, "0.0.0.0"))
		assert.Check(t, is.ErrorContains(err, "2 tried, and none can be had: all ports are allocated; stop the container"))
		assert.Check(t, is.Equal(time.Since(start), time.Duration(0)))
	})
}

func TestHostsDynamicRangeCounts(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	setSysctl(t, "ip_local_port_range", "40000 40005")
	setSysctl(t, "ip_local_reserved_ports", "40000,40002-40003")
	var got []int
	for range 3 {
		got = append(got, published(t, f, request(types.TCP, 0, 0, "0.0.0.0")))
	}
	assert.Check(t, is.DeepEqual(got, []int{40001, 40004, 40005}))
	// The user's own word counts more.
	assert.Check(t, is.Equal(published(t, f, request(types.TCP, 40002, 40002, "0.0.0.0")), 40002))
	setSysctl(t, "ip_local_port_range", "41000 41005")
	assert.Check(t, is.Equal(published(t, f, request(types.TCP, 0, 0, "0.0.0.0")), 41000))

	setSysctl(t, "ip_local_reserved_ports", "41000-41005")
	err := refused(t, f, context.Background(), request(types.TCP, 0, 0, "127.0.0.1"))
	assert.Check(t, is.ErrorContains(err, "dynamic host port (41000-41005)"))
	assert.Check(t, is.ErrorContains(err, "0 tried"))
	assert.Check(t, is.ErrorContains(err, "all ports are reserved on the host"))
}

// An administrator's change counts without a restart of the daemon.
func TestHostsDynamicRangeIsReadAgain(t *testing.T) {
	f := newHostFake(t)
	synctest.Test(t, func(t *testing.T) {
		inChild(t)
		setSysctl(t, "ip_local_port_range", "40000 40005")
		publish := func() int { return published(t, f, request(types.TCP, 0, 0, "0.0.0.0")) }
		assert.Check(t, is.Equal(publish(), 40000))
		readAt := hostSysctls.readAt
		setSysctl(t, "ip_local_port_range", "41000 41005")
		hostSysctls.readAt = readAt
		assert.Check(t, is.Equal(publish(), 40001), "the ports of one container share a read")
		time.Sleep(sysctlAge)
		assert.Check(t, is.Equal(publish(), 41000))
	})
}

// RootlessKit may have a capability that the daemon has not got on the host;
// pasta has not.
func TestPrivilegedHostPorts(t *testing.T) {
	for name, want := range map[string]int{"port driver": 1000, "pasta": 1024} {
		t.Run(name, func(t *testing.T) {
			inChild(t)
			withoutCapability(t, unix.CAP_NET_BIND_SERVICE)
			v := newHostView(context.Background(), request(types.TCP, 1000, 1100, "0.0.0.0"))
			assert.Assert(t, v != nil)
			if name == "pasta" {
				v.lookForPasta()
			}
			// On this thread: those on the test's host have the capability.
			port, err := v.find()
			assert.NilError(t, err)
			assert.Check(t, is.Equal(port, want))
			assert.Check(t, !v.taken)
		})
	}
}

// What the kernel says of a port, but that it's taken, is for RootlessKit to say.
func TestLookThatDoesNotHelp(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	err := refused(t, f, context.Background(), request(types.TCP, 0, 0, "fe80::1")) // EINVAL: no zone.
	assert.Check(t, is.Equal(f.calls, 1))
	assert.Check(t, is.ErrorContains(err, "invalid argument; publish on another address"))
}

func TestAddressThatTheHostHasNot(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	occupy(t, "tcp", "127.0.0.1", 32768, 32768)
	err := refused(t, f, context.Background(), request(types.TCP, 0, 0, "127.0.0.1", "192.0.2.1"))
	assert.Check(t, is.ErrorIs(err, unix.EADDRNOTAVAIL))
	assert.Check(t, is.ErrorContains(err, "listen tcp4 192.0.2.1:"))
	assert.Check(t, is.Equal(f.calls, 0))
}

// A port driver that refuses what looks free is asked in order, then at random.
func TestPortsThatOnlyThePortDriverRefuses(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	f.holdRange(32768, 32768+999)
	published(t, f, request(types.TCP, 0, 0, "0.0.0.0"))
	assert.Check(t, f.calls > inOrder && f.calls < 64, "%d calls", f.calls)
}

func TestPortsReservedOrOwnAreNotWaitedFor(t *testing.T) {
	f := newHostFake(t)
	synctest.Test(t, func(t *testing.T) {
		inChild(t)
		setSysctl(t, "ip_local_port_range", "40000 40001")
		setSysctl(t, "ip_local_reserved_ports", "40000")
		start := time.Now()
		published(t, f, request(types.TCP, 0, 0, "127.0.0.2"))
		err := refused(t, f, context.Background(), request(types.TCP, 0, 0, "0.0.0.0"))
		assert.Check(t, is.ErrorContains(err, "1 tried, and none can be had: all ports are allocated"))
		assert.Check(t, is.Equal(time.Since(start), time.Duration(0)))
	})
}

func TestLongListOfReservedPorts(t *testing.T) {
	inChild(t)
	var list []string
	for port := 40000; port < 42000; port += 2 {
		list = append(list, fmt.Sprint(port))
	}
	setSysctl(t, "ip_local_reserved_ports", strings.Join(list, ","))
	v := newHostView(context.Background(), request(types.TCP, 0, 0, "0.0.0.0"))
	for port := 40000; port < 42000; port++ {
		assert.Check(t, is.Equal(v.reserved.has(port), port%2 == 0), port)
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
		{"0.0.0.0", 8080, slirpShrug + ": listen tcp4 0.0.0.0:8080: bind: address already in use"},
		{"192.0.2.1", 8080, slirpShrug + ": listen tcp4 192.0.2.1:8080: bind: cannot assign requested address"},
		{"0.0.0.0", 8081, slirpShrug},
	} {
		err := refused(t, f, context.Background(), request(types.TCP, tc.port, tc.port, tc.ip))
		assert.Check(t, is.ErrorContains(err, tc.want))
	}
	assert.Check(t, is.Equal(f.calls, 3))

	// In a search, an address that the host doesn't have ends it at once.
	err := refused(t, f, context.Background(), request(types.TCP, 0, 0, "192.0.2.1"))
	assert.Check(t, is.ErrorIs(err, unix.EADDRNOTAVAIL))
	assert.Check(t, is.Equal(f.calls, 3))
}

func TestNoViewNoChange(t *testing.T) {
	first, _ := portallocator.GetPortRange()
	t.Run("the caller is not in the child", func(t *testing.T) {
		f := newFake(t)
		inChild(t)
		fd, err := unix.Open("/proc/self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		assert.NilError(t, err)
		defer unix.Close(fd)
		assert.NilError(t, unix.Setns(fd, unix.CLONE_NEWNET))
		assert.Check(t, newHostView(context.Background(), request(types.TCP, 0, 0, "0.0.0.0")) == nil)
		published(t, f, request(types.TCP, 0, 0, "0.0.0.0"))
	})
	t.Run("no detached namespace", func(t *testing.T) {
		inChild(t)
		t.Setenv("ROOTLESSKIT_STATE_DIR", t.TempDir())
		assert.Check(t, newHostView(context.Background(), request(types.TCP, 0, 0, "0.0.0.0")) == nil)
	})
	t.Run("SCTP", func(t *testing.T) {
		inChild(t)
		assert.Check(t, newHostView(context.Background(), request(types.SCTP, 0, 0, "0.0.0.0")) == nil)
	})
	t.Run("an invalid range", func(t *testing.T) {
		f := newHostFake(t)
		inChild(t)
		err := refused(t, f, context.Background(), request(types.TCP, 9000, 8000, "0.0.0.0"))
		assert.Check(t, is.ErrorContains(err, "invalid port range"))
	})
	t.Run("no thread on the host", func(t *testing.T) {
		f := newHostFake(t)
		inChild(t)
		f.listens = false
		f.holdRange(int(first), int(first)+20)
		before := hostNetNS
		hostNetNS = netNS{1, 1}
		defer func() { hostNetNS = before }()
		published(t, f, request(types.TCP, 0, 0, "0.0.0.0"))
		assert.Check(t, f.calls > inOrder)
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
	port := published(t, f, request(types.TCP, 0, 0, "0.0.0.0"))
	assert.Check(t, port > 32867, "%d is another process's", port)
}

func TestSysctlsThatCannotBeUnderstood(t *testing.T) {
	for _, text := range []string{"", "1", "a b", "5 4", "0 100", "100 70000", "1 2 3"} {
		_, _, err := parsePortRange(text)
		assert.Check(t, is.ErrorContains(err, "ip_local_port_range"), text)
	}
	for _, text := range []string{"a", "1-b", "-", "1-2-3", "65536"} {
		_, err := parsePortSet(text)
		assert.Check(t, is.ErrorContains(err, "ip_local_reserved_ports"), text)
	}
	set, err := parsePortSet("8080,9000-9010,65535")
	assert.Check(t, err)
	for port, want := range map[int]bool{8079: false, 8080: true, 8081: false, 8999: false, 9000: true, 9010: true, 9011: false, 65535: true} {
		assert.Check(t, is.Equal(set.has(port), want), port)
	}

	empty, err := os.Open(os.DevNull)
	assert.NilError(t, err)
	defer empty.Close()
	ctx, hook := logged()
	logSysctls = sync.Once{}
	for range 2 {
		first, last, reserved, err := (&sysctls{portRange: empty, reserved: empty}).dynamicPorts(ctx)
		f, l := portallocator.GetPortRange()
		assert.Check(t, err)
		assert.Check(t, first == int(f) && last == int(l) && reserved == nil)
	}
	assert.Check(t, is.Len(hook.AllEntries(), 1))
}

func TestBusyFixedPortSaysWhoHasIt(t *testing.T) {
	comm, err := os.ReadFile("/proc/self/comm")
	assert.NilError(t, err)
	for _, proto := range []types.Protocol{types.TCP, types.UDP} {
		t.Run(proto.String(), func(t *testing.T) {
			f := newHostFake(t)
			synctest.Test(t, func(t *testing.T) { // holderLimit does not pass.
				inChild(t)
				occupy(t, proto.String(), "127.0.0.1", 8080, 8080)
				err := refused(t, f, context.Background(), request(proto, 8080, 8080, "0.0.0.0"))
				assert.Check(t, is.ErrorContains(err, fmt.Sprintf(`; process %q (pid %d) has it; stop what holds it`, strings.TrimSpace(string(comm)), os.Getpid())))
			})
		})
	}
	t.Run("while the roll-back is being tried again", func(t *testing.T) {
		f := newHostFake(t)
		synctest.Test(t, func(t *testing.T) {
			inChild(t)
			occupy(t, "tcp", "::", 8080, 8080)
			f.failRemovals = 1
			err := refused(t, f, context.Background(), request(types.TCP, 8080, 8080, "0.0.0.0", "::"))
			assert.Check(t, is.ErrorContains(err, fmt.Sprintf("(pid %d) has it; stop what holds it", os.Getpid())))
			time.Sleep(time.Minute)
		})
	})
	assert.Check(t, is.Equal(processWithSocket(0, time.Now().Add(time.Minute)), "another process of this user"))
	assert.Check(t, is.Equal(ownerOf(overflowUID, 0, time.Now()), "another user's process"))
	assert.Check(t, is.Equal(ownerOf(1001, 0, time.Now()), "a container's process (of user 1001 in this daemon's user namespace)"))
	assert.Check(t, is.Equal(findHolder(types.TCP, netip.IPv4Unspecified(), 1, time.Now()), ""))

	for _, tc := range []struct {
		at, addr string
		want     bool
	}{
		{"0.0.0.0", "127.0.0.1", true},
		{"127.0.0.1", "0.0.0.0", true},
		{"127.0.0.1", "127.0.0.1", true},
		{"127.0.0.1", "127.0.0.2", false},
		{"::", "0.0.0.0", true},
		{"::1", "0.0.0.0", false},
		{"0.0.0.0", "::", false},
		{"::1", "::", true},
	} {
		got := inTheWay(netip.MustParseAddr(tc.at), netip.MustParseAddr(tc.addr))
		assert.Check(t, is.Equal(got, tc.want), "%v", tc)
	}
}
