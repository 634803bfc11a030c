//go:build integration

// Package stack has the tests of hack/stack on real stacks.
package stack

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"berth/hack/checkout"
	"berth/hack/stack"
	"berth/integration/stacktest"
	"berth/integration/whoami"
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
	_, err = s.Purge(t.Context(), stack.Options{})
	assert.NilError(t, err)
}

// Containers do not end with the daemons, and then nothing of the stack's own is above them.
func TestDownFindsTheContainersOfAKilledStack(t *testing.T) {
	d := stacktest.Start(t, "dockerd", stack.Options{})
	id, err := d.Run(t, "0:80")
	assert.NilError(t, err)
	pid := containerPID(t, d, id)
	killAll(t, d)
	assert.NilError(t, unix.Kill(pid, 0), "the container has ended, too")
	assert.NilError(t, d.Down(t.Context(), d.Options))
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		if err := unix.Kill(pid, 0); err != unix.ESRCH {
			return poll.Continue("process %d: %v", pid, err) // a zombie until process 1 reaps it
		}
		return poll.Success()
	})
}

func containerPID(t *testing.T, d *stacktest.Daemon, id string) int {
	t.Helper()
	c, err := d.API.ContainerInspect(t.Context(), id, client.ContainerInspectOptions{})
	assert.NilError(t, err)
	return c.Container.State.Pid
}

// killAll ends all the stack's processes at once, but what containers run.
func killAll(t *testing.T, d *stacktest.Daemon) {
	t.Helper()
	status, err := d.Status(t.Context())
	assert.NilError(t, err)
	killed := 0
	for _, p := range status.Processes {
		if p.Program != "hostname" {
			killed++
			assert.NilError(t, p.Signal(unix.SIGKILL))
		}
	}
	assert.Assert(t, killed > 5, "%v", status.Processes)
}

// What merely has something of the stack in its mount table is not the stack's: a container of another engine that was given
// its socket, a service that has a mount namespace of its own since somebody mounted a disk beneath the stack.
func TestDownSparesStrangers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting takes root")
	}
	d := stacktest.Start(t, "dockerd", stack.Options{})
	host := t.TempDir()
	socket := filepath.Join(host, "docker.sock")
	assert.NilError(t, os.WriteFile(socket, nil, 0o600))
	container := inMountNamespace(t, fmt.Sprintf("mount --bind '%s/run/docker.sock' '%s'", d.Dir, socket))

	disk := filepath.Join(d.Dir, "home", "disk")
	assert.NilError(t, exec.Command("setpriv", "--reuid", fmt.Sprint(d.UID()), "--clear-groups", "mkdir", disk).Run())
	assert.NilError(t, unix.Mount("disk", disk, "tmpfs", 0, ""))
	mounted := true
	unmount := func() {
		if mounted {
			assert.NilError(t, unix.Unmount(disk, 0))
			mounted = false
		}
	}
	t.Cleanup(unmount)
	assert.NilError(t, os.WriteFile(filepath.Join(disk, "file"), []byte("precious"), 0o644))
	service := inMountNamespace(t, "true")

	for what, pid := range map[string]int{"container": container, "service": service} {
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
		assert.NilError(t, err)
		assert.Assert(t, strings.Contains(string(mounts), d.Dir), "the %s does not see the stack", what)
	}
	assert.NilError(t, d.Down(t.Context(), d.Options))
	_, err := d.Purge(t.Context(), d.Options)
	assert.ErrorContains(t, err, "nothing is removed before that is unmounted: "+disk)
	data, err := os.ReadFile(filepath.Join(disk, "file"))
	assert.NilError(t, err)
	assert.Equal(t, string(data), "precious")
	unmount()
	_, err = d.Purge(t.Context(), d.Options)
	assert.NilError(t, err)
	for what, pid := range map[string]int{"container": container, "service": service} {
		_, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid)) // a zombie has none
		assert.NilError(t, err, "the %s was ended", what)
	}
}

// inMountNamespace starts a process that has a mount namespace of its own, in which the command has been run.
func inMountNamespace(t *testing.T, command string) (pid int) {
	t.Helper()
	cmd := exec.Command("sh", "-c", command+" && echo ready && exec sleep 1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	cmd.Stderr = t.Output()
	out, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	ready := make([]byte, 6)
	_, err = io.ReadFull(out, ready)
	assert.NilError(t, err)
	return cmd.Process.Pid
}

// After a crash, of one process or of all, as in a reboot, the same stack comes up: with its images, its volumes, and its
// containers, of which those with a restart policy run.
func TestUpResumes(t *testing.T) {
	d := stacktest.Start(t, "dockerd", stack.Options{})
	_, err := d.Docker("volume", "create", "kept")
	assert.NilError(t, err)
	id, err := d.Docker("run", "-d", "--restart", "always", "-p", "20390:80", "-v", "kept:/kept", whoami.Image)
	assert.NilError(t, err)
	answers := func() {
		t.Helper()
		stacktest.AssertAnswers(t, "tcp", netip.MustParseAddrPort("127.0.0.1:20390"), id)
		_, err := d.Docker("volume", "inspect", "kept")
		assert.NilError(t, err)
	}
	answers()
	up := func(t *testing.T, start func(context.Context, stack.Options) error) {
		t.Helper()
		// A daemon may have brought back what it had started, and then nothing is left to do.
		if err := start(t.Context(), d.Options); err != nil {
			assert.ErrorIs(t, err, stack.ErrUp)
		}
		answers()
	}

	for program, start := range map[string]func(context.Context, stack.Options) error{
		"dockerd":            d.Up,
		"docker-rootlesskit": d.Up,
		"containerd":         d.Up,
		// Their loss leaves the daemon up.
		"containerd-shim-runc-v2": d.Restart,
		"docker-proxy":            d.Restart,
	} {
		t.Run(program, func(t *testing.T) {
			p, err := d.Process(t.Context(), program)
			assert.NilError(t, err)
			assert.NilError(t, p.Signal(unix.SIGKILL))
			poll.WaitOn(t, func(poll.LogT) poll.Result {
				if now, err := d.Process(t.Context(), program); err == nil && now == p {
					return poll.Continue("%v has not ended", p)
				}
				return poll.Success()
			})
			up(t, start)
		})
	}
	t.Run("all at once", func(t *testing.T) {
		killAll(t, d)
		up(t, d.Up)
	})
	t.Run("down", func(t *testing.T) {
		assert.NilError(t, d.Down(t.Context(), d.Options))
		status, err := d.Status(t.Context())
		assert.NilError(t, err)
		assert.Assert(t, status.Exists && !status.Up && len(status.Processes) == 0, "%+v", status)
		up(t, d.Up)
	})
}

// What root runs and reads next is not for the user to say.
func TestRootHeedsNoStateOfTheUsers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("it is about root")
	}
	d := stacktest.Start(t, "dockerd", stack.Options{})
	before, err := d.Status(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, before.Options.Dockerd, d.Options.Dockerd)
	state := filepath.Join(d.Dir, "state.json")
	out, err := exec.Command("setpriv", "--reuid", fmt.Sprint(d.UID()), "--clear-groups", "sed", "-i", "-E",
		`s,"(dockerd|bin|log|rootlesskit)": .*,"\1": "/evil"\,,`, state).CombinedOutput()
	assert.NilError(t, err, "%s", out)
	data, err := os.ReadFile(state)
	assert.NilError(t, err)
	assert.Assert(t, strings.Count(string(data), "/evil") == 4, "%s", data)
	after, err := d.Status(t.Context())
	assert.NilError(t, err)
	assert.Assert(t, after.Up)
	assert.DeepEqual(t, after.Options, before.Options)
}

// Whatever the user makes of the paths in the home while root starts and removes stacks there, root changes nothing elsewhere.
func TestRootFollowsNoLinkOfTheUsers(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("it is about root")
	}
	s := stacktest.At(t)
	canary := t.TempDir()
	secret := filepath.Join(canary, "secret")
	assert.NilError(t, os.WriteFile(secret, nil, 0o600))
	assert.NilError(t, os.Chmod(canary, 0o700))
	seen := func() string {
		t.Helper()
		var seen []string
		for _, file := range []string{canary, secret} {
			var st unix.Stat_t
			assert.NilError(t, unix.Lstat(file, &st))
			seen = append(seen, fmt.Sprintf("%o %d:%d %v", st.Mode, st.Uid, st.Gid, st.Ctim))
		}
		entries, err := os.ReadDir(canary)
		assert.NilError(t, err)
		return fmt.Sprint(seen, entries)
	}
	before := seen()

	// The directory itself, then what is in it, become links: as fast as the user can.
	script := fmt.Sprintf(`dir=%q to=%q
while :; do
	ln -s "$to" "$dir" 2>/dev/null && rm -f "$dir"
	for name in bin home run tmp state.json state.json.tmp; do
		mv "$dir/$name" "$dir/was" && ln -s "$to/secret" "$dir/$name"; ln -sfn "$to" "$dir/$name"
	done
	rm -rf "$dir"
done 2>/dev/null`, s.Dir, canary)
	user := exec.Command("setpriv", "--reuid", fmt.Sprint(s.UID()), "--clear-groups", "sh", "-c", script)
	user.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	assert.NilError(t, user.Start())
	t.Cleanup(func() {
		unix.Kill(-user.Process.Pid, unix.SIGKILL)
		user.Wait()
		// What is there now is the user's own to remove.
		assert.NilError(t, exec.Command("setpriv", "--reuid", fmt.Sprint(s.UID()), "--clear-groups", "rm", "-rf", s.Dir).Run())
	})
	dockerd := filepath.Join(t.TempDir(), "dockerd")
	assert.NilError(t, os.WriteFile(dockerd, []byte("#!/bin/sh\nexit 3\n"), 0o755))
	o := stack.Options{Bin: binDir(t), Dockerd: dockerd, Log: filepath.Join(t.TempDir(), "log")}
	for range 40 {
		// Whatever comes of it: the user's own stack is what suffers.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_ = s.Up(ctx, o)
		_, _ = s.Purge(ctx, o)
		cancel()
		assert.Equal(t, seen(), before)
	}
}
