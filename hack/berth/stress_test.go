//go:build linux

package main

import (
	"os/exec"
	"testing"

	"gotest.tools/v3/assert"

	"berth/integration/stress"
)

func TestVerdict(t *testing.T) {
	all := stress.Result{Starts: 80, Published: 80, Answered: 80}
	some := stress.Result{Starts: 80, Published: 60, Answered: 60, InUse: 20}
	strangers := stress.Result{Starts: 80, Published: 80, Answered: 79, Misdelivered: 1}
	assert.NilError(t, verdict(some, all))
	assert.NilError(t, verdict(strangers, all))
	assert.ErrorContains(t, verdict(all, all), "the load proved nothing: stock failed none")
	assert.ErrorContains(t, verdict(some, some), "only 60 of Berth's 80 containers were published and answered")
	assert.ErrorContains(t, verdict(some, strangers), "only 79 of Berth's 80")
	err := verdict(all, some)
	assert.ErrorContains(t, err, "only 60")
	assert.ErrorContains(t, err, "stock failed none")
}

func TestQuote(t *testing.T) {
	out, err := exec.Command("sh", "-c", "printf %s "+quote(`/it's a "$HOME"`)).Output()
	assert.NilError(t, err)
	assert.Equal(t, string(out), `/it's a "$HOME"`)
}
