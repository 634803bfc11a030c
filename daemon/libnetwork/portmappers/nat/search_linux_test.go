package nat

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

var errInUse = errors.New(answerPrefix + "listen tcp4 0.0.0.0:1: bind: address already in use")

func TestDynamicPortsAreSearchedInOrderThenAtRandom(t *testing.T) {
	f := newFake(t)
	first, last := portallocator.GetPortRange()
	f.holdRange(int(first), int(first)+499)
	port := published(t, f, ask(types.TCP, 0, 0, "0.0.0.0"))
	assert.Check(t, port >= int(first)+500 && port <= int(last))
	assert.Check(t, f.calls > inOrder && f.calls <= 64, "%d calls", f.calls)
	seen := map[int]bool{}
	for i, p := range f.asked {
		assert.Check(t, !seen[p], "%d was asked for twice", p)
		seen[p] = true
		if i < inOrder {
			assert.Check(t, is.Equal(p, int(first)+i))
		}
	}
}

// The allocator's order lasts for eight ports, and for a quarter of a second. What was refused isn't asked for again.
func TestAllocatorsOrder(t *testing.T) {
	first, last := portallocator.GetPortRange()
	for name, tc := range map[string]struct {
		each    time.Duration
		inOrder int
	}{"quick": {0, 8}, "slow": {50 * time.Millisecond, 5}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newAllocatorPorts(&request{proto: types.TCP})
				for i := range tc.inOrder {
					from, to, ok := s.next()
					assert.Assert(t, ok && from == 0 && to == 0, "%d: %d-%d", i, from, to)
					s.refused(1, int(first)+i)
					time.Sleep(tc.each)
				}
				seen := map[int]bool{}
				for from, to, ok := s.next(); ok; from, to, ok = s.next() {
					assert.Assert(t, from == to && from >= int(first)+tc.inOrder && from <= int(last) && !seen[from], "%d-%d", from, to)
					seen[from] = true
					s.refused(1, from)
				}
				assert.Check(t, is.Equal(len(seen), int(last-first)+1-tc.inOrder))
				_, _, tried, _ := s.seen()
				assert.Check(t, is.Equal(tried, int(last-first)+1))
			})
		})
	}
}

// Taken ports behind a block that the kernel reserves are not walked one by one.
func TestReservedPortsDoNotDrawTheSearch(t *testing.T) {
	setSysctl(t, "ip_local_reserved_ports", "32768-59999")
	for i := range 1000 {
		s := newAllocatorPorts(&request{proto: types.TCP})
		for n := range maxUnclear {
			port, _, ok := s.next()
			assert.Assert(t, ok)
			if port == 0 {
				port = 60000 + n // The allocator's order.
			}
			if port >= 60500 {
				break
			}
			s.refused(1, port)
			assert.Assert(t, n < maxUnclear-1, "%d: of 1,000 ports, half of them free, none was given", i)
		}
	}
}

// The kernel gives a long list in one read only.
func TestChildsLongListOfReservedPorts(t *testing.T) {
	var list []string
	for port := 32769; port < 60999; port += 100 {
		list = append(list, strconv.Itoa(port))
	}
	setSysctl(t, "ip_local_reserved_ports", strings.Join(list, ","))
	s := newAllocatorPorts(&request{proto: types.TCP})
	for port, _, ok := s.next(); ok; port, _, ok = s.next() {
		assert.Assert(t, port == 0 || port%100 != 69, "%d is reserved", port)
		s.refused(1, port)
	}
}

// 300 ports in a row are nothing to a driver that doesn't say why, either.
func TestUnclearRefusalsAreJumpedToo(t *testing.T) {
	f := newFake(t)
	f.shrugs = true
	first, _ := portallocator.GetPortRange()
	f.holdRange(int(first), int(first)+299)
	published(t, f, ask(types.TCP, 0, 0, "0.0.0.0"))
}

// What is bound in the daemon's own namespace is not in a port driver's way: only as root that is the host.
func TestOwnNamespaceIsNotTheDriversHost(t *testing.T) {
	setSysctl(t, "ip_local_reserved_ports", "32868-60999")
	holdHere(t, "127.0.0.13", 32768, 32867)
	f := newFake(t)
	f.answer = func(call int, m mapping) error {
		if call <= inOrder {
			return fmt.Errorf("%slisten udp4 :%d: bind: address already in use", answerPrefix, m.port)
		}
		return nil
	}
	published(t, f, ask(types.UDP, 0, 0, "0.0.0.0"))
	assert.Check(t, is.Equal(f.calls, inOrder+1))
}

func TestUnclearRefusalsEndTheSearchAt64(t *testing.T) {
	f := newFake(t)
	f.answer = func(int, mapping) error { return errors.New(answerPrefix + slirpShrug) }
	err := refused(t, f, context.Background(), ask(types.TCP, 0, 0, "0.0.0.0"))
	assert.Check(t, is.Equal(f.calls, 64))
	assert.Check(t, is.ErrorContains(err, "64 refusals do not say why"))
	assert.Check(t, is.ErrorContains(err, "bad request: add_hostfwd: slirp_add_hostfwd failed; publish others"))
}

func TestRangeComesOutAtItsOnlyFreePort(t *testing.T) {
	f := newFake(t)
	f.holdRange(8000, 8039)
	assert.Check(t, is.Equal(published(t, f, ask(types.UDP, 8000, 8040, "0.0.0.0", "::")), 8040))
	assert.Check(t, is.Equal(f.calls, 42))
}

func TestRangeComesOutAtItsOnlyFreePortInTheChild(t *testing.T) {
	f := newFake(t)
	for port := 8000; port < 8040; port++ {
		l, err := net.Listen("tcp", net.JoinHostPort(f.child4.String(), strconv.Itoa(port)))
		assert.NilError(t, err)
		defer l.Close()
	}
	assert.Check(t, is.Equal(published(t, f, ask(types.TCP, 8000, 8040, "0.0.0.0")), 8040))
	assert.Check(t, is.Equal(f.calls, 1))
}

func TestExhaustedRangeSaysSo(t *testing.T) {
	f := newFake(t)
	f.holdRange(8000, 8040)
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		err := refused(t, f, context.Background(), ask(types.TCP, 8000, 8040, "0.0.0.0"))
		for _, want := range []string{
			"container port 80/tcp", "8000-8040", "41 tried", "0.0.0.0:8040/tcp",
			"address already in use", "sudo ss -ltnp 'sport = :8040'",
		} {
			assert.Check(t, is.ErrorContains(err, want))
		}
		assert.Check(t, is.Equal(time.Since(start), time.Duration(0)), "it does not wait")
	})
	assert.Check(t, is.Equal(f.calls, 41))
}

func TestExhaustedRangeInTheChildSaysSo(t *testing.T) {
	f := newFake(t)
	for port := 8000; port < 8003; port++ {
		l, err := net.Listen("tcp", net.JoinHostPort(f.child4.String(), strconv.Itoa(port)))
		assert.NilError(t, err)
		defer l.Close()
	}
	synctest.Test(t, func(t *testing.T) {
		err := refused(t, f, context.Background(), ask(types.TCP, 8000, 8002, "0.0.0.0"))
		assert.Check(t, is.ErrorContains(err, "8000-8002"))
		assert.Check(t, is.ErrorContains(err, "3 tried"))
		assert.Check(t, is.ErrorContains(err, "child namespace: failed to bind host port "+f.child4.String()))
		assert.Check(t, is.ErrorIs(err, unix.EADDRINUSE))
	})
	assert.Check(t, is.Equal(f.calls, 0))
}

// An exhausted range names the last refusal that is not this daemon's own.
func TestExhaustedRangeNamesAnothersRefusal(t *testing.T) {
	for name, own := range map[string]int{"own first": 8000, "own last": 8002} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			published(t, f, ask(types.TCP, own, own, "0.0.0.0"))
			f.taken = func(port int) bool { return port != own }
			err := refused(t, f, context.Background(), ask(types.TCP, 8000, 8002, "0.0.0.0"))
			assert.Check(t, is.ErrorContains(err, "2 tried, and none can be had: host port 0.0.0.0:"))
			assert.Check(t, is.ErrorContains(err, "address already in use"))
		})
	}
}

func TestExhaustedRangeOfOwnPortsSaysSo(t *testing.T) {
	f := newFake(t)
	published(t, f, ask(types.TCP, 8000, 8001, "0.0.0.0"))
	published(t, f, ask(types.TCP, 8000, 8001, "0.0.0.0"))
	calls := f.calls
	err := refused(t, f, context.Background(), ask(types.TCP, 8000, 8001, "0.0.0.0"))
	assert.Check(t, is.ErrorContains(err, "0 tried"))
	assert.Check(t, is.ErrorContains(err, "all ports are allocated; stop the container that has it"))
	// Nor does it help that RootlessKit has them on a host address of another container.
	f.answer = func(int, mapping) error { return errors.New(answerPrefix + "conflict with ID 7") }
	err = refused(t, f, context.Background(), ask(types.TCP, 8002, 8003, "0.0.0.0"))
	assert.Check(t, is.ErrorContains(err, "2 tried"))
	assert.Check(t, is.Equal(f.calls, calls+2))
}

func TestRangeComesOutAtFirstUnprivilegedPort(t *testing.T) {
	// The allocator goes on in a range where it was the last time.
	portallocator.Get().ReleaseAll()
	for _, ip := range []string{"0.0.0.0", "::"} {
		t.Run("refused on the host "+ip, func(t *testing.T) {
			f := newFake(t)
			assert.Check(t, is.Equal(published(t, f, ask(types.TCP, 1000, 1100, ip)), 1024))
		})
		t.Run("refused in the child "+ip, func(t *testing.T) {
			withoutCapability(t, unix.CAP_NET_BIND_SERVICE)
			f := newFake(t)
			assert.Check(t, is.Equal(published(t, f, ask(types.TCP, 1001, 1100, ip)), 1024))
			assert.Check(t, is.Equal(f.calls, 1))
		})
	}
}

// withoutCapability takes a capability from the test's thread.
func withoutCapability(t *testing.T, capability uint) {
	runtime.LockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var before, without [2]unix.CapUserData
	assert.NilError(t, unix.Capget(&header, &before[0]))
	without = before
	without[0].Effective &^= 1 << capability
	assert.NilError(t, unix.Capset(&header, &without[0]))
	t.Cleanup(func() {
		assert.NilError(t, unix.Capset(&header, &before[0]))
		runtime.UnlockOSThread()
	})
}

func TestPrivilegedRange(t *testing.T) {
	f := newFake(t)
	err := refused(t, f, context.Background(), ask(types.TCP, 1000, 1020, "0.0.0.0"))
	assert.Check(t, is.ErrorContains(err, "21 tried"))
	assert.Check(t, is.ErrorContains(err, "net.ipv4.ip_unprivileged_port_start"))
	assert.Check(t, is.Equal(f.calls, 21))
}

// Where every port is denied, however high, there's nothing to raise.
func TestDynamicPortsThatAPolicyDenies(t *testing.T) {
	f := newFake(t)
	f.answer = func(_ int, m mapping) error {
		return fmt.Errorf("%slisten tcp4 %s:%d: bind: permission denied", answerPrefix, m.ip, m.port)
	}
	err := refused(t, f, context.Background(), ask(types.TCP, 0, 0, "0.0.0.0"))
	assert.Check(t, is.Equal(f.calls, 64))
	assert.Check(t, is.ErrorContains(err, "permission denied"))
	assert.Check(t, !strings.Contains(err.Error(), "ip_unprivileged_port_start"), err)
}

// Whichever driver refuses a fixed privileged port, the ways out are told, once.
func TestFixedPrivilegedPort(t *testing.T) {
	t.Run("child", func(t *testing.T) {
		withoutCapability(t, unix.CAP_NET_BIND_SERVICE)
		f := newFake(t)
		err := refused(t, f, context.Background(), ask(types.TCP, 80, 80, "0.0.0.0"))
		assert.Check(t, is.Equal(strings.Count(err.Error(), "net.ipv4.ip_unprivileged_port_start=80"), 1), err)
		assert.Check(t, is.Equal(f.calls, 0))
	})
	for name, text := range map[string]string{
		"builtin":          "cannot expose privileged port 80, you can add 'net.ipv4.ip_unprivileged_port_start=80' to /etc/sysctl.conf (currently 1024), or set CAP_NET_BIND_SERVICE on rootlesskit binary, or choose a larger port number (>= 1024): listen tcp4 0.0.0.0:80: bind: permission denied",
		"gvisor-tap-vsock": "failed to expose port: listen tcp 0.0.0.0:80: bind: permission denied",
		"slirp4netns":      slirpShrug,
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.answer = func(int, mapping) error { return errors.New(answerPrefix + text) }
			err := refused(t, f, context.Background(), ask(types.TCP, 80, 80, "0.0.0.0"))
			assert.Check(t, is.ErrorContains(err, "host port 80 "))
			assert.Check(t, is.Contains(err.Error(), "net.ipv4.ip_unprivileged_port_start=80"))
			assert.Check(t, is.ErrorContains(err, "from 1024 up"))
			assert.Check(t, is.Equal(f.calls, 1))
		})
	}
}

func TestFixedPortIsAskedForOnce(t *testing.T) {
	for name, answer := range map[string]error{
		"taken":     errInUse,
		"forbidden": errors.New(answerPrefix + "forbidden by its access permissions"),
		"unclear":   errors.New(answerPrefix + slirpShrug),
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.answer = func(int, mapping) error { return answer }
			err := refused(t, f, context.Background(), ask(types.TCP, 18083, 18083, "0.0.0.0", "::"))
			assert.Check(t, is.ErrorIs(err, answer))
			assert.Check(t, is.ErrorContains(err, "host port 0.0.0.0:18083/tcp"))
			assert.Check(t, is.Equal(f.calls, 1))
		})
	}
	t.Run("allocated", func(t *testing.T) {
		f := newFake(t)
		published(t, f, ask(types.TCP, 18083, 18083, "0.0.0.0"))
		err := refused(t, f, context.Background(), ask(types.TCP, 18083, 18083, "0.0.0.0"))
		assert.Check(t, is.ErrorContains(err, "port is already allocated"))
		assert.Check(t, is.Equal(f.calls, 1))
	})
}

func TestRequestThatCannotBeServedIsNotRepeated(t *testing.T) {
	t.Run("address not on the host", func(t *testing.T) {
		f := newFake(t)
		err := refused(t, f, context.Background(), ask(types.TCP, 0, 0, "10.1.2.3"))
		assert.Check(t, is.ErrorContains(err, "cannot assign requested address; publish on an address that the host has"))
		assert.Check(t, is.Equal(f.calls, 1))
	})
	t.Run("invalid range", func(t *testing.T) {
		f := newFake(t)
		err := refused(t, f, context.Background(), ask(types.TCP, 9000, 8000, "0.0.0.0"))
		assert.Check(t, is.ErrorContains(err, "invalid port range: 9000-8000"))
		assert.Check(t, is.Equal(f.calls, 0))
	})
	t.Run("out of descriptors in the child", func(t *testing.T) {
		f := newFake(t)
		var before unix.Rlimit
		assert.NilError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &before))
		none := before
		none.Cur = 3
		assert.NilError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &none))
		err := refused(t, f, context.Background(), ask(types.TCP, 0, 0, "0.0.0.0"))
		assert.NilError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &before))
		assert.Check(t, is.ErrorIs(err, unix.EMFILE))
		assert.Check(t, is.ErrorContains(err, "too many open files; raise the limits"))
		assert.Check(t, is.Equal(f.calls, 0))
	})
}

func TestDynamicRangeIsSearchedToItsLastPort(t *testing.T) {
	f := newFake(t)
	first, last := portallocator.GetPortRange()
	f.taken = func(port int) bool { return port != int(last) }
	// What this daemon has isn't a refusal.
	_, err := portallocator.Get().RequestPort(f.child4.AsSlice(), "tcp", int(first)+100)
	assert.NilError(t, err)
	f.asked = append(f.asked, int(first)+100) // To see that it is released.
	synctest.Test(t, func(t *testing.T) {     // The search's time does not pass.
		assert.Check(t, is.Equal(published(t, f, ask(types.TCP, 0, 0, "0.0.0.0")), int(last)))
	})
	portallocator.Get().ReleasePort(f.child4.AsSlice(), "tcp", int(first)+100)
	seen := map[int]bool{}
	for _, port := range f.asked[1:] {
		assert.Assert(t, !seen[port], "%d was asked for twice", port)
		seen[port] = true
	}
}

func TestSearchEndsWithItsTime(t *testing.T) {
	f := newFake(t)
	synctest.Test(t, func(t *testing.T) {
		f.answer = func(int, mapping) error {
			time.Sleep(time.Millisecond)
			return errInUse
		}
		start := time.Now()
		err := refused(t, f, context.Background(), ask(types.TCP, 0, 0, "0.0.0.0"))
		assert.Check(t, is.Equal(time.Since(start), searchTime))
		assert.Check(t, is.ErrorContains(err, "tried, none was had in 2s"))
		assert.Check(t, is.ErrorContains(err, "address already in use"))
		assert.Check(t, !errors.Is(err, errNoAnswer), "RootlessKit answered each time: %v", err)
	})
}

func TestCallerGivesUp(t *testing.T) {
	for name, tc := range map[string]struct {
		giveUpAt int // giveUpAt is the call during which the caller gives up.
		calls    int
		answer   error
	}{
		"before":                             {calls: 0},
		"during a call that succeeds":        {giveUpAt: 1, calls: 1},
		"during a call that is refused":      {giveUpAt: 3, calls: 3, answer: errInUse},
		"during the last call of an attempt": {giveUpAt: 2, calls: 2},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if tc.giveUpAt == 0 {
				cancel()
			}
			f.answer = func(call int, _ mapping) error {
				if call == tc.giveUpAt {
					cancel()
				}
				return tc.answer
			}
			err := refused(t, f, ctx, ask(types.TCP, 0, 0, "0.0.0.0", "::"))
			assert.Check(t, is.ErrorIs(err, context.Canceled))
			assert.Check(t, is.Equal(f.calls, tc.calls))
		})
	}

	t.Run("after a port of its own, with others taken", func(t *testing.T) {
		f := newHostFake(t)
		inChild(t)
		pm := NewPortMapper(Config{RlkClient: f})
		pbs, err := pm.MapPorts(context.Background(), ask(types.TCP, 8000, 8000, "0.0.0.0"))
		assert.NilError(t, err)
		occupy(t, "tcp", "0.0.0.0", 8001, 8001)
		ctx, cancel := context.WithCancel(context.Background())
		f.answer = func(int, mapping) error {
			cancel()
			return errors.New(answerPrefix + "conflict with ID 7")
		}
		_, err = pm.MapPorts(ctx, ask(types.TCP, 8000, 8003, "0.0.0.0"))
		assert.Check(t, is.ErrorIs(err, context.Canceled))
		assert.Check(t, pm.UnmapPorts(context.Background(), pbs))
	})

	t.Run("during the call for a fixed port, which is refused", func(t *testing.T) {
		f := newFake(t)
		ctx, cancel := context.WithCancel(context.Background())
		f.answer = func(int, mapping) error {
			cancel()
			return errInUse
		}
		err := refused(t, f, ctx, ask(types.TCP, 18085, 18085, "0.0.0.0"))
		assert.Check(t, is.ErrorIs(err, context.Canceled))
	})
}

// A request that isn't answered is given up, and undone when the answer comes.
func TestPortDriverThatDoesNotAnswer(t *testing.T) {
	lost := fmt.Errorf("%s%w", answerPrefix, &url.Error{Op: "Post", URL: "http://rootlesskit/v1/ports", Err: io.EOF})
	for name, late := range map[string]error{"success": nil, "refusal": errInUse, "loss": lost} {
		t.Run("late "+name, func(t *testing.T) {
			f := newFake(t)
			ctx, hook := logged()
			synctest.Test(t, func(t *testing.T) {
				answer := make(chan struct{})
				f.answer = func(_ int, m mapping) error {
					if m.ip.Is6() {
						<-answer
						return late
					}
					return nil
				}
				start := time.Now()
				reqs := ask(types.TCP, 0, 0, "0.0.0.0", "::")
				err := refused(t, f, ctx, reqs)
				assert.Check(t, is.Equal(time.Since(start), patience))
				assert.Check(t, is.ErrorIs(err, errNoAnswer))
				f.mu.Lock()
				port := f.asked[0]
				f.mu.Unlock()
				assert.Check(t, is.ErrorContains(err, fmt.Sprintf("host port [::]:%d/tcp: RootlessKit's port driver did not answer in time (10s)", port)))
				assert.Check(t, is.ErrorContains(err, "see whether RootlessKit is running"))

				// Until then, the port is nobody's. The child's is closed.
				_, err = portallocator.Get().RequestPort(net.IPv6loopback, "tcp", port)
				assert.Check(t, is.ErrorContains(err, "already allocated"))
				l, err := net.Listen("tcp", net.JoinHostPort("::1", strconv.Itoa(port)))
				assert.NilError(t, err)
				assert.NilError(t, l.Close())

				reqs[0].HostIP[0] = 99 // The undoing has its own copy.
				close(answer)
				synctest.Wait()
				f.mu.Lock()
				defer f.mu.Unlock()
				assert.Check(t, is.Len(f.exposed, 0))
			})
			warnings := entries(hook, logrus.WarnLevel)
			assert.Assert(t, is.Len(warnings, 1))
			said := "undone"
			if late == lost {
				said = "answer was lost"
			}
			assert.Check(t, is.Contains(warnings[0].Message, said))
		})
	}
}

func TestSixtyFourCallersWithNinePortsInTenTaken(t *testing.T) {
	f := newFake(t)
	f.taken = func(port int) bool { return port%10 != 0 }
	pm := NewPortMapper(Config{RlkClient: f})
	var wg sync.WaitGroup
	got := make([][]portmapperapi.PortBinding, 64)
	for i := range got {
		wg.Go(func() {
			pbs, err := pm.MapPorts(context.Background(), ask(types.TCP, 0, 0, "0.0.0.0"))
			assert.Check(t, err)
			got[i] = pbs
		})
	}
	wg.Wait()
	seen := map[uint16]bool{}
	for _, pbs := range got {
		assert.Assert(t, is.Len(pbs, 1))
		assert.Check(t, !seen[pbs[0].HostPort])
		seen[pbs[0].HostPort] = true
		assert.Check(t, pm.UnmapPorts(context.Background(), pbs))
	}
	assert.Check(t, f.calls < 20*64, "%d calls", f.calls)
}

// At what a request costs, a search asks for some 5,700 ports in its time. Here no socket is bound: a thousand
// starts are a hundred thousand ports.
func TestOneFreePortInAHundredIsFound(t *testing.T) {
	most := 0
	for start := range 1000 {
		s := newAllocatorPorts(&request{proto: types.TCP})
		first, last := portallocator.GetPortRange()
		asked := 0
		for port := 0; asked == 0 || port%100 != start%100; {
			from, _, ok := s.next()
			assert.Assert(t, ok, "none is left after %d", asked)
			if port = from; port == 0 { // The allocator's own order.
				port = int(first) + asked
			}
			assert.Assert(t, port >= int(first) && port <= int(last))
			s.refused(1, port)
			asked++
		}
		most = max(most, asked)
	}
	assert.Check(t, most > 100 && most < 5700, "%d ports were asked for", most)
}
