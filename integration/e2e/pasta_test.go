//go:build integration

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"time"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
	"berth/integration/whoami"
)

// With the implicit port driver nobody asks for a port: pasta looks, every second, what
// listens in the child, and binds that on the host, unless it cannot.
var pasta = stack.Options{Net: "pasta", PortDriver: "implicit"}

func TestStockPublishesAStrangersPortWithPasta(t *testing.T) {
	d := stacktest.Start(t, "dockerd-stock", pasta)
	next := nextPort(t, d, "tcp")
	stranger(t, next)
	id, err := d.Run(t, "0:80", "20340:80")
	assert.NilError(t, err)
	// When pasta serves the one, it has seen the other, too.
	assertAnswers(t, id, 20340, "tcp")
	out, err := d.Docker("port", id)
	assert.NilError(t, err)
	assert.Assert(t, is.Contains(out, fmt.Sprintf("80/tcp -> 0.0.0.0:%d", next)))
	assert.Equal(t, get(t, next), "stranger")
}

// stranger answers on the host port until the end of the test.
func stranger(t *testing.T, port int) {
	t.Helper()
	l, err := net.Listen("tcp4", fmt.Sprint(":", port))
	assert.NilError(t, err)
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "stranger") })}
	go s.Serve(l)
	t.Cleanup(func() { assert.NilError(t, s.Close()) })
}

func get(t *testing.T, port int) string {
	t.Helper()
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d", port))
	assert.NilError(t, err)
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	assert.NilError(t, err)
	return string(answer)
}

func TestBerthWithPasta(t *testing.T) {
	d := stacktest.Start(t, "dockerd", pasta)

	t.Run("restarts on a fixed port", func(t *testing.T) {
		id, err := d.Run(t, "20300:80")
		assert.NilError(t, err)
		for range 20 {
			// Connections that were served keep a port for a minute from whoever does not insist.
			assertAnswers(t, id, 20300, "tcp")
			_, err := d.Docker("restart", "-t", "1", id)
			assert.NilError(t, err)
		}
		assertAnswers(t, id, 20300, "tcp")
	})

	t.Run("restarts on a fixed UDP port", func(t *testing.T) {
		id, err := d.Run(t, "20301:80/udp")
		assert.NilError(t, err)
		for range 5 { // at once each time: pasta has not let go of the port yet
			assertAnswers(t, id, 20301, "udp")
			_, err := d.Docker("restart", "-t", "1", id)
			assert.NilError(t, err)
		}
		assertAnswers(t, id, 20301, "udp")
	})

	t.Run("restarts in a full range", func(t *testing.T) {
		var ids []string
		for range 2 {
			id, err := d.Run(t, "8000-8001:80")
			assert.NilError(t, err)
			ids = append(ids, id)
		}
		for range 3 {
			var ports []int
			for _, id := range ids {
				port := int(d.Published(t, id)[0].Port())
				assertAnswers(t, id, port, "tcp")
				ports = append(ports, port)
			}
			slices.Sort(ports)
			assert.DeepEqual(t, ports, []int{8000, 8001})
			_, err := d.Docker(append([]string{"restart", "-t", "1"}, ids...)...)
			assert.NilError(t, err)
		}
	})

	t.Run("fixed port, TCP and UDP", func(t *testing.T) {
		id, err := d.Run(t, "5353:80", "5353:80/udp")
		assert.NilError(t, err)
		assertAnswers(t, id, 5353, "tcp", "udp")
	})

	// pasta has taken the UDP port with the TCP port, and a look at it finds it taken.
	t.Run("UDP where another container has TCP", func(t *testing.T) {
		first, err := d.Run(t, "20330:80")
		assert.NilError(t, err)
		assertAnswers(t, first, 20330, "tcp")
		second, err := d.Run(t, "20330:80/udp")
		assert.NilError(t, err)
		assertAnswers(t, second, 20330, "udp")
		assertAnswers(t, first, 20330, "tcp")
	})

	t.Run("fixed port of a container that was just stopped", func(t *testing.T) {
		first, err := d.Run(t, "20310:80", "20310:80/udp")
		assert.NilError(t, err)
		assertAnswers(t, first, 20310, "tcp", "udp")
		_, err = d.Docker("stop", first)
		assert.NilError(t, err)
		second, err := d.Run(t, "20310:80", "20310:80/udp")
		assert.NilError(t, err)
		assertAnswers(t, second, 20310, "tcp", "udp")
	})

	for _, network := range []string{"tcp", "udp"} {
		t.Run("fixed port of a stranger, "+network, func(t *testing.T) {
			stacktest.Hold(t, hostload.Load{Network: network + "4", Ports: []int{20320}})
			_, err := d.Run(t, "20320:80/"+network)
			assert.ErrorContains(t, err, "20320")
			assert.ErrorContains(t, err, "address already in use")
		})
	}

	for _, network := range []string{"tcp", "udp"} {
		t.Run("dynamic port, strangers on the next 20, "+network, func(t *testing.T) {
			next := nextPort(t, d, network)
			stacktest.Hold(t, hostload.Load{Network: network + "4", Ports: hostload.Range(next, next+19)})
			id, err := d.Run(t, "0:80/"+network)
			assert.NilError(t, err)
			port := int(d.Published(t, id)[0].Port())
			assert.Assert(t, port > next+19, "published at %d", port)
			assertAnswers(t, id, port, network)
		})
	}
}

// Between the look and pasta's bind, the kernel gives nobody the port of its own choice (bind to
// port 0, connect): here it has a hundred to choose from, and does so a thousand times a second.
func TestPastaWhereTheKernelChooses(t *testing.T) {
	const starts = 20
	setSysctl(t, portRangeSysctl, "40000 40399")
	d := stacktest.Start(t, "dockerd", pasta)
	stacktest.Hold(t, hostload.Load{Network: "tcp4", Ports: make([]int, 301), Hold: 300, Churn: time.Millisecond})
	lost := 0
	for range starts {
		id, err := d.Run(t, "0:80")
		assert.NilError(t, err)
		at := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), d.Published(t, id)[0].Port())
		if err := whoami.Await("tcp", at, id, 10*time.Second); err != nil {
			t.Log(err)
			lost++
		}
		_, err = d.Docker("rm", "-f", id)
		assert.NilError(t, err)
	}
	t.Logf("%d of %d published ports were lost to others", lost, starts)
	assert.Equal(t, lost, 0)
}

// assertAnswers checks that the container is what answers at the port on IPv4: RootlessKit
// has pasta serve nothing else, whatever dockerd reports.
func assertAnswers(t *testing.T, id string, port int, networks ...string) {
	t.Helper()
	for _, network := range networks {
		stacktest.AssertAnswers(t, network, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(port)), id)
	}
}
