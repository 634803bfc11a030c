//go:build integration

package e2e

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"gotest.tools/v3/assert"

	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
)

// Without docker-proxy, what RootlessKit connects to in the child is a rule of iptables'. It is at the
// child's address of each host address, as docker-proxy would be.
func TestWithoutUserlandProxy(t *testing.T) {
	config, err := os.MkdirTemp("", "berth-config-") // t.TempDir keeps others out
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, os.RemoveAll(config)) })
	assert.NilError(t, os.Mkdir(filepath.Join(config, "docker"), 0o755))
	assert.NilError(t, os.WriteFile(filepath.Join(config, "docker", "daemon.json"), []byte(`{"userland-proxy": false}`), 0o644))
	for _, dir := range []string{config, filepath.Join(config, "docker")} { // whatever the umask
		assert.NilError(t, os.Chmod(dir, 0o755))
	}
	d := stacktest.Start(t, "dockerd", stack.Options{Env: []string{"XDG_CONFIG_HOME=" + config}})
	_, err = d.Run(t, "0:80")
	assert.NilError(t, err)
	assert.Assert(t, !proxyRuns(t, d), "docker-proxy serves the port: nothing is shown")

	for _, network := range []string{"tcp", "udp"} {
		t.Run("dynamic port, strangers on the next 20, "+network, func(t *testing.T) {
			next := nextPort(t, d, network)
			stacktest.Hold(t, hostload.Load{Network: network + "4", Ports: hostload.Range(next, next+19)})
			id, err := d.Run(t, "0:80/"+network)
			assert.NilError(t, err)
			port := d.Published(t, id)[0].Port()
			assert.Assert(t, int(port) > next+19, "published at %d", port)
			assertAnswers(t, id, int(port), network)
		})
	}

	at := func(i int, port string) netip.AddrPort {
		return netip.MustParseAddrPort(stacktest.Addresses[i] + ":" + port)
	}
	t.Run("two host addresses, one container", func(t *testing.T) {
		if os.Getuid() != 0 {
			t.Skip(needsAddresses)
		}
		id, err := d.Run(t, stacktest.Addresses[0]+":20400:80", stacktest.Addresses[1]+":20400:80")
		assert.NilError(t, err)
		for i := range stacktest.Addresses {
			stacktest.AssertAnswers(t, "tcp", at(i, "20400"), id)
		}
	})
	t.Run("two host addresses, two containers", func(t *testing.T) {
		if os.Getuid() != 0 {
			t.Skip(needsAddresses)
		}
		var ids []string
		for _, a := range stacktest.Addresses {
			id, err := d.Run(t, a+":20401:80")
			assert.NilError(t, err)
			ids = append(ids, id)
		}
		for i, id := range ids {
			stacktest.AssertAnswers(t, "tcp", at(i, "20401"), id)
		}
	})
}

// proxyRuns tells whether a docker-proxy of the stack's is running.
func proxyRuns(t *testing.T, d *stacktest.Daemon) bool {
	t.Helper()
	status, err := d.Status(t.Context())
	assert.NilError(t, err)
	return slices.ContainsFunc(status.Processes, func(p stack.Process) bool { return p.Program == "docker-proxy" })
}
