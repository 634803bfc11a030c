package nat

import (
	"context"
	"net"
	"strings"
	"testing"

	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// The bridge driver's AddEphemeralPorts, which is Swarm's, has more ports mapped for a container that runs, and
// DelEphemeralPorts has a part of them unmapped: before the container's own ports, after them, or without.
func TestEphemeralPorts(t *testing.T) {
	for _, addrs := range [][]string{
		{"0.0.0.0", "::"},
		{"192.0.2.1", "192.0.2.2"}, // They share a child address.
	} {
		for order, unmapped := range map[string][]string{
			"part before":  {"part", "own", "rest"},
			"part after":   {"own", "part", "rest"},
			"rest first":   {"rest", "part", "own"},
			"part only":    {"part"},
			"part by part": {"part one", "own one", "part one", "rest", "own one"},
		} {
			t.Run(addrs[0]+", "+order, func(t *testing.T) {
				f := newFake(t)
				pm := NewPortMapper(Config{RlkClient: f})
				mapped := func(port int) []portmapperapi.PortBinding {
					pbs, err := pm.MapPorts(context.Background(), ask(types.TCP, port, port, addrs...))
					assert.NilError(t, err)
					return pbs
				}
				left := map[string][]portmapperapi.PortBinding{"own": mapped(18100), "part": mapped(18101), "rest": mapped(18102)}
				check := func() {
					t.Helper()
					for _, pbs := range left {
						for _, pb := range pbs {
							assert.Check(t, f.has(pb), "%s is gone from the host", pb)
							_, err := portallocator.Get().RequestPort(pb.ChildHostIP, "tcp", int(pb.HostPort))
							assert.Check(t, is.ErrorContains(err, "already allocated"), "%s", pb)
						}
					}
				}
				unmap := func(name string, pbs []portmapperapi.PortBinding) {
					t.Helper()
					assert.Check(t, pm.UnmapPorts(context.Background(), pbs))
					check()
					for _, pb := range pbs {
						assert.Check(t, !f.has(pb), "%s of %q is still on the host", pb, name)
					}
				}
				check()
				for _, what := range unmapped {
					name, _, one := strings.Cut(what, " ")
					n := len(left[name])
					if one { // of its addresses, the last that is left
						n = 1
					}
					pbs := left[name][len(left[name])-n:]
					left[name] = left[name][:len(left[name])-n]
					unmap(what, pbs)
				}
				// What was unmapped as a whole can be had again, beside what is left.
				if len(left["part"]) == 0 {
					again := mapped(18101)
					assert.Check(t, pm.UnmapPorts(context.Background(), again))
					l, err := net.Listen("tcp", again[0].NAT.String())
					assert.NilError(t, err)
					assert.NilError(t, l.Close())
				}
				for _, pbs := range left {
					assert.Check(t, pm.UnmapPorts(context.Background(), pbs))
				}
			})
		}
	}
}
