package nat

import (
	"net/netip"
	"testing"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

func TestHostAddressesHaveChildAddressesOfTheirOwn(t *testing.T) {
	localhost := netip.MustParseAddr("127.0.0.1")
	f := newFake(t)
	f.child4 = localhost
	c := childIPs{PortDriverClient: f, byHost: map[netip.Addr]netip.Addr{}}
	seen := map[netip.Addr]bool{}
	host := netip.MustParseAddr("10.0.0.0")
	for range 1<<16 + 1000 {
		host = host.Next()
		child := c.ChildHostIP("tcp", host)
		assert.Check(t, netip.MustParsePrefix("127.128.0.0/9").Contains(child) && !seen[child], "%s: %s", host, child)
		assert.Check(t, is.Equal(c.ChildHostIP("udp", host), child))
		seen[child] = true
	}
	for host, want := range map[string]string{
		"0.0.0.0": "127.0.0.1", "127.0.0.1": "127.0.0.1", "127.0.1.2": "127.0.1.2", "2001:db8::1": "::1", "::": "::1",
	} {
		assert.Check(t, is.Equal(c.ChildHostIP("tcp", netip.MustParseAddr(host)).String(), want), host)
	}
	assert.Check(t, !c.ChildHostIP("sctp", host).IsValid())

	f.child4 = netip.MustParseAddr("10.0.2.100") // slirp4netns, gvisor-tap-vsock
	assert.Check(t, is.Equal(c.ChildHostIP("tcp", netip.MustParseAddr("192.0.2.1")), f.child4))
}

func TestTwoContainersOnePortTwoHostAddresses(t *testing.T) {
	f := newFake(t)
	f.child4 = netip.MustParseAddr("127.0.0.1")
	pm := NewPortMapper(Config{RlkClient: f})
	for _, addr := range []string{"192.0.2.1", "192.0.2.2"} {
		pbs, err := pm.MapPorts(t.Context(), ask(types.TCP, 18090, 18090, addr))
		assert.NilError(t, err)
		defer func() { assert.Check(t, pm.UnmapPorts(t.Context(), pbs)) }()
	}
	assert.Check(t, is.Len(f.exposed, 2))
}
