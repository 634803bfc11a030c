package soak

import (
	"testing"

	"gotest.tools/v3/assert"
)

func TestVerdict(t *testing.T) {
	first := Sample{Starts: 100, RSS: 100 << 10, Descriptors: 60, Goroutines: 120, RootlessKitFDs: 40}
	noisy := Sample{Starts: 900, RSS: 130 << 10, Descriptors: 70, Goroutines: 140, RootlessKitFDs: 61, Named: 20, Faults: 30, Lost: 25, Injected: 25, Peak: 20}
	assert.Equal(t, len(Verdict(first, noisy)), 0)
	for _, tt := range []struct {
		spoil func(*Sample)
		want  string
	}{
		{func(s *Sample) { s.Failures = 1 }, "1 failures"},
		{func(s *Sample) { s.Injected = 24 }, "25 answers were lost, and 24 starts failed of it"},
		{func(s *Sample) { s.Faults = 0 }, "no fault was injected"},
		{func(s *Sample) { s.Listeners = 2 }, "2 host ports are left that nothing names"},
		{func(s *Sample) { s.Containers = 3 }, "3 containers are left"},
		{func(s *Sample) { s.Descriptors = 860 }, "dockerd's descriptors grew from 60 to 860 in 800 starts"},
		{func(s *Sample) { s.Goroutines = 920 }, "dockerd's goroutines grew from 120 to 920 in 800 starts"},
		{func(s *Sample) { s.RootlessKitFDs = 840 }, "RootlessKit's descriptors grew from 40 to 820 in 800 starts"},
		{func(s *Sample) { s.RSS = 1 << 20 }, "dockerd's RSS (KiB) grew from 102400 to 1048576 in 800 starts"},
		{func(s *Sample) { s.Peak = 0 }, "no published port was ever seen on the host, so that none left proves nothing"},
		{func(s *Sample) { s.Starts = 100 }, "nothing was started after the warm-up"},
	} {
		last := noisy
		tt.spoil(&last)
		assert.DeepEqual(t, Verdict(first, last), []string{tt.want})
	}
}
