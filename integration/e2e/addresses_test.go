//go:build integration

package e2e

import (
	"net/netip"
	"os"
	"testing"

	"gotest.tools/v3/assert"

	"berth/hack/stack"
	"berth/integration/stacktest"
)

// Two containers have the same port on two host addresses, as they can with a
// rootful Docker.
func TestTwoContainersOnePortTwoHostAddresses(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip(needsAddresses)
	}
	const port = "20300"
	run := func(t *testing.T, dockerd string) (*stacktest.Daemon, []string, error) {
		d := stacktest.Start(t, dockerd, stack.Options{})
		var ids []string
		for _, a := range stacktest.Addresses {
			id, err := d.Run(t, a+":"+port+":80")
			if err != nil {
				return d, ids, err
			}
			ids = append(ids, id)
		}
		return d, ids, nil
	}
	t.Run("stock fails", func(t *testing.T) {
		_, _, err := run(t, "dockerd-stock")
		assert.ErrorContains(t, err, "port is already allocated")
	})
	t.Run("Berth publishes", func(t *testing.T) {
		d, ids, err := run(t, "dockerd")
		assert.NilError(t, err)
		check := func() {
			t.Helper()
			for i, id := range ids {
				stacktest.AssertAnswers(t, "tcp", netip.MustParseAddrPort(stacktest.Addresses[i]+":"+port), id)
			}
		}
		check()
		// In the other order.
		for _, id := range ids {
			_, err := d.Docker("restart", "-t", "1", id)
			assert.NilError(t, err)
		}
		check()

		_, err = d.Docker(append([]string{"update", "--restart", "always"}, ids...)...)
		assert.NilError(t, err)
		assert.NilError(t, d.Restart(t.Context(), d.Options))
		check()
	})
}
