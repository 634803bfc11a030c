package nat

import (
	"net/netip"
	"testing"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

func TestHostAddressesHaveChildAddressesOfTheirOwn(t *testing.T) {
	table := childIPTable{children: map[netip.Addr]netip.Addr{}, hosts: map[netip.Addr]netip.Addr{}}
	seen := map[netip.Addr]bool{}
	host := netip.MustParseAddr("10.0.0.0")
	for range 1000 {
		host = host.Next()
		child := table.of(host, localhost)
		assert.Check(t, child.IsLoopback() && child != localhost && !seen[child], "%s: %s", host, child)
		assert.Check(t, is.Equal(table.of(host, localhost), child))
		seen[child] = true
	}
	// Where two meet, the second one moves on.
	other := childIPTable{children: map[netip.Addr]netip.Addr{}, hosts: map[netip.Addr]netip.Addr{
		table.of(host, localhost): host.Next(),
	}}
	assert.Check(t, is.Equal(other.of(host, localhost), table.of(host, localhost).Next()))

	for _, tc := range []struct{ host, child string }{
		{"0.0.0.0", "127.0.0.1"},
		{"127.0.0.1", "127.0.0.1"},
		{"127.0.1.2", "127.0.1.2"},
		{"192.0.2.1", "10.0.2.100"}, // slirp4netns, gvisor-tap-vsock
		{"2001:db8::1", "::1"},
		{"::", "::1"},
	} {
		got := table.of(netip.MustParseAddr(tc.host), netip.MustParseAddr(tc.child))
		assert.Check(t, is.Equal(got.String(), tc.child), tc.host)
	}
}

func TestTwoContainersOnePortTwoHostAddresses(t *testing.T) {
	f := newFake(t)
	f.child4 = localhost
	a := published(t, f, request(types.TCP, 18090, 18090, "192.0.2.1"))
	b := published(t, f, request(types.TCP, 18090, 18090, "192.0.2.2"))
	assert.Check(t, is.Equal(a, b))
	assert.Check(t, is.Len(f.exposed, 2))
}
