//go:build integration

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/network"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
	"berth/integration/whoami"
)

// binding is a port binding in the daemon's API.
type binding struct {
	HostIP   string `json:"HostIp"`
	HostPort string
}

// request is a start through the daemon's API: the docker CLI refuses some of
// what others may send.
type request struct {
	name     string
	port     string // of the container, 80/tcp by default
	bindings []binding
	network  string // the default one by default

	refused string // in the error; "" if there is none
	dropped bool   // the container starts, and is published nowhere
	ports   []int  // those that will do; nil: the dynamic ones
}

// ipv6Only is a network whose containers have no IPv4 address.
const ipv6Only = "ipv6-only"

var requests = []request{
	{name: "port 0", bindings: []binding{{HostPort: "0"}}},
	{name: "no port", bindings: []binding{{}}},
	{name: "port 65535", bindings: []binding{{HostPort: "65535"}}, ports: []int{65535}},
	{name: "port 65536", bindings: []binding{{HostPort: "65536"}}, refused: `invalid port specification: "65536"`},
	{name: "port -1", bindings: []binding{{HostPort: "-1"}}, refused: `invalid port specification: "-1"`},
	{name: "not a port", bindings: []binding{{HostPort: "http"}}, refused: `invalid port specification: "http"`},
	{name: "reversed range", bindings: []binding{{HostPort: "20010-20000"}}, refused: `invalid port specification: "20010-20000"`},
	// It comes out at the first one that an ordinary user may have.
	{name: "range of 65,535 ports", bindings: []binding{{HostPort: "1-65535"}}, ports: []int{1024}},
	{name: "range from 0", bindings: []binding{{HostPort: "0-65535"}}, refused: "invalid port range: 0-65535"},
	{name: "not an address", bindings: []binding{{HostIP: "localhost"}}, refused: `ParseAddr("localhost"): unable to parse IP`},
	{name: "number too large in an address", bindings: []binding{{HostIP: "127.0.0.256"}}, refused: `ParseAddr("127.0.0.256")`},
	{
		name: "address not on the host", bindings: []binding{{HostIP: "10.1.2.3"}},
		refused: "bind: cannot assign requested address; publish on an address that the host has",
	},
	// The bridge driver takes no zone further, and the kernel wants one.
	{name: "address with a zone", bindings: []binding{{HostIP: "fe80::1%lo"}}, refused: "bind: invalid argument"},
	{name: "IPv4 address written as IPv6", bindings: []binding{{HostIP: "::ffff:127.0.0.1"}}},

	// An IPv4 address with IPv6 only can mean a protocol, which is the port drivers' word and
	// not the API's, or a container without an IPv4 address. For that one, the bridge driver
	// drops the binding before the port mapper is asked, and says nothing.
	{name: "protocol tcp6", port: "80/tcp6", bindings: []binding{{HostIP: "127.0.0.1"}}, refused: "protocol"},
	{name: "IPv4 address, container with IPv6 only", network: ipv6Only, bindings: []binding{{HostIP: "127.0.0.1"}}, dropped: true},
	{name: "any address, container with IPv6 only", network: ipv6Only, bindings: []binding{{}}},

	{
		name: "same binding twice", bindings: []binding{{HostPort: "20100"}, {HostPort: "20100"}},
		refused: "both 0.0.0.0 and 0.0.0.0: address already in use",
	},
	{name: "same dynamic binding twice", bindings: []binding{{}, {}}, refused: "both 0.0.0.0 and 0.0.0.0: address already in use"},
	{
		name: "one address and all addresses", bindings: []binding{{HostPort: "20200"}, {HostIP: "127.0.0.1", HostPort: "20200"}},
		refused: "both 0.0.0.0 and 127.0.0.1: address already in use",
	},
	// What was refused has left no reservation.
	{name: "port that the range came out at", bindings: []binding{{HostPort: "1024"}}, ports: []int{1024}},
	{name: "port 65535 again", bindings: []binding{{HostPort: "65535"}}, ports: []int{65535}},
	{name: "port of the binding twice", bindings: []binding{{HostPort: "20100"}}, ports: []int{20100}},
}

// Whatever is asked for, it is published, or refused with an error that says
// why, and then nothing is left of it.
func TestBadInput(t *testing.T) {
	needsNamespace(t)
	for _, tt := range []struct {
		name    string
		options stack.Options
	}{
		{"detach-netns on", stack.Options{}},
		{"detach-netns off", stack.Options{NoDetachNetns: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := stacktest.Start(t, "dockerd", tt.options)
			_, err := d.Docker("network", "create", "--ipv4=false", "--ipv6", ipv6Only)
			assert.NilError(t, err)
			before := hostPorts(t, d)
			for _, r := range requests {
				t.Run(r.name, func(t *testing.T) {
					if id := r.start(t, d); id != "" {
						r.check(t, d, id)
						remove(t, d, id)
					}
					assertSane(t, d, before)
				})
			}
			if tt.options.NoDetachNetns {
				return // nothing new, and most of a minute
			}
			t.Run("200 ports", func(t *testing.T) {
				publishMany(t, d)
				assertSane(t, d, before)
			})
		})
	}
}

// start starts a container as r wants it, and returns its id, or "" when it is
// refused as it is to be.
func (r request) start(t *testing.T, d *stacktest.Daemon) string {
	t.Helper()
	port := r.port
	if port == "" {
		port = "80/tcp"
	}
	id, err := startByAPI(t, d, r.network, map[string][]binding{port: r.bindings})
	if r.refused == "" {
		assert.NilError(t, err)
		return id
	}
	assert.ErrorContains(t, err, r.refused)
	return ""
}

// check checks where the container is published.
func (r request) check(t *testing.T, d *stacktest.Daemon, id string) {
	t.Helper()
	ports := r.ports
	if ports == nil {
		ports = hostload.Range(firstDefault, lastDefault)
	}
	published := d.Published(t, id)
	assert.Equal(t, len(published) == 0, r.dropped, "published at %v", published)
	for _, a := range published {
		assert.Assert(t, slices.Contains(ports, int(a.Port())), "published at %v", a)
		stacktest.AssertAnswers(t, "tcp", a, id)
	}
}

// publishMany publishes 200 ports of one container, on both families.
func publishMany(t *testing.T, d *stacktest.Daemon) {
	const many = 200
	bindings := map[string][]binding{}
	for port := 80; port < 80+many; port++ {
		bindings[fmt.Sprintf("%d/tcp", port)] = []binding{{}}
	}
	begin := time.Now()
	id, err := startByAPI(t, d, "", bindings)
	assert.NilError(t, err)
	t.Logf("%d ports on two families published in %v", many, time.Since(begin).Round(time.Millisecond))
	families := map[uint16][]netip.Addr{}
	for _, a := range d.Published(t, id) {
		families[a.Port()] = append(families[a.Port()], a.Addr())
		// What listens for a port that the container does not serve takes the connection, too.
		conn, err := net.Dial("tcp", whoami.Reachable(a).String())
		assert.NilError(t, err)
		// No TIME-WAIT: as many ports of the host would be in the way of later tests for a minute.
		assert.NilError(t, conn.(*net.TCPConn).SetLinger(0))
		assert.NilError(t, conn.Close())
	}
	assert.Equal(t, len(families), many)
	for port, addrs := range families {
		slices.SortFunc(addrs, netip.Addr.Compare)
		assert.Assert(t, slices.Equal(addrs, []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}), "port %d is published on %v", port, addrs)
	}
	ports, err := d.Ports(t.Context(), id)
	assert.NilError(t, err)
	for _, at := range ports[network.MustParsePort("80/tcp")] {
		stacktest.AssertAnswers(t, "tcp", at, id)
	}
	remove(t, d, id)
}

// startByAPI makes and starts a container of the test image. One that cannot be
// started is removed.
func startByAPI(t *testing.T, d *stacktest.Daemon, network string, bindings map[string][]binding) (id string, _ error) {
	t.Helper()
	exposed := map[string]struct{}{}
	for port := range bindings {
		exposed[port] = struct{}{}
	}
	var made struct {
		ID string `json:"Id"`
	}
	err := call(t, d, "/containers/create", map[string]any{
		"Image":        whoami.Image,
		"ExposedPorts": exposed,
		"HostConfig":   map[string]any{"PortBindings": bindings, "NetworkMode": network},
	}, &made)
	if err != nil {
		return "", err
	}
	if err := call(t, d, "/containers/"+made.ID+"/start", nil, nil); err != nil {
		remove(t, d, made.ID)
		return "", err
	}
	t.Cleanup(func() {
		if t.Failed() {
			_, _ = d.Docker("rm", "-f", made.ID) // it may be removed already
		}
	})
	return made.ID, nil
}

func remove(t *testing.T, d *stacktest.Daemon, id string) {
	t.Helper()
	_, err := d.Docker("rm", "-f", id)
	assert.NilError(t, err)
}

// call posts to the daemon's API, and returns its error.
func call(t *testing.T, d *stacktest.Daemon, path string, body, answer any) error {
	t.Helper()
	data, err := json.Marshal(body)
	assert.NilError(t, err)
	resp, err := stacktest.HTTP(d.Stack).Post("http://docker"+path, "application/json", bytes.NewReader(data))
	assert.NilError(t, err) // the daemon has gone
	defer resp.Body.Close()
	data, err = io.ReadAll(resp.Body)
	assert.NilError(t, err)
	if resp.StatusCode >= http.StatusBadRequest {
		var e struct{ Message string }
		assert.NilError(t, json.Unmarshal(data, &e), "%s", data)
		return fmt.Errorf("status %d: %s", resp.StatusCode, e.Message)
	}
	if answer != nil {
		assert.NilError(t, json.Unmarshal(data, answer), "%s", data)
	}
	return nil
}

// assertSane checks that nothing is left on the host, and that the daemon is
// well.
func assertSane(t *testing.T, d *stacktest.Daemon, before string) {
	t.Helper()
	// Some port drivers release a port a moment after they said so.
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if now := hostPorts(t, d); now != before {
			return poll.Continue("the host's ports are\n%swere\n%s", now, before)
		}
		return poll.Success()
	}, poll.WithTimeout(time.Minute))
	_, err := d.Docker("version")
	assert.NilError(t, err)
	log, err := os.ReadFile(d.Log)
	assert.NilError(t, err)
	assert.Assert(t, !bytes.Contains(log, []byte("panic")), "see %s", d.Log)
}

// hostPorts lists what listens on the host, and what RootlessKit says it has
// exposed.
func hostPorts(t *testing.T, d *stacktest.Daemon) string {
	t.Helper()
	var lines []string
	for _, s := range stacktest.Sockets(t) {
		lines = append(lines, s.String()+"\n")
	}
	slices.Sort(lines)
	for _, p := range stacktest.Exposed(t, d.Stack) {
		lines = append(lines, fmt.Sprintf("RootlessKit %+v\n", p.Spec))
	}
	return strings.Join(lines, "")
}
