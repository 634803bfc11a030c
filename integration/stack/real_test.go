//go:build integration

// Package stack has the tests of hack/stack on real stacks.
package stack

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"berth/hack/checkout"
	"berth/hack/stack"
	"berth/integration/stacktest"
)

func TestMain(m *testing.M) { stacktest.Main(m) }

func binDir(t *testing.T) string {
	t.Helper()
	root, err := checkout.Root()
	assert.NilError(t, err)
	return checkout.Bin(root)
}

func TestUpTwiceSaysSo(t *testing.T) {
	d := stacktest.Start(t, "dockerd", stack.Options{})
	assert.ErrorIs(t, d.Up(t.Context(), stack.Options{Bin: binDir(t), Log: filepath.Join(t.TempDir(), "log")}), stack.ErrUp)
	_, err := d.Docker("version")
	assert.NilError(t, err)
}

func TestRunsWhatTheUserCannotReach(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "bin")
	out, err := exec.Command("cp", "-r", binDir(t), bin).CombinedOutput()
	assert.NilError(t, err, "%s", out)
	assert.NilError(t, os.Chmod(bin, 0o700))
	d := stacktest.Start(t, "dockerd", stack.Options{Bin: bin})
	_, err = d.Run(t, "0:80")
	assert.NilError(t, err)
}

func TestFailedStartShowsTheLogAndLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	dockerd, log := filepath.Join(dir, "dockerd"), filepath.Join(dir, "log")
	assert.NilError(t, os.WriteFile(dockerd, []byte("#!/bin/sh\necho no luck today\nexit 3\n"), 0o755))
	s := stacktest.At(t)
	err := s.Up(t.Context(), stack.Options{Bin: binDir(t), Dockerd: dockerd, Log: log})
	assert.ErrorContains(t, err, "the stack ended while it started: exit status") // RootlessKit does not always pass it on
	assert.ErrorContains(t, err, "no luck today")
	assert.ErrorContains(t, err, log)
	assert.Assert(t, !s.Exists())
	data, err := os.ReadFile(log)
	assert.NilError(t, err)
	assert.Assert(t, strings.Contains(string(data), "no luck today"))
}

func TestInterruptedStartLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	dockerd, log := filepath.Join(dir, "dockerd"), filepath.Join(dir, "log")
	assert.NilError(t, os.WriteFile(dockerd, []byte("#!/bin/sh\necho dockerd is asleep\nexec sleep 1000\n"), 0o755))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			if data, err := os.ReadFile(log); err == nil && strings.Contains(string(data), "dockerd is asleep") {
				cancel()
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	s := stacktest.At(t)
	err := s.Up(ctx, stack.Options{Bin: binDir(t), Dockerd: dockerd, Log: log})
	assert.ErrorIs(t, err, context.Canceled)
	assert.Assert(t, !s.Exists())
	assert.NilError(t, s.Down(t.Context()))
}

// Containers do not end with the daemons, and then nothing of the stack's own is above them.
func TestDownFindsTheContainersOfAKilledStack(t *testing.T) {
	d := stacktest.Start(t, "dockerd", stack.Options{})
	id, err := d.Run(t, "0:80")
	assert.NilError(t, err)
	out, err := d.Docker("inspect", "-f", "{{.State.Pid}}", id)
	assert.NilError(t, err)
	pid, err := strconv.Atoi(out)
	assert.NilError(t, err)

	programs, err := filepath.Glob("/proc/[0-9]*/exe")
	assert.NilError(t, err)
	for _, exe := range programs {
		if program, err := os.Readlink(exe); err == nil && filepath.Dir(program) == filepath.Join(d.Dir, "bin") {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(exe)))
			assert.NilError(t, err)
			// Killed with one that died before it.
			if err := unix.Kill(pid, unix.SIGKILL); err != unix.ESRCH {
				assert.NilError(t, err)
			}
		}
	}
	assert.NilError(t, unix.Kill(pid, 0), "the container has ended, too")
	assert.NilError(t, d.Down(t.Context()))
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if err := unix.Kill(pid, 0); err != unix.ESRCH {
			return poll.Continue("process %d: %v", pid, err) // a zombie until process 1 reaps it
		}
		return poll.Success()
	})
}
