package nat

import (
	"context"
	"fmt"
	"net"
	"testing"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// holdHere makes another process hold UDP ports of the tests' namespace.
func holdHere(t *testing.T, ip string, first, last int) {
	t.Helper()
	for port := first; port <= last; port++ {
		l, err := net.ListenPacket("udp4", fmt.Sprintf("%s:%d", ip, port))
		assert.NilError(t, err)
		t.Cleanup(func() { l.Close() })
		if port%128 == 0 {
			freeFilters()
		}
	}
}

// Where nobody is asked, the ports that don't bind are passed, as many as it takes.
func TestRootfulSearch(t *testing.T) {
	const ip = "127.0.0.8"
	holdHere(t, ip, 32768, 32768+299)
	for name, pm := range map[string]PortMapper{"zero value": {}, "nil": NewPortMapper(Config{})} {
		t.Run(name, func(t *testing.T) {
			newFake(t) // For its check that nothing is left.
			for _, reqs := range [][2]int{{0, 0}, {32768, 32768 + 300}} {
				pbs, err := pm.MapPorts(context.Background(), ask(types.UDP, reqs[0], reqs[1], ip))
				assert.NilError(t, err)
				assert.Check(t, pbs[0].HostPort >= 32768+300)
				assert.Check(t, pm.UnmapPorts(context.Background(), pbs))
			}
			_, err := pm.MapPorts(context.Background(), ask(types.UDP, 32768, 32770, ip))
			assert.Check(t, is.ErrorContains(err, "on a host port in 32768-32770 of 127.0.0.8: 3 tried, and none can be had: child namespace: failed to bind host port 127.0.0.8:"))
			_, err = pm.MapPorts(context.Background(), ask(types.UDP, 32768, 32768, ip))
			assert.Check(t, is.Error(err, "failed to bind host port 127.0.0.8:32768/udp: address already in use"), "upstream's own")
		})
	}
}

// One free port of thousands is found, though a search ends when 1,000 did not bind: what others have is seen.
func TestRootfulSearchFindsTheOnlyFreePort(t *testing.T) {
	const ip, free = "127.0.0.11", 58123
	setSysctl(t, "ip_local_reserved_ports", "33300-56999")
	holdHere(t, ip, 32768, 33299) // More than five searches go through in order.
	holdHere(t, ip, 57000, free-1)
	holdHere(t, ip, free+1, 60999)
	newFake(t) // For its check that nothing is left.
	pm := NewPortMapper(Config{})
	for range 5 { // Blindly, one in four.
		pbs, err := pm.MapPorts(context.Background(), ask(types.UDP, 0, 0, ip))
		assert.NilError(t, err)
		assert.Check(t, is.Equal(int(pbs[0].HostPort), free))
		assert.Check(t, pm.UnmapPorts(context.Background(), pbs))
	}
}

func TestRootfulSearchIsBounded(t *testing.T) {
	const ip = "127.0.0.10"
	holdHere(t, ip, 41000, 41000+1199)
	_, err := PortMapper{}.MapPorts(context.Background(), ask(types.UDP, 41000, 41000+1200, ip))
	assert.Check(t, is.ErrorContains(err, "1000 tried, 1000 did not bind in the child: child namespace: failed to bind"))
	assert.Check(t, is.ErrorContains(err, "; publish another host port, or 0 for any free one"))
}

func TestRootfulRangeOfOwnPorts(t *testing.T) {
	pm := NewPortMapper(Config{})
	reqs := ask(types.TCP, 8080, 8080, "127.0.0.9")
	pbs, err := pm.MapPorts(context.Background(), reqs)
	assert.NilError(t, err)
	more, err := pm.MapPorts(context.Background(), ask(types.TCP, 8080, 8081, "127.0.0.9"))
	assert.NilError(t, err)
	_, err = pm.MapPorts(context.Background(), ask(types.TCP, 8080, 8081, "127.0.0.9"))
	assert.Check(t, is.ErrorContains(err, "all ports are allocated; stop the container that has it, or publish another host port"))
	assert.Check(t, pm.UnmapPorts(context.Background(), append(pbs, more...)))
}
