//go:build integration

package e2e

import (
	"testing"

	"gotest.tools/v3/assert"

	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
)

// gvisor-tap-vsock listens on both families for 0.0.0.0, so that it meets what another process has on
// [::] alone; a look at 0.0.0.0 does not see that.
func TestPortsHeldOnIPv6Alone(t *testing.T) {
	needsNamespace(t)
	const held = 300
	for _, tt := range []struct {
		name, dockerd string
		noDetach      bool
		fails         string
	}{
		{name: "stock", dockerd: "dockerd-stock", fails: "address already in use"},
		{name: "Berth, detach-netns on", dockerd: "dockerd"},
		{name: "Berth, detach-netns off", dockerd: "dockerd", noDetach: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := stacktest.Start(t, tt.dockerd, stack.Options{PortDriver: "gvisor-tap-vsock", NoDetachNetns: tt.noDetach})
			next := nextPort(t, d, "tcp")
			stacktest.Hold(t, hostload.Load{Network: "tcp6", Ports: hostload.Range(next, next+held-1)})
			id, err := d.Run(t, "0:80")
			if tt.fails != "" {
				assert.ErrorContains(t, err, tt.fails)
				return
			}
			assert.NilError(t, err)
			port := int(d.Published(t, id)[0].Port())
			assert.Assert(t, port < next || port >= next+held, "published at %d", port)
			assertAnswers(t, id, port, "tcp")
		})
	}
}
