//go:build integration

package e2e

import (
	"regexp"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/doctor"
	"berth/integration/stacktest"
)

// doctorCases are those of which doctor has something to say besides matrixCases. They come after those, on the same stack.
var doctorCases = []matrixCase{
	{name: "privileged", publish: "81:80"},
	{name: "held by a container", publish: "21000:80"},
	{name: "address not on the host", publish: "192.0.2.9:21400:80"},
	{name: "SCTP", publish: "21500:80/sctp"},
	{name: "taken on IPv6 alone", publish: "21600:80", hold: heldFrom("tcp6", 21600, 1)},
}

// assertDoctorsWord checks that docker run came to what doctor had said.
func assertDoctorsWord(t *testing.T, says doctor.Report, err error) {
	t.Helper()
	assert.Check(t, is.Equal(says.Failed(), err != nil), "doctor: %+v\ndocker run: %v", says.Findings, err)
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
