//go:build integration

package faults

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
	"berth/integration/whoami"
)

// inFlight is how many containers are being started when the end comes.
const inFlight = 20

// TestKill ends a process that matters to all starts, while they are going on. Without the host
// process, they succeed. Without dockerd or RootlessKit they fail, and their ports are free: after
// a restart of the stack, with all that the dead have left in its files, the same starts succeed.
func TestKill(t *testing.T) {
	d := stacktest.Start(t, "dockerd", stack.Options{})
	own := listeners(t, d.Stack)
	var published []string // at some time

	t.Run("host process", func(t *testing.T) {
		load := holdSome(t)
		ended := startAll(d)
		waitForAPort(t, d, own)
		assert.NilError(t, load.Kill())
		assert.Equal(t, failures(t, ended), 0)
		allAnswer(t, d)
		published = append(published, listeners(t, d.Stack)...)
		removeAll(t, d)
		assert.DeepEqual(t, listeners(t, d.Stack), own)
	})
	for _, victim := range []string{"dockerd", "docker-rootlesskit"} {
		t.Run(victim, func(t *testing.T) {
			load := holdSome(t)
			ended := startAll(d)
			waitForAPort(t, d, own)
			published = append(published, listeners(t, d.Stack)...)
			stacktest.Kill(t, d.Stack, victim)
			assert.Check(t, failures(t, ended) > 0, "no start was in flight")
			_, err := load.Stop()
			assert.NilError(t, err)
			rootlessKitEnds(t, d.Stack)
			areFree(t, published)

			assert.NilError(t, d.Restart(t.Context(), d.Options))
			removeAll(t, d)
			if left := listeners(t, d.Stack); !slices.Equal(left, own) {
				// What bridge driver and sandbox of a start have recorded, a kill can part: then dockerd, stock as
				// well, publishes the start's port once more, and knows of no container that has it.
				t.Logf("until the next restart, dockerd publishes of those that it was starting: %v", left)
				assert.NilError(t, d.Restart(t.Context(), d.Options))
			}
			assert.DeepEqual(t, listeners(t, d.Stack), own)
			assert.Equal(t, failures(t, startAll(d)), 0)
			allAnswer(t, d)
			published = append(published, listeners(t, d.Stack)...)
			removeAll(t, d)
			assert.DeepEqual(t, listeners(t, d.Stack), own)
		})
	}
	assert.NilError(t, d.Down(t.Context(), d.Options))
	areFree(t, published)
}

// holdSome has another process hold some of the ports that a daemon takes first.
func holdSome(t *testing.T) *hostload.Process {
	t.Helper()
	ports, err := hostload.DynamicPorts(1000)
	assert.NilError(t, err)
	load, err := hostload.Start(hostload.Load{Network: "tcp4", Ports: ports, Hold: 300, Churn: 5 * time.Millisecond})
	assert.NilError(t, err)
	return load
}

// waitForAPort returns when the first of the starts has published its port.
func waitForAPort(t *testing.T, d *stacktest.Daemon, own []string) {
	t.Helper()
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if len(listeners(t, d.Stack)) <= len(own) {
			return poll.Continue("no start has published its port yet")
		}
		return poll.Success()
	}, poll.WithTimeout(time.Minute), poll.WithDelay(10*time.Millisecond))
}

// failures waits for all the starts, and counts those that failed.
func failures(t *testing.T, ended <-chan error) int {
	t.Helper()
	var failed []error
	deadline := time.After(2 * time.Minute)
	for i := range inFlight {
		select {
		case err := <-ended:
			if err != nil {
				failed = append(failed, err)
			}
		case <-deadline:
			t.Fatalf("%d of %d starts do not end", inFlight-i, inFlight)
		}
	}
	if failed != nil {
		t.Logf("%d of %d starts failed, one of them: %v", len(failed), inFlight, failed[0])
	}
	return len(failed)
}

// allAnswer checks that each of the containers answers at its own port.
func allAnswer(t *testing.T, d *stacktest.Daemon) {
	t.Helper()
	for i := range inFlight {
		id, err := d.Docker("inspect", "-f", "{{.Id}}", containerName(i))
		assert.NilError(t, err)
		for _, a := range d.Published(t, id) {
			stacktest.AssertAnswers(t, "tcp", a, id)
		}
	}
}

// startAll starts all the containers at once, and returns where the outcome of each is told.
func startAll(d *stacktest.Daemon) <-chan error {
	ended := make(chan error, inFlight)
	for i := range inFlight {
		go func() {
			_, err := d.Docker("run", "-d", "--name", containerName(i), "-p", "0:80", whoami.Image)
			ended <- err
		}()
	}
	return ended
}

func containerName(i int) string { return fmt.Sprint("in-flight-", i) }

// removeAll removes the containers that there are.
func removeAll(t *testing.T, d *stacktest.Daemon) {
	t.Helper()
	ids, err := d.Docker("ps", "-aq")
	assert.NilError(t, err)
	if ids != "" {
		_, err = d.Docker(append([]string{"rm", "-f"}, strings.Fields(ids)...)...)
		assert.NilError(t, err)
	}
}

// rootlessKitEnds waits until the stack's RootlessKit is gone: without a dockerd it ends by itself.
func rootlessKitEnds(t *testing.T, s *stack.Stack) {
	t.Helper()
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if p, err := s.Process(t.Context(), "docker-rootlesskit"); err == nil {
			return poll.Continue("RootlessKit still runs: %v", p)
		}
		return poll.Success()
	}, poll.WithTimeout(time.Minute))
}

// areFree checks that nobody holds the addresses any more.
func areFree(t *testing.T, addresses []string) {
	t.Helper()
	if os.Getuid() != 0 {
		return // someone else on the machine may have them by now
	}
	for _, a := range slices.Compact(slices.Sorted(slices.Values(addresses))) {
		l, err := net.Listen("tcp", a)
		if assert.Check(t, err) {
			assert.NilError(t, l.Close())
		}
	}
}
