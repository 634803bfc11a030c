//go:build integration

package e2e

import (
	"fmt"
	"net"
	"testing"

	"gotest.tools/v3/assert"

	"berth/hack/stack"
	"berth/integration/stacktest"
)

// pesto says yes to each port that it doesn't have itself: the cases of the other port
// drivers, where others have ports, are not for it.
func TestPesto(t *testing.T) {
	for _, detach := range []bool{true, false} {
		t.Run(fmt.Sprintf("detach-netns=%t", detach), func(t *testing.T) {
			d := stacktest.Start(t, "dockerd", stack.Options{Net: "pasta", PortDriver: "pesto", NoDetachNetns: !detach})
			ids := map[string]string{}
			for _, publish := range []string{"0:80", "0:80/udp", "127.0.0.1:0:80", "23000:80", "23000:80/udp", "23010-23019:80"} {
				id, err := d.Run(t, publish)
				assert.NilError(t, err)
				ids[publish] = id
			}
			_, err := d.Docker("restart", "-t", "0", ids["23000:80"])
			assert.NilError(t, err)
			for publish, id := range ids {
				assertAnswers(t, id, int(d.Published(t, id)[0].Port()), networkOf(publish))
			}
			if detach { // A named port isn't looked at first.
				t.Run("a stranger's port", func(t *testing.T) { pestoBesideStranger(t, d) })
			}
		})
	}
}

// pestoBesideStranger has pesto asked for a port that it can't have: README's Limits tell of it, and
// may stop when this fails.
func pestoBesideStranger(t *testing.T, d *stacktest.Daemon) {
	run := func(port int) string {
		id, err := d.Run(t, fmt.Sprintf("127.0.0.1:%d:80", port))
		assert.NilError(t, err)
		return id
	}
	const before, strangers, after, last = 23100, 23101, 23102, 23103
	stranger(t, strangers)
	first, bad, second, third := run(before), run(strangers), run(after), run(last)
	assert.Equal(t, get(t, strangers), "stranger")
	assertAnswers(t, first, before, "tcp")
	// pasta takes one table after the other: it is through with all but the last.
	_, err := net.Dial("tcp", fmt.Sprint("127.0.0.1:", after))
	assert.ErrorContains(t, err, "connection refused")
	_, err = d.Docker("rm", "-f", bad)
	assert.NilError(t, err)
	assertAnswers(t, second, after, "tcp")
	assertAnswers(t, third, last, "tcp")
}
