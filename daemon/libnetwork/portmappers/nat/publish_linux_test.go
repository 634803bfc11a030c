package nat

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/drvregistry"
	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"github.com/sirupsen/logrus"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

func TestRegister(t *testing.T) {
	pms := &drvregistry.PortMappers{}
	assert.NilError(t, Register(pms, Config{}))
	pm, err := pms.Get("nat")
	assert.NilError(t, err)
	_, ok := pm.(PortMapper)
	assert.Check(t, ok)
	assert.Check(t, pm == pm, "it can be compared")
}

func TestNothingToMap(t *testing.T) {
	pbs, err := PortMapper{}.MapPorts(context.Background(), nil)
	assert.Check(t, err)
	assert.Check(t, is.Len(pbs, 0))
}

func TestRequestsThatDiffer(t *testing.T) {
	for want, other := range map[string]types.PortBinding{
		"80/udp:8080-8080": {Proto: types.UDP, Port: 80, HostPort: 8080, HostPortEnd: 8080},
		"81/tcp:8080-8080": {Proto: types.TCP, Port: 81, HostPort: 8080, HostPortEnd: 8080},
		"80/tcp:8079-8080": {Proto: types.TCP, Port: 80, HostPort: 8079, HostPortEnd: 8080},
		"80/tcp:8080-8081": {Proto: types.TCP, Port: 80, HostPort: 8080, HostPortEnd: 8081},
	} {
		reqs := append(ask(types.TCP, 8080, 8080, "0.0.0.0"), portmapperapi.PortBindingReq{PortBinding: other})
		_, err := PortMapper{}.MapPorts(context.Background(), reqs)
		assert.Check(t, is.Error(err, "port binding mismatch 80/tcp:8080-8080, "+want))
	}
}

func TestBindingsAreOnHostAndInChild(t *testing.T) {
	f := newFake(t)
	pm := NewPortMapper(Config{RlkClient: f})
	reqs := ask(types.TCP, 0, 0, "0.0.0.0", "::")
	before := slices.Clone(reqs)
	ctx, hook := logged()

	pbs, err := pm.MapPorts(ctx, reqs)
	assert.NilError(t, err)
	assert.Assert(t, is.Len(pbs, 2))
	for i, child := range []netip.Addr{f.child4, netip.IPv6Loopback()} {
		pb := pbs[i]
		assert.Check(t, f.has(pb))
		assert.Check(t, is.DeepEqual(pb.HostIP, before[i].HostIP))
		assert.Check(t, is.Equal(pb.Port, uint16(80)))
		assert.Check(t, is.Equal(pb.NAT, netip.AddrPortFrom(child, pb.HostPort)))
		assert.Check(t, is.Equal(addr(pb.ChildHostIP), child))
		assert.Check(t, pb.BoundSocket != nil)
		_, err := net.Listen("tcp", pb.NAT.String())
		assert.Check(t, is.ErrorContains(err, "address already in use"))
	}
	assert.Check(t, is.DeepEqual(reqs, before), "the caller's slice was written to")
	assert.Check(t, is.Len(hook.AllEntries(), 0), "a publish without a refusal is not worth a line")

	// The caller may do what it likes with its slice.
	reqs[0].HostIP[0], reqs[0].IP[15] = 99, 99
	assert.Check(t, is.DeepEqual(pbs[0].HostIP, net.IP{0, 0, 0, 0}))
	assert.Check(t, is.DeepEqual(pbs[0].IP, net.IPv4(172, 17, 0, 2)))
	assert.Check(t, pm.UnmapPorts(ctx, pbs))
}

func TestIPv6RefusalUndoesIPv4(t *testing.T) {
	f := newFake(t)
	first := 0
	f.answer = func(call int, m mapping) error {
		if call == 1 {
			first = m.port
		}
		if m.ip.Is6() && m.port == first {
			return errors.New(answerPrefix + "listen tcp6 [::]:1: bind: address already in use")
		}
		return nil
	}
	ctx, hook := logged()
	pm := NewPortMapper(Config{RlkClient: f})
	pbs, err := pm.MapPorts(ctx, ask(types.TCP, 0, 0, "0.0.0.0", "::"))
	assert.NilError(t, err)
	assert.Check(t, pbs[0].HostPort == pbs[1].HostPort && int(pbs[0].HostPort) != first)
	assert.Check(t, is.Len(f.exposed, 2))

	assert.Check(t, is.Len(entries(hook, logrus.DebugLevel), 1))
	summary := entries(hook, logrus.InfoLevel)
	assert.Assert(t, is.Len(summary, 1))
	assert.Check(t, is.Equal(summary[0].Data["attempts"], 2))
	assert.Check(t, is.Equal(summary[0].Data["port"], int(pbs[0].HostPort)))
	assert.Check(t, summary[0].Data["duration"] != nil)
	assert.Check(t, pm.UnmapPorts(ctx, pbs))
}

func TestRollBackGoesOnWhenRemovalFails(t *testing.T) {
	f := newFake(t)
	f.answer = func(_ int, m mapping) error {
		if m.ip.Is6() && f.calls <= 3 {
			return errors.New(answerPrefix + "bind: address already in use")
		}
		return nil
	}
	f.failRemovals = 2 // Of the four of the roll-back, and of those again.
	ctx, hook := logged()
	synctest.Test(t, func(t *testing.T) {
		pm := NewPortMapper(Config{RlkClient: f})
		pbs, err := pm.MapPorts(ctx, ask(types.UDP, 0, 0, "127.0.0.1", "127.0.0.3", "::"))
		assert.NilError(t, err)
		assert.Check(t, is.Len(f.exposed, 3+2), "the roll-back went on after one that failed")
		assert.Check(t, pm.UnmapPorts(ctx, pbs))
		time.Sleep(time.Second)
	})
	assert.Check(t, is.Len(entries(hook, logrus.WarnLevel), 0))
}

// Two host addresses with one child address: bound once in the child, exposed
// twice on the host.
func TestHostAddressesThatShareAChildAddress(t *testing.T) {
	for name, port := range map[string]int{"dynamic": 0, "fixed": 18080} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			pm := NewPortMapper(Config{RlkClient: f})
			pbs, err := pm.MapPorts(context.Background(), ask(types.TCP, port, port, "192.0.2.1", "192.0.2.2"))
			assert.NilError(t, err)
			assert.Assert(t, is.Len(pbs, 2))
			assert.Check(t, f.has(pbs[0]) && f.has(pbs[1]))
			assert.Check(t, pbs[0].BoundSocket != nil && pbs[0].NAT.IsValid())
			assert.Check(t, pbs[1].BoundSocket == nil && !pbs[1].NAT.IsValid())

			// The bridge driver unmaps them one by one. The child port is nobody
			// else's before the last one no longer forwards to it.
			assert.Check(t, pm.UnmapPorts(context.Background(), pbs[:1]))
			ip, p := f.child4.AsSlice(), int(pbs[0].HostPort)
			_, err = portallocator.Get().RequestPort(ip, "tcp", p)
			assert.Check(t, is.ErrorContains(err, "already allocated"))
			assert.Check(t, pm.UnmapPorts(context.Background(), pbs[1:]))
			_, err = portallocator.Get().RequestPort(ip, "tcp", p)
			assert.NilError(t, err)
			portallocator.Get().ReleasePort(ip, "tcp", p)
		})
	}
}

func TestInvalidHostAddress(t *testing.T) {
	for name, view := range map[string]func(testing.TB){"without a view": func(testing.TB) {}, "with a view": inChild} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			view(t)
			reqs := ask(types.TCP, 0, 0, "0.0.0.0")
			reqs[0].HostIP = nil
			err := refused(t, f, context.Background(), reqs)
			assert.Check(t, is.ErrorContains(err, "invalid host IP address"))
			assert.Check(t, is.Equal(f.calls, 0))
		})
	}
}

func TestHostAddressesThatOverlap(t *testing.T) {
	for _, addrs := range [][]string{{"0.0.0.0", "127.0.0.1"}, {"::1", "::"}, {"192.0.2.1", "::", "192.0.2.1"}} {
		f := newFake(t)
		for _, port := range []int{0, 8080} {
			err := refused(t, f, context.Background(), ask(types.TCP, port, port, addrs...))
			assert.Check(t, is.ErrorContains(err, "cannot publish container port 80/tcp on one host port of both "))
			assert.Check(t, is.ErrorContains(err, "address already in use"))
		}
		assert.Check(t, is.Equal(f.calls, 0))
	}
}

func TestProtocolThatThePortDriverDoesNotServe(t *testing.T) {
	t.Run("on no address", func(t *testing.T) {
		f := newFake(t)
		err := refused(t, f, context.Background(), ask(types.SCTP, 0, 0, "0.0.0.0", "::", "::1"))
		assert.Check(t, is.ErrorContains(err, "on host address 0.0.0.0, [::], [::1]: RootlessKit's port driver does not support sctp4 and sctp6"))
		assert.Check(t, is.Equal(f.calls, 0))
	})
	t.Run("on some", func(t *testing.T) {
		f := newFake(t)
		f.noIPv6 = true
		pm := NewPortMapper(Config{RlkClient: f})
		pbs, err := pm.MapPorts(context.Background(), ask(types.TCP, 0, 0, "::", "0.0.0.0"))
		assert.NilError(t, err)
		assert.Assert(t, is.Len(pbs, 1))
		assert.Check(t, pbs[0].HostIP.Equal(net.IPv4zero))
		assert.Check(t, pm.UnmapPorts(context.Background(), pbs))
	})

	unsupported := errors.New(`protocol "tcp6" is not supported by the RootlessKit port driver "slirp4netns"`)
	t.Run("seen late, on some", func(t *testing.T) {
		f := newFake(t)
		f.answer = func(_ int, m mapping) error {
			if m.ip.Is6() {
				return unsupported
			}
			return nil
		}
		pm := NewPortMapper(Config{RlkClient: f})
		pbs, err := pm.MapPorts(context.Background(), ask(types.TCP, 0, 0, "0.0.0.0", "::"))
		assert.NilError(t, err)
		assert.Check(t, !pbs[0].RootlesskitUnsupported && pbs[1].RootlesskitUnsupported)
		assert.Check(t, pm.UnmapPorts(context.Background(), pbs))
	})
	t.Run("seen late, on all", func(t *testing.T) {
		f := newFake(t)
		f.answer = func(int, mapping) error { return unsupported }
		err := refused(t, f, context.Background(), ask(types.TCP, 0, 0, "0.0.0.0", "::"))
		assert.Check(t, is.ErrorIs(err, unsupported))
		assert.Check(t, is.Equal(f.calls, 2))
	})
}

func TestUnmapPortsGoesOnAndTellsAll(t *testing.T) {
	f := newFake(t)
	ctx, hook := logged()
	synctest.Test(t, func(t *testing.T) {
		pm := NewPortMapper(Config{RlkClient: f})
		pbs, err := pm.MapPorts(ctx, ask(types.TCP, 0, 0, "0.0.0.0", "::"))
		assert.NilError(t, err)
		assert.NilError(t, pbs[1].BoundSocket.Close()) // Closed twice, then.
		f.forgets = true
		assert.NilError(t, f.remove(mapping{"tcp", addr(pbs[1].HostIP), int(pbs[1].HostPort)}, 2, func() {}))
		f.failRemovals = 3

		err = pm.UnmapPorts(ctx, pbs)
		assert.Check(t, is.ErrorContains(err, "failed to remove host port 0.0.0.0:"))
		assert.Check(t, is.ErrorContains(err, "boom"))
		assert.Check(t, is.ErrorIs(err, os.ErrClosed))
		assert.Check(t, !strings.Contains(err.Error(), "unknown id"), "%v", err)

		// The third time that it's tried again, it goes.
		time.Sleep(time.Minute)
		f.mu.Lock()
		defer f.mu.Unlock()
		assert.Check(t, is.Len(f.exposed, 0))
	})
	assert.Check(t, is.Len(hook.AllEntries(), 0))
}

func TestRemovalThatFailsForGoodIsTold(t *testing.T) {
	f := newFake(t)
	ctx, hook := logged()
	synctest.Test(t, func(t *testing.T) {
		pm := NewPortMapper(Config{RlkClient: f})
		pbs, err := pm.MapPorts(ctx, ask(types.TCP, 0, 0, "0.0.0.0"))
		assert.NilError(t, err)
		f.failRemovals = 4
		assert.Check(t, is.ErrorContains(pm.UnmapPorts(ctx, pbs), "boom"))
		time.Sleep(time.Minute)
		f.mu.Lock()
		defer f.mu.Unlock()
		clear(f.exposed)
	})
	warnings := entries(hook, logrus.WarnLevel)
	assert.Assert(t, is.Len(warnings, 1))
	assert.Check(t, is.Equal(f.failRemovals, 0))
}

var errLost = fmt.Errorf("%s%w", answerPrefix, &url.Error{Op: "Post", URL: "http://rootlesskit/v1/ports", Err: io.EOF})

// RootlessKit refuses a duplicate itself: the next start on the port works if
// RootlessKit has not got it.
func TestLostAnswerCostsOneStart(t *testing.T) {
	f := newFake(t)
	f.answer = func(call int, _ mapping) error {
		if call == 1 {
			return errLost
		}
		return nil
	}
	ctx, hook := logged()
	err := refused(t, f, ctx, ask(types.TCP, 18086, 18086, "0.0.0.0"))
	assert.Check(t, is.ErrorContains(err, "EOF; see whether RootlessKit is running"))
	assert.Check(t, is.ErrorIs(err, io.EOF))
	warnings := entries(hook, logrus.WarnLevel)
	assert.Assert(t, is.Len(warnings, 1))
	assert.Check(t, is.Equal(warnings[0].Data["port"], uint16(18086)))
	published(t, f, ask(types.TCP, 18086, 18086, "0.0.0.0"))
}

// Where host addresses share a child address, RootlessKit would not refuse it.
func TestLostAnswerKeepsASharedChildPort(t *testing.T) {
	f := newFake(t)
	f.child4 = netip.MustParseAddr("::1")
	f.answer = func(int, mapping) error { return errLost }
	refused(t, f, context.Background(), ask(types.TCP, 18087, 18087, "192.0.2.1"))
	_, err := portallocator.Get().RequestPort(net.IPv6loopback, "tcp", 18087)
	assert.Check(t, is.ErrorContains(err, "already allocated"))
	portallocator.Get().ReleasePort(net.IPv6loopback, "tcp", 18087)
}

func TestRemovalOfWhatRootlessKitDoesNotKnow(t *testing.T) {
	for text, unknown := range map[string]bool{
		"unknown id: 3":      true,
		"unknown port id: 3": true,
		"invalid ID":         true,
		"reply.Error: map[desc:bad request: remove_hostfwd: bad arguments.id]": true,
		"connection refused":  false,
		"routineStoppedCh...": false,
	} {
		assert.Check(t, is.Equal(isUnknownPort(errors.New(text)), unknown), text)
	}
}

// typedNil is what dockerd passes in rootful mode: its methods work on nil.
type typedNil struct{ calls *int }

func (c *typedNil) ChildHostIP(_ string, hostIP netip.Addr) netip.Addr { return hostIP }

func (c *typedNil) AddPort(context.Context, string, netip.Addr, netip.Addr, int) (func() error, error) {
	if c != nil {
		*c.calls++
		return nil, errors.New("boom")
	}
	return func() error { return nil }, nil
}

func TestRootful(t *testing.T) {
	for name, pm := range map[string]PortMapper{
		"zero value":  {},
		"nil":         NewPortMapper(Config{}),
		"nil pointer": NewPortMapper(Config{RlkClient: (*typedNil)(nil)}),
	} {
		t.Run(name, func(t *testing.T) {
			newFake(t) // For its check that nothing is left.
			pbs, err := pm.MapPorts(context.Background(), ask(types.TCP, 0, 0, "127.0.0.1", "::1"))
			assert.NilError(t, err)
			assert.Assert(t, is.Len(pbs, 2))
			port := int(pbs[0].HostPort)
			assert.Check(t, is.Equal(pbs[1].NAT, netip.AddrPortFrom(netip.IPv6Loopback(), uint16(port))))

			// A port that is taken is the caller's to deal with, at once.
			_, err = pm.MapPorts(context.Background(), ask(types.TCP, port, port, "127.0.0.1"))
			assert.Check(t, is.Error(err, "Bind for 127.0.0.1:"+pbs[0].NAT.String()[len("127.0.0.1:"):]+" failed: port is already allocated"))

			// So are two addresses that overlap.
			_, err = pm.MapPorts(context.Background(), ask(types.TCP, 8080, 8080, "0.0.0.0", "127.0.0.1"))
			assert.Check(t, is.Error(err, "failed to bind host port 127.0.0.1:8080/tcp: address already in use"))

			// The caller's addresses are not kept.
			reqs := ask(types.TCP, 0, 0, "127.0.0.1")
			kept, err := pm.MapPorts(context.Background(), reqs)
			assert.NilError(t, err)
			reqs[0].HostIP[3] = 99
			assert.Check(t, is.Equal(kept[0].ChildHostIP.String(), "127.0.0.1"))
			assert.Check(t, pm.UnmapPorts(context.Background(), kept))

			// Nor does a cancelled context matter.
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			more, err := pm.MapPorts(ctx, ask(types.UDP, port, port, "127.0.0.1"))
			assert.NilError(t, err)
			assert.Check(t, pm.UnmapPorts(ctx, append(pbs, more...)))
		})
	}
}

func TestRootlessNeedsNoPointerClient(t *testing.T) {
	f := newFake(t)
	f.taken = func(port int) bool { return port == 18081 }
	pm := NewPortMapper(Config{RlkClient: struct{ PortDriverClient }{f}})
	pbs, err := pm.MapPorts(context.Background(), []portmapperapi.PortBindingReq(ask(types.TCP, 18081, 18082, "0.0.0.0")))
	assert.NilError(t, err)
	assert.Check(t, is.Equal(pbs[0].HostPort, uint16(18082)))
	assert.Check(t, pm.UnmapPorts(context.Background(), pbs))
}
