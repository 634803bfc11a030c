package nat

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// underPasta runs f with a RootlessKit whose port driver is the implicit one,
// which no client asks.
func underPasta(t *testing.T, f func(t *testing.T, pm PortMapper)) {
	newHostFake(t) // For its check that nothing is left.
	synctest.Test(t, func(t *testing.T) {
		inChild(t)
		f(t, pastaMapper())
	})
}

// pastaMapper is a daemon's whose RootlessKit has the implicit port driver.
func pastaMapper() PortMapper {
	pm := NewPortMapper(Config{RlkClient: (*typedNil)(nil)})
	pm.rooms.pasta = &pasta{own: map[ownPort]ownBindings{}}
	return pm
}

func mapped(t *testing.T, pm PortMapper, reqs []portmapperapi.PortBindingReq) []portmapperapi.PortBinding {
	t.Helper()
	pbs, err := pm.MapPorts(context.Background(), reqs)
	assert.NilError(t, err)
	return pbs
}

func unmap(t *testing.T, pm PortMapper, pbs []portmapperapi.PortBinding) {
	t.Helper()
	for _, pb := range pbs { // One by one, as the bridge driver does.
		assert.Check(t, pm.UnmapPorts(context.Background(), []portmapperapi.PortBinding{pb}))
	}
}

func TestStrangersPortIsNotPublishedUnderPasta(t *testing.T) {
	underPasta(t, func(t *testing.T, pm PortMapper) {
		occupy(t, "tcp", "127.0.0.1", 32768, 32770)
		occupy(t, "tcp", "::", 32771, 32771)
		pm.rooms.cursors[types.TCP].Store(32767)
		pbs := mapped(t, pm, ask(types.TCP, 0, 0, "127.0.0.1"))
		assert.Check(t, is.Equal(pbs[0].HostPort, uint16(32772)))
		unmap(t, pm, pbs)

		_, err := pm.MapPorts(context.Background(), ask(types.TCP, 32771, 32771, "0.0.0.0"))
		assert.Check(t, is.ErrorContains(err, "listen tcp6 [::]:32771: bind: address already in use"))
		_, err = pm.MapPorts(context.Background(), ask(types.TCP, 32769, 32769, "0.0.0.0"))
		assert.Check(t, is.ErrorContains(err, "listen tcp4 0.0.0.0:32769: bind: address already in use; another process of this user has it"))
	})
}

// Nor is one that somebody keeps, with a socket that lets others bind it and does not listen.
func TestKeptPortIsNotPublishedUnderPasta(t *testing.T) {
	underPasta(t, func(t *testing.T, pm PortMapper) {
		setSysctl(t, "ip_local_port_range", "40000 40002")
		pm.rooms.cursors[types.TCP].Store(40002)
		for _, port := range []int{40000, 40001} {
			onHost(func() {
				fd, err := socket(types.TCP, netip.IPv4Unspecified(), true)
				assert.NilError(t, err)
				t.Cleanup(func() { assert.Check(t, unix.Close(fd)) })
				assert.NilError(t, bind(fd, types.TCP, netip.IPv4Unspecified(), port, false))
			})
		}
		pbs := mapped(t, pm, ask(types.TCP, 0, 0, "0.0.0.0"))
		assert.Check(t, is.Equal(int(pbs[0].HostPort), 40002))
		unmap(t, pm, pbs)
	})
}

// As pasta does: bound beside what is kept, since both set SO_REUSEADDR.
func pastaBinds(t *testing.T, proto types.Protocol, port int) (let func()) {
	t.Helper()
	var fds []int
	for _, a := range pastaAddrs() {
		onHost(func() {
			fd, err := socket(proto, a.host, true)
			assert.NilError(t, err)
			assert.NilError(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
			assert.NilError(t, bind(fd, proto, a.host, port, true))
			fds = append(fds, fd)
		})
	}
	return func() {
		for _, fd := range fds {
			assert.Check(t, unix.Close(fd))
		}
	}
}

func TestOwnPastasPortIsNoStrangers(t *testing.T) {
	for _, proto := range []types.Protocol{types.TCP, types.UDP} {
		t.Run(proto.String(), func(t *testing.T) {
			underPasta(t, func(t *testing.T, pm PortMapper) {
				pbs := mapped(t, pm, ask(proto, 5353, 5353, "0.0.0.0", "::"))
				let := pastaBinds(t, proto, 5353)
				// pasta has the UDP port with the TCP port.
				if proto == types.TCP {
					letUDP := pastaBinds(t, types.UDP, 5353)
					unmap(t, pm, mapped(t, pm, ask(types.UDP, 5353, 5353, "0.0.0.0")))
					letUDP()
				}
				unmap(t, pm, pbs)
				pbs = mapped(t, pm, ask(proto, 5353, 5353, "0.0.0.0")) // A restart, while pasta lags.
				unmap(t, pm, pbs)
				// What is there once pasta must have gone is a stranger's.
				time.Sleep(pastaLag)
				_, err := pm.MapPorts(context.Background(), ask(proto, 5353, 5353, "0.0.0.0"))
				assert.Check(t, is.ErrorContains(err, "address already in use"))
				let()
			})
		})
	}
}

// A connection that was served is in TIME_WAIT for a minute: pasta can listen all the same.
func TestServedConnectionsDoNotMatterToAFixedPort(t *testing.T) {
	underPasta(t, func(t *testing.T, pm PortMapper) {
		serveOnHost(t, "127.0.0.1:5354")
		unmap(t, pm, mapped(t, pm, ask(types.TCP, 5354, 5354, "0.0.0.0")))
		pbs := mapped(t, pm, ask(types.TCP, 5354, 5354, "0.0.0.0"))
		pastaBinds(t, types.TCP, 5354)()
		unmap(t, pm, pbs)
		// A range, too, once its pass found none.
		unmap(t, pm, mapped(t, pm, ask(types.TCP, 5354, 5354, "0.0.0.0")))
		pbs = mapped(t, pm, ask(types.TCP, 5353, 5354, "0.0.0.0"))
		more := mapped(t, pm, ask(types.TCP, 5353, 5354, "127.0.0.1"))
		assert.Check(t, pbs[0].HostPort != more[0].HostPort, "two host addresses, two ports: pasta has one of each")
		unmap(t, pm, append(pbs, more...))

		// It is kept, too, once those connections are gone.
		c := &pastaClient{pasta: pm.rooms.pasta, fixed: true, insist: true}
		remove, err := c.AddPort(context.Background(), "tcp", netip.IPv4Unspecified(), netip.Addr{}, 5354)
		assert.NilError(t, err)
		kept := 0
		for _, fd := range c.socks {
			if at, err := unix.Getsockname(fd); err == nil {
				if v4, ok := at.(*unix.SockaddrInet4); ok && v4.Port == 5354 {
					kept++
				}
			}
		}
		assert.Check(t, is.Equal(kept, 1))
		assert.Check(t, remove())
	})
}

// serveOnHost serves a connection on the host, and ends it.
func serveOnHost(t *testing.T, at string) {
	onHost(func() {
		l, err := net.Listen("tcp4", at)
		assert.NilError(t, err)
		c, err := net.Dial("tcp4", at)
		assert.NilError(t, err)
		served, err := l.Accept()
		assert.NilError(t, err)
		assert.NilError(t, served.Close()) // First: its end waits.
		assert.NilError(t, c.Close())
		assert.NilError(t, l.Close())
	})
}

func TestPortIsKeptForPasta(t *testing.T) {
	for _, proto := range []types.Protocol{types.TCP, types.UDP} {
		t.Run(proto.String(), func(t *testing.T) {
			underPasta(t, func(t *testing.T, pm PortMapper) {
				setSysctl(t, "ip_local_port_range", "40000 40001")
				pbs := mapped(t, pm, ask(proto, 0, 0, "0.0.0.0", "::"))
				port := int(pbs[0].HostPort)
				// What the kernel chooses is another one, until there's none.
				any := mapping{proto.String(), netip.IPv4Unspecified(), 0}
				l, err := listenOnHost(t, any)
				assert.NilError(t, err)
				_, err = listenOnHost(t, any)
				assert.Check(t, is.ErrorContains(err, "address already in use"))
				assert.NilError(t, l.Close())
				// Another daemon's Berth has the other one.
				other := pastaMapper()
				theirs := mapped(t, other, ask(proto, 0, 0, "127.0.0.1"))
				assert.Check(t, is.Equal(int(theirs[0].HostPort), 80001-port))
				pastaBinds(t, proto, port)()
				unmap(t, other, theirs)
				unmap(t, pm, pbs)
				for port := 40000; port <= 40001; port++ { // Nothing is kept.
					onHost(func() {
						fd, err := socket(proto, netip.IPv4Unspecified(), false)
						assert.NilError(t, err)
						assert.Check(t, bind(fd, proto, netip.IPv4Unspecified(), port, false))
						assert.Check(t, unix.Close(fd))
					})
				}
			})
		})
	}
}

// Under the port driver "none" nothing is published on the host.
func TestNoLookWithoutPasta(t *testing.T) {
	newHostFake(t)
	inChild(t)
	assert.Check(t, NewPortMapper(Config{}).rooms.pasta == nil)
	occupy(t, "tcp", "0.0.0.0", 8080, 8080)
	pm := NewPortMapper(Config{RlkClient: (*typedNil)(nil)})
	unmap(t, pm, mapped(t, pm, ask(types.TCP, 8080, 8080, "0.0.0.0")))
}

func TestRootlessKitsCommandLine(t *testing.T) {
	for cmdline, want := range map[string]bool{
		"rootlesskit\x00--net=pasta\x00--port-driver=implicit\x00x.sh\x00":    true,
		"rootlesskit\x00--net=pasta\x00--port-driver\x00implicit\x00x.sh\x00": true,
		"rootlesskit\x00--net=pasta\x00--port-driver=none\x00x.sh\x00":        false,
		"": false,
	} {
		assert.Check(t, is.Equal(isImplicit(cmdline), want), cmdline)
	}
}

// pasta has one wildcard for all host addresses: a range has as many ports as it names.
func TestRangeUnderPastaIsNotShared(t *testing.T) {
	underPasta(t, func(t *testing.T, pm PortMapper) {
		pbs := mapped(t, pm, ask(types.TCP, 5353, 5354, "127.0.0.1"))
		pbs = append(pbs, mapped(t, pm, ask(types.TCP, 5353, 5354, "127.0.0.2"))...)
		_, err := pm.MapPorts(context.Background(), ask(types.TCP, 5353, 5354, "127.0.0.3"))
		assert.Check(t, is.ErrorContains(err, "2 tried, and none can be had"))
		unmap(t, pm, pbs)
	})
}
