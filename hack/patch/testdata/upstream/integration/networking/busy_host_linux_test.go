package networking

import (
	"errors"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"testing"

	networktypes "github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/moby/moby/v2/integration/internal/container"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/skip"
)

// Check that a container whose host port is left to the daemon is published when other processes hold the
// ports that the daemon would try next. A rootless daemon's own network namespace doesn't show that they do.
//
// Regression test for https://github.com/moby/moby/issues/52903
func TestPublishOnBusyHost(t *testing.T) {
	skip.If(t, testEnv.IsRemoteDaemon, "holds ports on the daemon's host")

	ctx := setupTest(t)
	c := testEnv.APIClient()
	port := networktypes.MustParsePort("80/tcp")

	publish := func(t *testing.T) int {
		t.Helper()
		id := container.Run(ctx, t, c,
			container.WithExposedPorts("80/tcp"),
			container.WithPortMap(networktypes.PortMap{port: {{HostIP: netip.IPv4Unspecified(), HostPort: "0"}}}),
		)
		t.Cleanup(func() {
			_, err := c.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true})
			assert.Check(t, err)
		})
		bindings := container.Inspect(ctx, t, c, id).NetworkSettings.Ports[port]
		assert.Assert(t, len(bindings) > 0)
		hostPort, err := strconv.Atoi(bindings[0].HostPort)
		assert.NilError(t, err)
		return hostPort
	}

	// The ports after this one are next.
	last := publish(t)
	held := map[int]bool{}
	for p := last + 1; p <= min(last+100, 65535); p++ {
		l, err := net.Listen("tcp4", net.JoinHostPort("0.0.0.0", strconv.Itoa(p)))
		if err != nil {
			assert.Assert(t, errors.Is(err, syscall.EADDRINUSE), err)
		} else {
			defer l.Close()
		}
		held[p] = true
	}

	for range 3 {
		p := publish(t)
		assert.Check(t, !held[p], "port %d is another process's", p)
	}
}
