//go:build integration

package e2e

import (
	"regexp"
	"slices"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/doctor"
	"berth/hack/stack"
	"berth/integration/stacktest"
)

// What doctor says of each case of TestPortDriverMatrix, with each of its kits, and of some more, is what `docker run` then comes to.
func TestDoctorsWordHolds(t *testing.T) {
	needsNamespace(t)
	for _, k := range []kit{
		{"builtin", "gvisor-tap-vsock", true},
		{"builtin", "gvisor-tap-vsock", false},
		{"gvisor-tap-vsock", "gvisor-tap-vsock", true},
		{"gvisor-tap-vsock", "gvisor-tap-vsock", false},
		{"slirp4netns", "slirp4netns", true},
		{"slirp4netns", "slirp4netns", false},
	} {
		t.Run(k.String(), func(t *testing.T) {
			d := stacktest.Start(t, "dockerd", stack.Options{Net: k.Network, PortDriver: k.Driver, NoDetachNetns: !k.Detach})
			whole := t
			more := []matrixCase{
				{name: "privileged", publish: "81:80"},
				{name: "held by a container", publish: "21000:80"},
				{name: "address not on the host", publish: "192.0.2.9:21400:80"},
				{name: "SCTP", publish: "21500:80/sctp"},
				{name: "taken on IPv6 alone", publish: "21600:80", hold: heldFrom("tcp6", 21600, 1)},
			}
			for _, c := range append(slices.Clone(matrixCases), more...) {
				t.Run(c.name, func(t *testing.T) {
					if c.hold != nil {
						c.prepare(t, d, k, map[int]bool{})
					}
					says := examine(t, d, c.publish)
					_, err := d.Run(whole, c.publish)
					assert.Check(t, is.Equal(says.Failed(), err != nil), "doctor: %+v\ndocker run: %v", says.Findings, err)
				})
			}
		})
	}
}

// hostPart leaves the container's port out of what -p is given.
var hostPart = regexp.MustCompile(`:\d+(/\w+)?$`)

// examine asks doctor about what -p is given.
func examine(t *testing.T, d *stacktest.Daemon, publish string) doctor.Report {
	t.Helper()
	a, err := doctor.ParseAsk(hostPart.ReplaceAllString(publish, "$1"))
	assert.NilError(t, err)
	c, err := d.Client()
	assert.NilError(t, err)
	defer c.Close()
	h, err := doctor.Look(doctor.AskDaemon(t.Context(), c, d.RootlessKitSocket()), false)
	assert.NilError(t, err)
	checks, err := doctor.Find(nil)
	assert.NilError(t, err)
	return doctor.Examine(h, checks, []doctor.Ask{a})
}
