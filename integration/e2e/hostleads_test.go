//go:build integration

package e2e

import (
	"fmt"
	"net"
	"os"
	"os/user"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
)

const (
	portRangeSysctl     = "/proc/sys/net/ipv4/ip_local_port_range"
	reservedPortsSysctl = "/proc/sys/net/ipv4/ip_local_reserved_ports"

	// The kernel's own ip_local_port_range, which every new namespace has.
	firstDefault, lastDefault = 32768, 60999
)

// A published port is one that the host's administrator left to programs, also when that
// changes under a running daemon.
func TestDynamicPortsAreThoseOfTheHost(t *testing.T) {
	var odd, even []int
	for port := 40000; port <= 40100; port++ {
		if port%2 == 0 {
			even = append(even, port)
		} else {
			odd = append(odd, port)
		}
	}
	setSysctl(t, portRangeSysctl, "40000 40100")
	setSysctl(t, reservedPortsSysctl, list(even))
	d := stacktest.Start(t, "dockerd", stack.Options{})
	for range 10 {
		assertPublishedIn(t, d, odd, "0:80")
	}
	assertPublishedIn(t, d, odd, "0:80/udp")
	assertPublishedIn(t, d, odd, "127.0.0.1::80")

	setSysctl(t, reservedPortsSysctl, list(odd))
	for range 5 {
		assertPublishedIn(t, d, even, "0:80")
	}
	setSysctl(t, reservedPortsSysctl, "41000-41049")
	setSysctl(t, portRangeSysctl, "41000 41100")
	for range 5 {
		assertPublishedIn(t, d, hostload.Range(41050, 41100), "0:80")
	}

	// What the user names is the user's own choice.
	assertPublishedIn(t, d, []int{41000}, "41000:80")
	assertPublishedIn(t, d, []int{41001}, "41001-41010:80")
}

// Upstream reads the child's range, which is the kernel's default, and so does Berth where it
// cannot see the host.
func TestWithoutAViewDynamicPortsAreThoseOfTheChild(t *testing.T) {
	setSysctl(t, portRangeSysctl, "40000 40100")
	for _, tt := range []struct {
		name, dockerd string
		options       stack.Options
	}{
		{"stock", "dockerd-stock", stack.Options{}},
		{"detach-netns off", "dockerd", stack.Options{NoDetachNetns: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := stacktest.Start(t, tt.dockerd, tt.options)
			assertPublishedIn(t, d, []int{firstDefault}, "0:80")
		})
	}
}

// The port driver slirp4netns does not say why it refuses a port. Nor does it bring back what
// a container answers to a datagram from the host's loopback (dockerd-rootless.sh starts it
// with --disable-host-loopback), so that another address is asked.
func TestSlirp4netnsPortDriver(t *testing.T) {
	needsNamespace(t)
	d := stacktest.Start(t, "dockerd", stack.Options{Net: "slirp4netns", PortDriver: "slirp4netns"})
	for _, network := range []string{"tcp", "udp"} {
		t.Run(network, func(t *testing.T) {
			next := nextPort(t, d, network)
			stacktest.Hold(t, hostload.Load{Network: network + "4", Ports: hostload.Range(next, next+99)})
			assertPublishedIn(t, d, []int{next + 100}, stacktest.Addresses[0]+"::80/"+network)
			_, err := d.Run(t, fmt.Sprintf("%d:80/%s", next, network))
			// RootlessKit's own words for it are a map as Go prints it.
			assert.ErrorContains(t, err, fmt.Sprintf("PortManager.AddPort(): bad request: add_hostfwd: slirp_add_hostfwd failed: listen %s4 0.0.0.0:%d: bind: address already in use", network, next))
		})
	}
}

// From the daemon's user namespace the host's socket table tells three kinds of owners.
func TestBusyPortSaysWhoseItIs(t *testing.T) {
	needsNamespace(t)
	d := stacktest.Start(t, "dockerd", stack.Options{})
	account, err := user.Lookup(d.User())
	assert.NilError(t, err)
	uid, err := strconv.Atoi(account.Uid)
	assert.NilError(t, err)
	for i, tt := range []struct {
		name string
		uid  int
		want string
	}{
		{"another user's", 0, "another user's process"},
		{"a sub-id's", firstSubID(t, d.User()) + 999, "a container's process (of user 1000 in this daemon's user namespace)"},
		{"the daemon's user's", uid, "another process of this user"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			port := 20210 + i
			listenAs(t, tt.uid, port)
			_, err := d.Run(t, fmt.Sprintf("%d:80", port))
			assert.ErrorContains(t, err, fmt.Sprintf("address already in use; %s has it; stop what holds it (sudo ss -ltnp 'sport = :%d'", tt.want, port))
		})
	}
}

// listenAs makes a socket that the kernel knows as the user's.
func listenAs(t *testing.T, uid, port int) {
	t.Helper()
	runtime.LockOSThread() // setfsuid(2) is about one thread
	defer runtime.UnlockOSThread()
	assert.NilError(t, unix.Setfsuid(uid))
	defer func() { assert.NilError(t, unix.Setfsuid(0)) }()
	l, err := net.Listen("tcp4", fmt.Sprint(":", port))
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, l.Close()) })
}

func firstSubID(t *testing.T, name string) (id int) {
	t.Helper()
	data, err := os.ReadFile("/etc/subuid")
	assert.NilError(t, err)
	for line := range strings.Lines(string(data)) {
		if f := strings.Split(line, ":"); f[0] == name {
			id, err = strconv.Atoi(f[1])
			assert.NilError(t, err)
			return id
		}
	}
	t.Fatalf("%s has no sub-ids", name)
	return 0
}

// With the process in the child namespace, all there is to go by is what the port driver says.
func TestManyPortsHeldInARow(t *testing.T) {
	needsNamespace(t)
	const held = 500
	for _, tt := range []struct {
		name    string
		options stack.Options
		view    bool
	}{
		{"detach-netns on", stack.Options{}, true},
		{"detach-netns off", stack.Options{NoDetachNetns: true}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := stacktest.Start(t, "dockerd", tt.options)
			for _, publish := range []string{"0:80", "0:80/udp", "127.0.0.1:0:80"} {
				t.Run(publish, func(t *testing.T) {
					network := networkOf(publish)
					next := nextPort(t, d, network)
					stacktest.Hold(t, hostload.Load{Network: network + "4", Ports: hostload.Range(next, next+held-1)})
					// Without a view the search jumps, and may come out anywhere.
					want := hostload.Range(firstDefault, lastDefault)
					if tt.view {
						want = []int{next + held}
					}
					assertPublishedIn(t, d, want, publish)
				})
			}
			t.Run("range with only the last one free", func(t *testing.T) {
				stacktest.Hold(t, hostload.Load{Network: "tcp4", Ports: hostload.Range(20000, 20000+held-1)})
				assertPublishedIn(t, d, []int{20000 + held}, fmt.Sprintf("20000-%d:80", 20000+held))
			})
		})
	}
}

// assertPublishedIn starts a container and checks that it is published at one of the ports,
// and answers there.
func assertPublishedIn(t *testing.T, d *stacktest.Daemon, ports []int, publish string) {
	t.Helper()
	id, err := d.Run(t, publish)
	assert.NilError(t, err)
	published := d.Published(t, id)
	assert.Assert(t, len(published) > 0)
	for _, a := range published {
		assert.Assert(t, slices.Contains(ports, int(a.Port())), "-p %s is published at %v", publish, published)
		stacktest.AssertAnswers(t, networkOf(publish), a, id)
	}
}

func list(ports []int) string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(ports), " ", ","), "[]")
}

func needsNamespace(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("the host's part is played by a network namespace of the tests' own, which takes root")
	}
}

// setSysctl sets a value in the tests' own network namespace until the end of the test.
func setSysctl(t *testing.T, file, value string) {
	t.Helper()
	needsNamespace(t)
	old, err := os.ReadFile(file)
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(file, []byte(value), 0o644))
	t.Cleanup(func() { assert.NilError(t, os.WriteFile(file, old, 0o644)) })
}
