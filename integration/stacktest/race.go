package stacktest

import (
	"os"
	"strings"
	"testing"
)

// checkRaces fails the test if the race detector has reported the patch in the stack's log. A
// daemon without the detector never does.
func checkRaces(t testing.TB, log string) {
	t.Helper()
	data, err := os.ReadFile(log)
	if err != nil {
		t.Error(err)
		return
	}
	patch, others := races(string(data))
	for _, r := range patch {
		t.Errorf("a race in the patch:\n%s", r)
	}
	if others > 0 {
		t.Logf("%d races in other packages of dockerd", others)
	}
}

// races returns the race detector's reports that have a frame of the patch, and the number of
// the other ones.
func races(log string) (patch []string, others int) {
	const begin, end = "WARNING: DATA RACE\n", "==================\n"
	for {
		i := strings.Index(log, begin)
		if i < 0 {
			return patch, others
		}
		var report string
		report, log, _ = strings.Cut(log[i:], end)
		if strings.Contains(report, "/libnetwork/portmappers/nat.") {
			patch = append(patch, report)
		} else {
			others++
		}
	}
}
