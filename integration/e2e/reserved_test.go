//go:build integration

package e2e

import (
	"fmt"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
)

// What a Windows host excludes, in blocks of a hundred, as its Linux VM has it reserved. Linux refuses a reserved port to nobody
// who asks for it by number; Windows does. Here a process that holds a block is in Windows' place.
func TestWindowsReservedPorts(t *testing.T) {
	reserved := "80,1433,2869,5357,9001"
	for first := 51563; first+99 <= 55270; first += 100 {
		reserved += fmt.Sprintf(",%d-%d", first, first+99)
	}
	reserved += ",55271-55370"
	setSysctl(t, reservedPortsSysctl, reserved)
	setSysctl(t, portRangeSysctl, "51550 51680")
	d := stacktest.Start(t, "dockerd", stack.Options{})

	// Doctor says where each comes out, and the daemon goes there.
	says := examine(t, d, "0:80")
	assert.Check(t, !says.Failed(), "%+v", says)
	for range 5 {
		assertPublishedIn(t, d, hostload.Range(51550, 51562), "0:80")
	}

	stacktest.Hold(t, hostload.Load{Network: "tcp4", Ports: hostload.Range(51563, 51662)})
	says = examine(t, d, "51563-51663:80")
	assert.Check(t, is.Contains(says.Findings[0].Says, "at 51663, behind 100 that can't"))
	assertPublishedIn(t, d, []int{51663}, "51563-51663:80")

	says = examine(t, d, "51600:80")
	assert.Check(t, says.Failed(), "%+v", says)
	_, err := d.Run(t, "51600:80")
	assert.Check(t, is.ErrorContains(err, "51600"))
	assert.Check(t, is.ErrorContains(err, "address already in use"))

	says = examine(t, d, "1433:80")
	assert.Check(t, is.Equal(says.Findings[0].Check, "reserved"))
	assert.Check(t, !says.Failed(), "%+v", says)
	assertPublishedIn(t, d, []int{1433}, "1433:80")

	says = examine(t, d, "80:80")
	assert.Check(t, says.Failed(), "%+v", says)
	_, err = d.Run(t, "80:80")
	assert.Check(t, is.ErrorContains(err, "permission denied"))
}
