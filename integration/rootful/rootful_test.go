//go:build integration

// Package rootful shows what a rootful dockerd gets of the search: there is no RootlessKit to ask, but ports are taken all the same.
package rootful

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"gotest.tools/v3/assert"

	"berth/hack/checkout"
	"berth/integration/cage"
	"berth/integration/hostload"
	"berth/integration/stacktest"
	"berth/integration/whoami"
)

var full = flag.Bool("full", false, "30 starts and all the cases, which takes minutes, instead of some")

// TestMain gives root's tests a network namespace of their own: it is the daemon's, too.
func TestMain(m *testing.M) { stacktest.Main(m) }

var port80 = network.MustParsePort("80/tcp")

// daemon is a rootful dockerd in the tests' network namespace.
type daemon struct {
	*stacktest.Daemon // without a stack, so that only what goes through the API is to be had
}

// start starts the daemon of that name from build/bin, with the test image. It ends with f, and leaves nothing.
func start(t *testing.T, name string, f func(d daemon)) {
	root, err := checkout.Root()
	assert.NilError(t, err)
	log := checkout.Log(root, "test", strings.ReplaceAll(t.Name(), "/", "-")+"-"+name+".log")
	d, err := cage.Dockerd(t.Context(), checkout.Bin(root, name), log)
	assert.NilError(t, err)
	defer func() {
		assert.Check(t, d.Stop())
		if t.Failed() {
			t.Logf("the daemon's log: %s", log)
			return
		}
		assert.Check(t, os.Remove(log))
	}()
	assert.NilError(t, whoami.Import(t.Context(), root, d.API))
	f(daemon{&stacktest.Daemon{API: d.API}})
}

// run starts a container with port 80 at the host port, checks that it is what answers there, and removes it.
func (d daemon) run(t *testing.T, hostPort string) error {
	t.Helper()
	ctx := t.Context()
	id, err := d.Create(ctx, network.PortMap{port80: {{HostPort: hostPort}}})
	assert.NilError(t, err)
	defer func() {
		_, err := d.API.ContainerRemove(context.WithoutCancel(ctx), id, client.ContainerRemoveOptions{Force: true})
		assert.Check(t, err)
	}()
	if _, err := d.API.ContainerStart(ctx, id, client.ContainerStartOptions{}); err != nil {
		return err
	}
	published := d.Published(t, id)
	assert.Assert(t, len(published) > 0)
	for _, at := range published {
		assert.Equal(t, at.Port(), published[0].Port(), "published at %v", published)
		stacktest.AssertAnswers(t, "tcp", netip.AddrPortFrom(at.Addr(), at.Port()), id)
	}
	return nil
}

func needsRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("a rootful daemon takes root")
	}
}

// hold has another process hold ports on the host until release.
func hold(t *testing.T, ports []int) (release func()) {
	t.Helper()
	if len(ports) == 0 {
		return func() {}
	}
	p, err := hostload.Start(hostload.Load{Network: "tcp4", Ports: ports})
	assert.NilError(t, err)
	return func() {
		_, err := p.Stop()
		assert.Check(t, err)
	}
}

// row is what came of starts with so many dynamic ports taken in a row, as it is in build/results.
type row struct {
	Taken  int `json:"taken_in_a_row"`
	Starts int `json:"starts"`
	Berth  int `json:"berth_published"`
	Stock  int `json:"stock_published"`
}

// Both daemons take the dynamic ports in order, one a start, from the first one on; each case has daemons of its own.
func TestRootfulDynamicPort(t *testing.T) {
	needsRoot(t)
	starts, free, cases := 6, 3, []int{0, 12, 300} // free: how many ports there are before the taken ones
	if *full {
		starts, free, cases = 30, 20, []int{0, 9, 12, 300, 5000}
	}
	var rows []row
	for _, taken := range cases {
		t.Run(fmt.Sprint(taken, " taken"), func(t *testing.T) {
			dynamic, err := hostload.DynamicPorts(free + taken)
			assert.NilError(t, err)
			defer hold(t, dynamic[free:])()
			r := row{Taken: taken, Starts: starts}
			for name, n := range map[string]*int{"dockerd": &r.Berth, "dockerd-stock": &r.Stock} {
				start(t, name, func(d daemon) {
					for range starts {
						if err := d.run(t, "0"); err == nil {
							*n++
						} else {
							assert.ErrorContains(t, err, "address already in use")
						}
					}
				})
			}
			t.Logf("%d taken in a row, %d starts: Berth publishes %d, stock %d", taken, starts, r.Berth, r.Stock)
			rows = append(rows, r)
			assert.Equal(t, r.Berth, starts)
			if taken < 10 { // stock tries ten ports
				assert.Equal(t, r.Stock, starts)
			} else {
				assert.Assert(t, r.Stock < starts, "stock fails none: nothing is shown")
			}
		})
	}
	stacktest.WriteResults(t, "rootful.json", rows)
}

// What names the container's endpoint is another each time.
var endpoint = regexp.MustCompile(`on endpoint \S+ \([0-9a-f]{64}\)`)

func TestRootfulFixedPortFailsAsStock(t *testing.T) {
	needsRoot(t)
	const port = "20500"
	defer hold(t, []int{20500})()
	said := map[string]string{}
	for _, name := range []string{"dockerd", "dockerd-stock"} {
		start(t, name, func(d daemon) {
			err := d.run(t, port)
			assert.ErrorContains(t, err, "address already in use")
			assert.Assert(t, endpoint.MatchString(err.Error()), err)
			said[name] = endpoint.ReplaceAllString(err.Error(), "on an endpoint")
			assert.NilError(t, d.run(t, "20501"))
		})
	}
	assert.Equal(t, said["dockerd"], said["dockerd-stock"])
}

func TestRootfulRangeComesOutAtItsLastPort(t *testing.T) {
	needsRoot(t)
	ports := make([]int, 40)
	for i := range ports {
		ports[i] = 20600 + i
	}
	defer hold(t, ports)()
	start(t, "dockerd", func(d daemon) { assert.NilError(t, d.run(t, "20600-20640")) })
}

// What `berth doctor --rootful` says is what the daemon then does. The system's socket is in a /run of the command's own.
func TestDoctorOfARootfulDaemon(t *testing.T) {
	needsRoot(t)
	root, err := checkout.Root()
	assert.NilError(t, err)
	defer hold(t, []int{20700})()
	start(t, "dockerd", func(d daemon) {
		socket := strings.TrimPrefix(d.API.DaemonHost(), "unix://")
		says := func(args ...string) (string, error) {
			script := `mount -t tmpfs tmpfs /run && ln -s "$1" /run/docker.sock && shift && exec "$@"`
			out, err := exec.Command("unshare", slices.Concat([]string{"-m", "sh", "-c", script, "sh", socket, checkout.Bin(root, "berth"), "doctor", "--rootful"}, args)...).CombinedOutput()
			return string(out), err
		}
		for _, port := range []string{"80", "20700", "20701"} {
			out, failed := says(port)
			assert.Equal(t, failed != nil, d.run(t, port) != nil, "%s", out)
			t.Logf("%s", out)
		}
		out, err := says()
		assert.NilError(t, err, out)
		assert.Assert(t, strings.Contains(out, ", patched") && !strings.Contains(out, "newuidmap"), out)
	})
}
