package stack

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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

func TestProcessesAreThoseOfTheStacksPrograms(t *testing.T) {
	s := &Stack{Dir: t.TempDir()}
	assert.NilError(t, os.Mkdir(s.binDir(), 0o755))
	shell, err := exec.LookPath("sh")
	assert.NilError(t, err)
	// A copy: a link would be another name of a program that runs elsewhere, too.
	data, err := os.ReadFile(shell)
	assert.NilError(t, err)
	ours := filepath.Join(s.binDir(), "sh (1) \n")
	assert.NilError(t, os.WriteFile(ours, data, 0o755))

	// The stack's shell starts a program that is not the stack's.
	cmd := exec.Command(ours, "-c", "sleep 1000 & echo started; wait")
	out, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	assert.NilError(t, cmd.Start())
	_, err = out.Read(make([]byte, 8))
	assert.NilError(t, err)

	processes, err := s.processes()
	assert.NilError(t, err)
	assert.Equal(t, len(processes), 2, "%v", processes)
	for _, p := range processes {
		assert.Assert(t, p.pid == cmd.Process.Pid || p.ppid == cmd.Process.Pid, "%v", p)
		stale := p
		stale.start = "0"
		assert.NilError(t, stale.signal(unix.SIGKILL))
	}
	assert.NilError(t, cmd.Process.Signal(unix.Signal(0)))

	assert.NilError(t, s.waitUntilGone(t.Context(), killTimeout, unix.SIGKILL))
	assert.ErrorContains(t, cmd.Wait(), "killed")
	processes, err = s.processes()
	assert.NilError(t, err)
	assert.Equal(t, len(processes), 0, "%v", processes)
	assert.NilError(t, (process{pid: cmd.Process.Pid}).signal(unix.SIGKILL))
}

func TestLeftNamesWhatIsLeft(t *testing.T) {
	s := &Stack{Dir: t.TempDir()}
	assert.ErrorContains(t, s.left(), "left of the stack: directory "+s.Dir)
	assert.NilError(t, s.removeFiles())
	assert.NilError(t, s.left())
}

func TestTail(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	for _, tt := range []struct{ log, want string }{
		{"", "    "},
		{"a\nb\n", "    a\n    b"},
		{"a\nb\nc\nd", "    b\n    c\n    d"},
	} {
		assert.NilError(t, os.WriteFile(file, []byte(tt.log), 0o600))
		assert.Equal(t, tail(file, 3), tt.want)
	}
	assert.Assert(t, strings.Contains(tail(file+"x", 3), "no such file"))
}
