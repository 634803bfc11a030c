//go:build integration

// Package bench measures Berth's port mapper: against stock's where no port is
// refused, and against the bare request where ports are.
package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"testing"

	"berth/daemon/libnetwork/portmappers/nat"
	"berth/hack/tree"
	"berth/integration/stack"

	"github.com/containerd/log"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	stock "github.com/moby/moby/v2/daemon/libnetwork/portmappers/nat"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"github.com/rootless-containers/rootlesskit/v3/pkg/api/client"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"gotest.tools/v3/assert"
)

// The child and the host are one namespace here. They do not meet: each has a
// loopback address of its own.
var (
	childIP = netip.MustParseAddr("127.81.0.1")
	hostIP  = netip.MustParseAddr("127.81.0.2")
)

// rootlessKit is a PortDriverClient, as dockerd's own, for one host address.
type rootlessKit struct{ ports port.Manager }

func (rootlessKit) ChildHostIP(string, netip.Addr) netip.Addr { return childIP }

func (r rootlessKit) AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, hostPort int) (func() error, error) {
	st, err := r.ports.AddPort(ctx, port.Spec{
		Proto:      proto + "4",
		ParentIP:   hostIP.String(),
		ParentPort: hostPort,
		ChildIP:    childIP.String(),
		ChildPort:  hostPort,
	})
	if err != nil {
		return nil, fmt.Errorf("error while calling RootlessKit PortManager.AddPort(): %w", err)
	}
	return func() error { return r.ports.RemovePort(ctx, st.ID) }, nil
}

// willing is a port driver that refuses nothing, and takes no time for it.
type willing struct{}

func (willing) ChildHostIP(string, netip.Addr) netip.Addr { return childIP }

func (willing) AddPort(context.Context, string, netip.Addr, netip.Addr, int) (func() error, error) {
	return func() error { return nil }, nil
}

// startRootlessKit starts a stack for the benchmark and returns a client of its
// RootlessKit, whose port driver is builtin.
func startRootlessKit(b *testing.B) rootlessKit {
	root, err := tree.Root()
	assert.NilError(b, err)
	s, err := stack.At("bench")
	assert.NilError(b, err)
	assert.NilError(b, s.Down(b.Context()))
	logFile := filepath.Join(root, "build", "log", "bench.log")
	assert.NilError(b, s.Up(b.Context(), stack.Options{Bin: filepath.Join(root, "build", "bin"), Log: logFile}))
	b.Cleanup(func() { assert.NilError(b, s.Down(context.Background())) })
	c, err := client.New(s.RootlessKitSocket())
	assert.NilError(b, err)
	b.Cleanup(func() { c.Close() })
	return rootlessKit{c.PortManager()}
}

func request(first, last uint16) []portmapperapi.PortBindingReq {
	return []portmapperapi.PortBindingReq{{PortBinding: types.PortBinding{
		Proto: types.TCP, Port: 80, HostIP: hostIP.AsSlice(), HostPort: first, HostPortEnd: last,
	}}}
}

func mapAndUnmap(b *testing.B, pm portmapperapi.PortMapper, first, last uint16) {
	ctx := context.Background()
	pbs, err := pm.MapPorts(ctx, request(first, last))
	if err != nil {
		b.Fatal(err)
	}
	if err := pm.UnmapPorts(ctx, pbs); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkNoRefusal publishes a dynamic port that is free at once, and unmaps
// it: through a port driver that costs nothing, and through a real RootlessKit.
func BenchmarkNoRefusal(b *testing.B) {
	for name, driver := range map[string]nat.PortDriverClient{"fake": willing{}, "rootlesskit": startRootlessKit(b)} {
		for _, bb := range []struct {
			mapper string
			pm     portmapperapi.PortMapper
		}{
			{"stock", stock.NewPortMapper(stock.Config{RlkClient: driver})},
			{"berth", nat.NewPortMapper(nat.Config{RlkClient: driver})},
		} {
			b.Run("driver="+name+"/mapper="+bb.mapper, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					mapAndUnmap(b, bb.pm, 0, 0)
				}
			})
		}
	}
}

// BenchmarkRefusal is the cost of a refused port: of the bare request to a real
// RootlessKit, and of all that a search does about it. The search passes 500
// held ports; what it costs to publish the free one at last is in the figure.
func BenchmarkRefusal(b *testing.B) {
	_ = log.SetLevel("error") // A line for each search would be measured, too.
	const first, held = 20000, 500
	for p := first; p < first+held; p++ {
		l, err := net.Listen("tcp", netip.AddrPortFrom(hostIP, uint16(p)).String())
		assert.NilError(b, err)
		defer l.Close()
	}
	driver := startRootlessKit(b)
	b.Run("bare", func(b *testing.B) {
		for b.Loop() {
			if _, err := driver.AddPort(context.Background(), "tcp", hostIP, childIP, first); err == nil {
				b.Fatal(errors.New("a held port was published"))
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N), "ns/refusal")
	})
	b.Run("search", func(b *testing.B) {
		pm := nat.NewPortMapper(nat.Config{RlkClient: driver})
		for b.Loop() {
			mapAndUnmap(b, pm, first, first+held)
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*held), "ns/refusal")
	})
}
