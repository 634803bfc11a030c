package nat

import (
	"context"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// whileItHangs runs f with a port mapper whose RootlessKit may hang.
func whileItHangs(t *testing.T, f func(t *testing.T, h *hanging, pm PortMapper)) {
	fake := newFake(t)
	synctest.Test(t, func(t *testing.T) {
		h := &hanging{fakeDriver: fake}
		f(t, h, NewPortMapper(Config{RlkClient: h}))
	})
	freeFilters()
}

// unmapAll unmaps pbs one by one, as the bridge driver does.
func unmapAll(t *testing.T, pm PortMapper, pbs []portmapperapi.PortBinding) {
	t.Helper()
	ctx, _ := logged()
	for _, pb := range pbs {
		assert.Check(t, pm.UnmapPorts(ctx, []portmapperapi.PortBinding{pb}))
	}
}

func (f *fakeDriver) childPort(pb portmapperapi.PortBinding) childPort {
	return childPort{pb.Proto, netip.AddrPortFrom(addr(pb.ChildHostIP), pb.HostPort)}
}

// The daemon's lock is held for one wait, not for one a port.
func TestHangBetweenTwoPortsOfAContainer(t *testing.T) {
	whileItHangs(t, func(t *testing.T, h *hanging, pm PortMapper) {
		ctx, _ := logged()
		pbs := mapped(t, pm, ask(types.TCP, 8080, 8080, "0.0.0.0", "::"))
		h.hang()
		held := took(func() {
			_, err := pm.MapPorts(ctx, ask(types.TCP, 8081, 8081, "0.0.0.0", "::"))
			assert.Check(t, is.ErrorIs(err, errNoAnswer))
			unmapAll(t, pm, pbs)
		})
		assert.Check(t, held <= 11*time.Second, held)
		for _, pb := range pbs {
			assert.Check(t, isReserved(h.childPort(pb)), "%s: nobody knows yet", pb)
		}
		h.resume()
		assert.Check(t, is.Equal(h.onHost(), 0))
		for _, pb := range pbs {
			assert.Check(t, !isReserved(h.childPort(pb)), "%s", pb)
		}
	})
}

func TestHangWhileAContainerOfManyPortsStops(t *testing.T) {
	whileItHangs(t, func(t *testing.T, h *hanging, pm PortMapper) {
		var pbs []portmapperapi.PortBinding
		for port := 8000; port < 8100; port++ {
			pbs = append(pbs, mapped(t, pm, ask(types.TCP, port, port, "0.0.0.0", "::"))...)
		}
		h.hang()
		held := took(func() { unmapAll(t, pm, pbs) })
		assert.Check(t, held <= 12*time.Second, held)
		assert.Check(t, is.Equal(h.onHost(), 200))
		h.resume()
		assert.Check(t, is.Equal(h.onHost(), 0))
	})
}

func TestRestartOverAStall(t *testing.T) {
	whileItHangs(t, func(t *testing.T, h *hanging, pm PortMapper) {
		reqs := ask(types.TCP, 8080, 8080, "0.0.0.0", "::")
		pbs := mapped(t, pm, reqs)
		h.hang()
		time.AfterFunc(12*time.Second, h.resume)
		assert.Check(t, is.Equal(took(func() {
			unmapAll(t, pm, pbs)
			pbs = mapped(t, pm, reqs)
		}), 12*time.Second))
		assert.Check(t, h.has(pbs[0]) && h.has(pbs[1]))
		unmapAll(t, pm, pbs)
	})
}

// A RootlessKit that answers everything else is not silent.
func TestRemovalThatIsNeverAnswered(t *testing.T) {
	whileItHangs(t, func(t *testing.T, h *hanging, pm PortMapper) {
		ctx, _ := logged()
		var pbs []portmapperapi.PortBinding
		for port := 8000; port < 8010; port++ {
			pbs = append(pbs, mapped(t, pm, ask(types.TCP, port, port, "0.0.0.0"))...)
		}
		h.hang()
		stuck := h.goOn
		stopped := make(chan struct{})
		go func() {
			unmapAll(t, pm, pbs[:1])
			close(stopped)
		}()
		synctest.Wait()
		h.gate.Lock()
		h.goOn = nil // For all but that one.
		h.gate.Unlock()

		var waits []time.Duration
		for _, pb := range pbs[1:] {
			waits = append(waits, took(func() { unmapAll(t, pm, []portmapperapi.PortBinding{pb}) }))
			time.Sleep(3 * time.Second)
		}
		long := slices.DeleteFunc(waits, func(d time.Duration) bool { return d == 0 })
		assert.Check(t, len(long) <= 1, waits)
		<-stopped

		restart := func() time.Duration {
			return took(func() {
				_, err := pm.MapPorts(ctx, ask(types.TCP, 8000, 8000, "0.0.0.0"))
				assert.Check(t, is.ErrorContains(err, "already allocated"))
			})
		}
		assert.Check(t, is.Equal(restart(), patience))
		assert.Check(t, is.Equal(restart(), time.Duration(0)), "it is waited for in vain once")
		unmapAll(t, pm, mapped(t, pm, ask(types.TCP, 8001, 8001, "0.0.0.0")))
		close(stuck)
		synctest.Wait()
		unmapAll(t, pm, mapped(t, pm, ask(types.TCP, 8000, 8000, "0.0.0.0")))
	})
}

// losing loses the answers of a fake driver's calls, once they are carried out.
type losing struct {
	*fakeDriver
	answers  int          // How many it is to lose.
	removals atomic.Int32 // The same; they are tried again behind, beside others.
}

func (l *losing) AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, port int) (func() error, error) {
	remove, err := l.fakeDriver.AddPort(ctx, proto, hostIP, childIP, port)
	if l.answers > 0 && err == nil {
		l.answers--
		return nil, errLost
	}
	if err != nil {
		return nil, err
	}
	return func() error {
		err := remove()
		if l.removals.Add(-1) >= 0 {
			return errLost
		}
		return err
	}, nil
}

// What RootlessKit has got, it says of the next request itself: the reservation
// would not help, and is not in the way of other ports.
func TestLostAnswerOfWhatWasExposed(t *testing.T) {
	l := &losing{fakeDriver: newFake(t), answers: 1}
	ctx, _ := logged()
	pm := NewPortMapper(Config{RlkClient: l})
	_, err := pm.MapPorts(ctx, ask(types.TCP, 18100, 18102, "0.0.0.0"))
	assert.Check(t, is.ErrorIs(err, io.EOF))
	assert.Check(t, is.Len(l.exposed, 1))
	lost := mapping{"tcp", netip.IPv4Unspecified(), l.asked[0]}
	assert.Check(t, !isReserved(childPort{types.TCP, netip.AddrPortFrom(l.child4, uint16(lost.port))}))

	_, err = pm.MapPorts(ctx, ask(types.TCP, lost.port, lost.port, "0.0.0.0"))
	assert.Check(t, is.ErrorContains(err, "conflict with ID"))
	for range 2 {
		pbs, err := pm.MapPorts(ctx, ask(types.TCP, 18100, 18102, "0.0.0.0"))
		assert.NilError(t, err)
		defer unmapAll(t, pm, pbs)
	}
	delete(l.exposed, lost)
	unmapAll(t, pm, mapped(t, pm, ask(types.TCP, lost.port, lost.port, "0.0.0.0")))
}

// All that failed is told, the reservations end, and it is tried again behind.
func TestRemovalsThatAreAnsweredWithErrors(t *testing.T) {
	for name, lost := range map[string]bool{"failed": false, "lost": true} {
		t.Run(name, func(t *testing.T) {
			l := &losing{fakeDriver: newFake(t)}
			l.forgets = true
			synctest.Test(t, func(t *testing.T) {
				ctx, _ := logged()
				pm := NewPortMapper(Config{RlkClient: l})
				pbs := mapped(t, pm, ask(types.UDP, 18110, 18110, "0.0.0.0", "::"))
				if l.failRemovals = 2; lost {
					l.failRemovals = 0
					l.removals.Store(2)
				}
				err := pm.UnmapPorts(ctx, pbs)
				assert.Check(t, is.ErrorContains(err, "failed to remove host port 0.0.0.0:18110/udp"))
				assert.Check(t, is.ErrorContains(err, "failed to remove host port [::]:18110/udp"))
				for _, pb := range pbs {
					assert.Check(t, !isReserved(l.childPort(pb)), "%s", pb)
				}
				time.Sleep(removalRetries[0])
				synctest.Wait()
				l.mu.Lock()
				assert.Check(t, is.Len(l.exposed, 0))
				l.mu.Unlock()
				unmapAll(t, pm, mapped(t, pm, ask(types.UDP, 18110, 18110, "0.0.0.0", "::")))
			})
		})
	}
}

// A port is reserved on one address, over and over, while searches for it on another one end.
func TestSearchThatEndsFailsNobody(t *testing.T) {
	const port, searches = 18200, 200
	for name, size := range map[string]int{"fixed ports": 1, "ranges": 3} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.answer = func(int, mapping) error { return errInUse }
			inChild(t)
			occupy(t, "tcp", "127.0.0.1", port, port+size-1)
			ctx, _ := logged()
			pm := NewPortMapper(Config{RlkClient: f})
			var over atomic.Bool
			var wg sync.WaitGroup
			wg.Go(func() {
				for all, ip := portallocator.Get(), net.IPv4(127, 99, 0, 2); !over.Load(); all.ReleasePort(ip, "tcp", port) {
					if _, err := all.RequestPortsInRange([]net.IP{ip}, "tcp", port, port); !assert.Check(t, err) {
						return
					}
				}
			})
			for range searches {
				_, err := pm.MapPorts(ctx, ask(types.TCP, port, port+size-1, "127.0.0.1"))
				assert.Check(t, is.ErrorContains(err, "address already in use"))
			}
			over.Store(true)
			wg.Wait()
			freeFilters()
		})
	}
}
