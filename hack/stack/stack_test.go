package stack

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

func TestPlaceMakesAProgramReadableForEveryone(t *testing.T) {
	for _, mode := range []os.FileMode{0o700, 0o755, 0o751} {
		dir := t.TempDir()
		from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
		assert.NilError(t, os.WriteFile(from, []byte("program"), mode))
		assert.NilError(t, os.Chmod(from, mode))
		assert.NilError(t, place(from, to))
		info, err := os.Stat(to)
		assert.NilError(t, err)
		assert.Equal(t, info.Mode().Perm(), os.FileMode(0o755))
		data, err := os.ReadFile(to)
		assert.NilError(t, err)
		assert.Equal(t, string(data), "program")
		info, err = os.Stat(from)
		assert.NilError(t, err)
		assert.Equal(t, info.Mode().Perm(), mode, "the original has changed")
	}
}

func TestPlaceRefusesWhatCannotRun(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	assert.NilError(t, os.WriteFile(file, nil, 0o644))
	assert.ErrorContains(t, place(file, filepath.Join(dir, "to")), "is not a program")
	assert.ErrorContains(t, place(dir, filepath.Join(dir, "to")), "is not a program")
	assert.ErrorIs(t, place(filepath.Join(dir, "none"), filepath.Join(dir, "to")), os.ErrNotExist)
}

// A process is the stack's by its mark, which it hands down, and by nothing else.
func TestProcessesAreThoseWithTheMark(t *testing.T) {
	s := &Stack{Dir: t.TempDir()}
	start := func(mark string) *exec.Cmd {
		t.Helper()
		cmd := exec.Command("sh", "-c", "env -i sleep 1000 & echo started; wait", s.Dir)
		cmd.Env = append(os.Environ(), mark)
		cmd.Dir = s.Dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		out, err := cmd.StdoutPipe()
		assert.NilError(t, err)
		assert.NilError(t, cmd.Start())
		_, err = out.Read(make([]byte, 8))
		assert.NilError(t, err)
		t.Cleanup(func() {
			assert.NilError(t, unix.Kill(-cmd.Process.Pid, unix.SIGKILL))
			cmd.Wait()
		})
		return cmd
	}
	ours := start(s.mark("1"))
	for _, mark := range []string{s.mark("2"), s.mark("11"), "X" + s.mark("1"), "X=" + s.Dir} {
		start(mark)
	}

	processes, err := s.processes("1")
	assert.NilError(t, err)
	assert.Equal(t, len(processes), 2, "%v", processes) // the one that it started has an environment of its own
	for _, p := range processes {
		assert.Assert(t, p.PID == ours.Process.Pid || p.parent == ours.Process.Pid, "%v", p)
		stale := p
		stale.Start--
		assert.NilError(t, stale.Signal(unix.SIGKILL))
	}
	assert.NilError(t, ours.Process.Signal(unix.Signal(0)))

	assert.NilError(t, s.waitUntilGone(t.Context(), "1", killTimeout, unix.SIGKILL))
	assert.ErrorContains(t, ours.Wait(), "killed")
	processes, err = s.processes("1")
	assert.NilError(t, err)
	assert.Equal(t, len(processes), 0, "%v", processes)
	assert.NilError(t, Process{PID: ours.Process.Pid}.Signal(unix.SIGKILL))
}

// What a container runs has an environment of its own. It is known by runc's record, as long as that is about this very process.
func TestContainersAreThoseOfTheRuntimesRecord(t *testing.T) {
	s := &Stack{Dir: t.TempDir()}
	cmd := exec.Command("sleep", "1000")
	assert.NilError(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	p, ok := look(cmd.Process.Pid)
	assert.Assert(t, ok)
	dir := filepath.Join(s.runtimeDir(), "docker/runtime-runc/moby/0123")
	assert.NilError(t, os.MkdirAll(dir, 0o700))
	for start, want := range map[uint64]int{p.Start: 1, p.Start - 1: 0} {
		record := fmt.Sprintf(`{"id":"0123","init_process_pid":%d,"init_process_start":%d}`, p.PID, start)
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "state.json"), []byte(record), 0o600))
		processes, err := s.processes("1")
		assert.NilError(t, err)
		assert.Equal(t, len(processes), want, "%v", processes)
	}
}

func TestLeftNamesWhatIsLeft(t *testing.T) {
	s := &Stack{Dir: t.TempDir()}
	assert.ErrorContains(t, s.left("1"), "left of the stack: directory "+s.Dir)
	removed, err := s.remove("1", t.Output())
	assert.NilError(t, err)
	assert.DeepEqual(t, removed, []string{s.Dir})
}

// A directory of that name that is not ours is nobody's to remove.
func TestPurgeRemovesNoStrangersDirectory(t *testing.T) {
	s := &Stack{Dir: t.TempDir(), account: account{Home: t.TempDir()}}
	_, err := s.do(t.Context(), call{Op: opPurge}, nil, t.Output())
	assert.ErrorContains(t, err, "is no stack's")
	assert.Assert(t, s.Exists())
}

func TestAnotherCheckoutsStackIsLeftAlone(t *testing.T) {
	theirs := t.TempDir()
	s := &Stack{Dir: t.TempDir(), account: account{Home: t.TempDir()}}
	assert.NilError(t, s.save(&state{ID: "1", Options: Options{Checkout: theirs}}))
	for _, op := range []operation{opUp, opRestart, opDown, opPurge} {
		_, err := s.do(t.Context(), call{Op: op, Options: Options{Checkout: "/ours"}}, nil, t.Output())
		assert.ErrorContains(t, err, "that of another checkout, "+theirs)
	}
	assert.NilError(t, os.Remove(theirs))
	_, err := s.do(t.Context(), call{Op: opPurge, Options: Options{Checkout: "/ours"}}, nil, t.Output())
	assert.NilError(t, err)
	assert.Assert(t, !s.Exists())
}

func TestHomeThatIsGoneIsNamed(t *testing.T) {
	s := &Stack{Dir: "/nowhere/.berth", account: account{Name: "alice", Home: "/nowhere"}}
	_, err := s.do(t.Context(), call{Op: opUp}, nil, t.Output())
	assert.ErrorContains(t, err, "the home of user alice: stat /nowhere: no such file or directory")
}

func TestCgroups(t *testing.T) {
	s := &Stack{account: account{Name: "alice", UID: 1000}}
	root := t.TempDir()
	write := func(file, text string) {
		t.Helper()
		file = filepath.Join(root, file)
		assert.NilError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		assert.NilError(t, os.WriteFile(file, []byte(text), 0o644))
	}
	says := func(want string) {
		t.Helper()
		bus, note := s.cgroups(root)
		assert.Equal(t, bus, "")
		assert.Equal(t, note, "none: "+want+", so that docker run's --memory and --cpus do nothing")
	}
	says("this machine has no cgroup v2")
	write("sys/fs/cgroup/cgroup.controllers", "cpu memory\n")
	says("no systemd runs for user alice (loginctl enable-linger alice starts one)")
	write("run/user/1000/bus", "")
	says("systemd delegates nothing to user alice")
	const delegated = "sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/cgroup.controllers"
	write(delegated, "\n")
	says("systemd delegates nothing to user alice")
	for controllers, want := range map[string]string{
		"cpu memory pids": "systemd's, with cpu memory pids",
		"pids":            "systemd's, with pids; without cpu and memory, so that docker run's limits that need it do nothing",
	} {
		write(delegated, controllers+"\n")
		bus, note := s.cgroups(root)
		assert.Equal(t, bus, filepath.Join(root, "run/user/1000/bus"))
		assert.Equal(t, note, want)
	}
}

func TestLockIsForOne(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "stack")
	unlock, err := lock(dir)
	assert.NilError(t, err)
	_, err = lock(dir)
	assert.ErrorContains(t, err, "is being started or stopped")
	unlock()
	unlock, err = lock(dir)
	assert.NilError(t, err)
	unlock()
	target := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	assert.NilError(t, os.Symlink(target, link))
	_, err = lock(link)
	assert.Assert(t, err != nil, "a link is followed")
}

func TestTail(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	for _, tt := range []struct{ log, want string }{
		{"", ""},
		{"a\nb\n", "    a\n    b"},
		{"a\nb\nc\nd", "    b\n    c\n    d"},
	} {
		assert.NilError(t, os.WriteFile(file, []byte(tt.log), 0o600))
		assert.Equal(t, tail(file, 3), tt.want)
	}
	assert.Assert(t, strings.Contains(tail(file+"x", 3), "no such file"))
}
