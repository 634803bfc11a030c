package stacktest

import (
	"strings"
	"testing"

	"gotest.tools/v3/assert"
)

func TestRacesAreToldApart(t *testing.T) {
	const (
		line  = "time=\"2026-01-01T00:00:00Z\" level=info msg=\"API listen\"\n"
		frame = line + `==================
WARNING: DATA RACE
Write at 0x00c000014158 by goroutine 7:
  github.com/moby/moby/v2/daemon/PACKAGE.(*thing).next()
      github.com/moby/moby/v2/daemon/file_linux.go:97 +0x44

Previous read at 0x00c000014158 by main goroutine:
  github.com/moby/moby/v2/daemon/libnetwork.New()
==================
`
	)
	ours := strings.Replace(frame, "PACKAGE", "libnetwork/portmappers/nat", 1)
	theirs := strings.Replace(frame, "PACKAGE", "libnetwork/portmappers/routed", 1)

	patch, others := races(line)
	assert.Equal(t, len(patch), 0)
	assert.Equal(t, others, 0)

	cut := strings.TrimSuffix(ours, "==================\n") // as when the daemon is killed
	patch, others = races(theirs + ours + theirs + line + cut)
	assert.Equal(t, len(patch), 2)
	assert.Equal(t, others, 2)
	assert.Assert(t, strings.Contains(patch[0], "portmappers/nat.(*thing).next"))
	assert.Assert(t, !strings.Contains(patch[0], "API listen"))
}
