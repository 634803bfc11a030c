package nat

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// underPasta runs f with a RootlessKit whose port driver is the implicit one,
// which no client asks.
func underPasta(t *testing.T, f func(t *testing.T, pm PortMapper)) {
	newHostFake(t) // For its check that nothing is left.
	implicit := portDriverIsImplicit
	portDriverIsImplicit = func() bool { return true }
	defer func() { portDriverIsImplicit = implicit }()
	synctest.Test(t, func(t *testing.T) {
		ownPorts = ownPortSet{ports: map[ownPort]ownBindings{}}
		inChild(t)
		t.Cleanup(func() { time.Sleep(2 * pastaDelay) })
		f(t, NewPortMapper(Config{RlkClient: (*typedNil)(nil)}))
	})
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
		pbs := mapped(t, pm, request(types.TCP, 0, 0, "127.0.0.1"))
		assert.Check(t, is.Equal(pbs[0].HostPort, uint16(32772)))
		unmap(t, pm, pbs)

		_, err := pm.MapPorts(context.Background(), request(types.TCP, 32771, 32771, "0.0.0.0"))
		assert.Check(t, is.ErrorContains(err, "host port [::]:32771/tcp: listen tcp6 [::]:32771: bind: address already in use; process "))
		_, err = pm.MapPorts(context.Background(), request(types.TCP, 32769, 32769, "0.0.0.0"))
		assert.Check(t, is.ErrorContains(err, fmt.Sprintf("(pid %d) has it", os.Getpid())))
	})
}

func TestOwnPastasPortIsNoStrangers(t *testing.T) {
	underPasta(t, func(t *testing.T, pm PortMapper) {
		pbs := mapped(t, pm, request(types.TCP, 5353, 5353, "0.0.0.0", "::"))
		occupy(t, "tcp", "::", 5353, 5353) // As pasta does, in a moment.
		occupy(t, "udp", "::", 5353, 5353)

		udp := mapped(t, pm, request(types.UDP, 5353, 5353, "0.0.0.0"))
		unmap(t, pm, udp)
		unmap(t, pm, pbs)
		again := mapped(t, pm, request(types.TCP, 5353, 5353, "0.0.0.0"))
		unmap(t, pm, again)
	})
}

func TestPortIsKeptForPasta(t *testing.T) {
	underPasta(t, func(t *testing.T, pm PortMapper) {
		setSysctl(t, "ip_local_port_range", "40000 40001")
		pbs := mapped(t, pm, request(types.TCP, 40000, 40000, "0.0.0.0"))
		// What the kernel chooses is another one, until there's none.
		l, err := listenOnHost(t, mapping{"tcp", netip.IPv4Unspecified(), 0})
		assert.NilError(t, err)
		defer l.Close()
		_, err = listenOnHost(t, mapping{"tcp", netip.IPv4Unspecified(), 0})
		assert.Check(t, is.ErrorContains(err, "address already in use"))
		occupy(t, "tcp", "0.0.0.0", 40000, 40000) // As pasta does.
		occupy(t, "tcp", "::", 40000, 40000)
		time.Sleep(2 * pastaDelay) // Then it has been let go.
		unmap(t, pm, pbs)
	})
}

func TestOwnPortsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := ownPortSet{ports: map[ownPort]ownBindings{}}
		o.remove(types.TCP, 80)
		assert.Check(t, !o.has(80))
		o.add(types.TCP, 80, 2)
		o.remove(types.TCP, 80)
		time.Sleep(2 * pastaLag)
		assert.Check(t, o.has(80), "one binding is left")
		o.remove(types.TCP, 80)
		assert.Check(t, o.has(80), "pasta may have it yet")
		time.Sleep(pastaLag)
		assert.Check(t, !o.has(80))
		o.add(types.UDP, 81, 1)
		assert.Check(t, is.Len(o.ports, 1))
	})
}

// Under the port driver "none" nothing is published on the host.
func TestNoLookWithoutPasta(t *testing.T) {
	newHostFake(t)
	inChild(t)
	assert.Check(t, !portDriverIsImplicit())
	occupy(t, "tcp", "0.0.0.0", 8080, 8080)
	pm := NewPortMapper(Config{RlkClient: (*typedNil)(nil)})
	unmap(t, pm, mapped(t, pm, request(types.TCP, 8080, 8080, "0.0.0.0")))
}

func TestRootlessKitsCommandLine(t *testing.T) {
	for cmdline, want := range map[string]bool{
		"rootlesskit\x00--net=pasta\x00--port-driver=implicit\x00x.sh\x00":    true,
		"rootlesskit\x00--net=pasta\x00--port-driver\x00implicit\x00x.sh\x00": true,
		"rootlesskit\x00--net=pasta\x00--port-driver=none\x00x.sh\x00":        false,
		"": false,
	} {
		assert.Check(t, is.Equal(isImplicit([]byte(cmdline)), want), cmdline)
	}
}
