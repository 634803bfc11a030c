package stack

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

// Process is one process of a stack. PID and Start together never come again.
type Process struct {
	PID     int    `json:"pid"`
	Program string `json:"program"` // its file's name
	Start   uint64 `json:"start"`   // field 22 of proc_pid_stat(5)
	parent  int
}

func (p Process) String() string { return fmt.Sprintf("%d (%s)", p.PID, p.Program) }

// Signal sends sig to the process, and to no other one that has got its pid since.
func (p Process) Signal(sig unix.Signal) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return ignoreGone(err)
	}
	defer unix.Close(fd)
	if now, ok := look(p.PID); !ok || now.Start != p.Start {
		return nil
	}
	return ignoreGone(unix.PidfdSendSignal(fd, sig, nil, 0))
}

func ignoreGone(err error) error {
	if err == unix.ESRCH {
		return nil
	}
	return err
}

// markVar is in the environment of every process that a stack starts: the stack's directory and its id.
const markVar = "BERTH_STACK"

func (s *Stack) mark(id string) string { return markVar + "=" + s.Dir + ":" + id }

// has tells whether an environment has the mark of the stack with that id; "" is of any that was here.
func (s *Stack) has(environ []string, id string) bool {
	return slices.ContainsFunc(environ, func(v string) bool {
		return v == s.mark(id) || id == "" && strings.HasPrefix(v, s.mark(""))
	})
}

// processes lists what this stack has started: what has its mark in the environment, the containers that its own runtime keeps
// a record of, and the descendants of both. It is not enough to have something of the stack in sight: anybody may mount its
// socket. It needs no memory of what was started but the stack's directory, so it serves any later process.
func (s *Stack) processes(id string) ([]Process, error) {
	procs, err := procfs.AllProcs()
	if err != nil {
		return nil, fmt.Errorf("list the processes: %w", err)
	}
	inits := s.containers()
	all := map[int]Process{}
	ours := map[int]bool{}
	for _, proc := range procs {
		p, ok := look(proc.PID)
		if !ok {
			continue
		}
		all[p.PID] = p
		ours[p.PID] = inits[p.PID] == p.Start || s.started(p, id)
	}
	var list []Process
	for pid, p := range all {
		for at := p; ; {
			if ours[at.PID] {
				list = append(list, all[pid])
				break
			}
			// A parent is older. One that is not has got the pid of the parent, which has ended while we read.
			up, ok := all[at.parent]
			if !ok || up.Start > at.Start || up.PID == at.PID {
				break
			}
			at = up
		}
	}
	slices.SortFunc(list, func(a, b Process) int { return a.PID - b.PID })
	return list, nil
}

// started tells whether the process has the mark in its environment. Other users' cannot be read; they are not ours.
func (s *Stack) started(p Process, id string) bool {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	proc, err := procfs.NewProc(p.PID)
	if err != nil {
		return false
	}
	environ, err := proc.Environ()
	if err != nil || !s.has(environ, id) {
		return false
	}
	// The process of the descriptor still has the pid: so what was read is its own.
	now, ok := look(p.PID)
	return ok && now.Start == p.Start && unix.PidfdSendSignal(fd, 0, nil, 0) != unix.ESRCH
}

// look returns false for a process that has ended, or is a zombie.
func look(pid int) (Process, bool) {
	proc, err := procfs.NewProc(pid)
	if err != nil {
		return Process{}, false
	}
	stat, err := proc.Stat()
	if err != nil || stat.State == "Z" || stat.State == "X" {
		return Process{}, false
	}
	program := stat.Comm
	if exe, err := proc.Executable(); err == nil && exe != "" { // none for a kernel thread, and for another user's process
		program = filepath.Base(strings.TrimSuffix(exe, " (deleted)"))
	}
	return Process{PID: pid, Program: program, Start: stat.Starttime, parent: stat.PPID}, true
}

// oldest is the process of that program that has begun first: of RootlessKit's two, the parent.
func oldest(processes []Process, program string) (first Process, ok bool) {
	for _, p := range processes { // by pid
		if p.Program == program && (!ok || p.Start < first.Start) {
			first, ok = p, true
		}
	}
	return first, ok
}

// containers has when the first process of each container was started, by its pid, as runc has it written below the stack's own
// XDG_RUNTIME_DIR. A container has its own environment, and once everything above it was killed nothing else tells whose it is.
func (s *Stack) containers() map[int]uint64 {
	inits := map[int]uint64{}
	root := filepath.Join(s.runtimeDir(), "docker", "runtime-runc")
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "state.json" || !d.Type().IsRegular() {
			return nil // it comes and goes with the containers
		}
		var state struct {
			PID   int    `json:"init_process_pid"`
			Start uint64 `json:"init_process_start"`
		}
		if data, err := os.ReadFile(path); err == nil && json.Unmarshal(data, &state) == nil && state.PID > 1 {
			inits[state.PID] = state.Start
		}
		return nil
	})
	return inits
}
