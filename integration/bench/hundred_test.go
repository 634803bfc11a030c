//go:build integration

package bench

import (
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"gotest.tools/v3/assert"

	"berth/hack/stack"
	"berth/integration/stacktest"
	"berth/integration/whoami"
)

// BenchmarkHundred starts and stops a container with a hundred dynamic ports, on
// stock's stack and on Berth's, in turn. Each ends before the next begins: the
// two users have one host.
func BenchmarkHundred(b *testing.B) {
	if os.Getenv(inUserNamespace) != "" {
		b.Skip("a stack needs root here")
	}
	contenders := []*contender{{name: "stock", dockerd: "dockerd-stock"}, {name: "berth", dockerd: "dockerd"}}
	for i, c := range contenders {
		c.Daemon = stacktest.StartAs(b, stacktest.Users[i], c.dockerd, stack.Options{})
		c.startAndStop(b) // What is done once for a daemon is not measured.
		c.starts, c.stops = nil, nil
	}
	for turn := 0; b.Loop(); turn++ {
		for i := range contenders {
			contenders[(turn+i)%len(contenders)].startAndStop(b)
		}
	}
	for _, c := range contenders {
		b.ReportMetric(median(c.starts), "ns/"+c.name+"-start")
		b.ReportMetric(median(c.stops), "ns/"+c.name+"-stop")
	}
}

type contender struct {
	*stacktest.Daemon
	name, dockerd string
	starts, stops []time.Duration
}

func (c *contender) startAndStop(b *testing.B) {
	ctx, asked := b.Context(), network.PortMap{}
	for i := range 100 {
		asked[network.MustParsePort(fmt.Sprintf("%d/tcp", 80+i))] = []network.PortBinding{{}}
	}
	id, err := c.Create(ctx, asked)
	assert.NilError(b, err)

	begin := time.Now()
	_, err = c.API.ContainerStart(ctx, id, client.ContainerStartOptions{})
	c.starts = append(c.starts, time.Since(begin))
	assert.NilError(b, err)

	published, err := c.Ports(ctx, id)
	assert.NilError(b, err)
	assert.Equal(b, len(published), len(asked))
	served := published[network.MustParsePort("80/tcp")]
	assert.Assert(b, len(served) > 0)
	// It heeds no signal before it serves.
	at := netip.AddrPortFrom(netip.IPv4Unspecified(), served[0].Port())
	assert.NilError(b, whoami.Await("tcp", at, id, time.Minute))

	begin = time.Now()
	_, err = c.API.ContainerStop(ctx, id, client.ContainerStopOptions{})
	c.stops = append(c.stops, time.Since(begin))
	assert.NilError(b, err)
	_, err = c.API.ContainerRemove(ctx, id, client.ContainerRemoveOptions{})
	assert.NilError(b, err)
}
