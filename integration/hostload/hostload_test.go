package hostload

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
	"gotest.tools/v3/poll"
)

// freePorts returns n ports that nobody has on 127.0.0.1 at the moment.
func freePorts(t *testing.T, n int) []int {
	t.Helper()
	ports := make([]int, n)
	for i := range ports {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		assert.NilError(t, err)
		defer l.Close()
		ports[i] = l.Addr().(*net.TCPAddr).Port
	}
	return ports
}

func taken(network string, port int) bool {
	s, err := listen(network, "127.0.0.1", port)
	if err != nil {
		return errors.Is(err, unix.EADDRINUSE)
	}
	s.Close()
	return false
}

func TestHoldsUntilStopped(t *testing.T) {
	for _, network := range []string{"tcp4", "udp4"} {
		ports := freePorts(t, 5)
		p, err := Start(Load{Network: network, Address: "127.0.0.1", Ports: ports})
		assert.NilError(t, err)
		for _, port := range ports {
			assert.Assert(t, taken(network, port), "%s port %d is free", network, port)
		}
		r, err := p.Stop()
		assert.NilError(t, err)
		assert.Equal(t, len(r.Held), 5)
		for _, port := range ports {
			assert.Assert(t, !taken(network, port), "%s port %d is held after Stop", network, port)
		}
	}
}

func TestFailsWhenAPortIsTaken(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	assert.NilError(t, err)
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	_, err = Start(Load{Network: "tcp4", Address: "127.0.0.1", Ports: []int{port}})
	assert.ErrorContains(t, err, fmt.Sprintf("127.0.0.1:%d: bind: address already in use", port))
}

func TestSameSeedChoosesTheSamePorts(t *testing.T) {
	ports := freePorts(t, 20)
	var held [][]int
	for range 2 {
		p, err := Start(Load{Network: "tcp4", Address: "127.0.0.1", Ports: ports, Hold: 6, Seed: 7})
		assert.NilError(t, err)
		held = append(held, p.Ports)
		_, err = p.Stop()
		assert.NilError(t, err)
	}
	assert.Equal(t, len(held[0]), 6)
	assert.DeepEqual(t, held[0], held[1])
}

func TestChurns(t *testing.T) {
	ports := freePorts(t, 20)
	p, err := Start(Load{Network: "tcp4", Address: "127.0.0.1", Ports: ports, Hold: 6, Churn: time.Millisecond})
	assert.NilError(t, err)
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if slices.ContainsFunc(ports, func(port int) bool {
			return !slices.Contains(p.Ports, port) && taken("tcp4", port)
		}) {
			return poll.Success()
		}
		return poll.Continue("no port but the first 6 is held")
	})
	r, err := p.Stop()
	assert.NilError(t, err)
	assert.Assert(t, r.Churned > 0)
}

// What churns has one port at any time, and the same sockets.
func TestMovesBetweenPorts(t *testing.T) {
	ports := freePorts(t, 3)
	for network, address := range map[string]string{"tcp4": "127.0.0.1", "tcp6": "::1"} {
		s, err := listenMovable(network, address, ports[0])
		if errors.Is(err, unix.ENOPROTOOPT) {
			t.Log("Linux before 6.3: the sockets that churn are closed")
			return
		}
		assert.NilError(t, err)
		defer s.Close()
		m := s.(movable)
		has := func(want ...bool) {
			t.Helper()
			for i, port := range ports {
				other, err := net.Listen(network, net.JoinHostPort(address, strconv.Itoa(port)))
				assert.Check(t, is.Equal(errors.Is(err, unix.EADDRINUSE), want[i]), "%s port %d: %v", network, port, err)
				if err == nil {
					other.Close()
				}
			}
		}
		has(true, false, false)
		assert.NilError(t, m.release())
		has(false, false, false)
		other, err := net.Listen(network, net.JoinHostPort(address, strconv.Itoa(ports[1])))
		assert.NilError(t, err)
		_, err = m.take(ports[1])
		assert.ErrorIs(t, err, unix.EADDRINUSE)
		other.Close()
		_, err = m.take(ports[2])
		assert.NilError(t, err)
		has(false, false, true)
		assert.NilError(t, m.Close())
		has(false, false, false)
	}
}

func TestEndsWithItsParent(t *testing.T) {
	port := freePorts(t, 1)[0]
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestParentOfALoad$")
	cmd.Env = append(os.Environ(), fmt.Sprint("HOSTLOAD_PORT=", port))
	assert.NilError(t, cmd.Start())
	held := func(want bool) poll.Check {
		return func(poll.LogT) poll.Result {
			if taken("tcp4", port) == want {
				return poll.Success()
			}
			return poll.Continue("port %d held: %v", port, !want)
		}
	}
	poll.WaitOn(t, held(true))
	assert.NilError(t, cmd.Process.Kill())
	assert.ErrorContains(t, cmd.Wait(), "killed")
	poll.WaitOn(t, held(false))
}

// TestParentOfALoad is the process that TestEndsWithItsParent kills, and no test.
func TestParentOfALoad(t *testing.T) {
	port, err := strconv.Atoi(os.Getenv("HOSTLOAD_PORT"))
	if err != nil {
		return
	}
	_, err = Start(Load{Network: "tcp4", Address: "127.0.0.1", Ports: []int{port}})
	assert.NilError(t, err)
	select {}
}
