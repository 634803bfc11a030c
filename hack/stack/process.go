package stack

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// process is one process of the stack. pid and start together never come again.
type process struct {
	pid, ppid int
	start     string // field 22 of proc_pid_stat(5)
	exe       string
}

func (p process) String() string { return fmt.Sprintf("%d (%s)", p.pid, filepath.Base(p.exe)) }

// PID returns the process that runs that program of the stack: dockerd, or docker-rootlesskit. Of
// RootlessKit's two processes it is the parent, the one on the host.
func (s *Stack) PID(program string) (int, error) {
	p, err := s.process(program)
	return p.pid, err
}

// Kill ends the process that [Stack.PID] is about, and does not let it clean up.
func (s *Stack) Kill(program string) error {
	p, err := s.process(program)
	if err != nil {
		return err
	}
	return p.signal(unix.SIGKILL)
}

func (s *Stack) process(program string) (process, error) {
	processes, err := s.processes()
	if err != nil {
		return process{}, err
	}
	byPID := map[int]process{}
	for _, p := range processes {
		byPID[p.pid] = p
	}
	exe := filepath.Join(s.binDir(), program)
	for _, p := range processes {
		if p.exe == exe && byPID[p.ppid].exe != exe {
			return p, nil
		}
	}
	return process{}, fmt.Errorf("the stack at %s runs no %s", s.Dir, program)
}

// processes lists the stack's processes: those whose program lies in the stack's bin
// folder, those in a mount namespace that has mounts in the stack's directory (containers,
// also when everything above them has been killed), and the descendants of both
// (slirp4netns). It needs no memory of what was started, so it serves any later process.
func (s *Stack) processes() ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	all := map[int]process{}
	ours := map[int]bool{}
	ourMounts := map[string]bool{} // by mount namespace
	if ns, err := os.Readlink("/proc/self/ns/mnt"); err == nil {
		ourMounts[ns] = false // whatever the machine itself mounts there
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, ok := readProcess(pid)
		if !ok {
			continue
		}
		all[pid] = p
		if filepath.Dir(p.exe) == s.binDir() {
			ours[pid] = true
			continue
		}
		// Other users' namespaces cannot be read; they are not ours.
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
		if err != nil {
			continue
		}
		if _, known := ourMounts[ns]; !known {
			mounts, _ := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
			ourMounts[ns] = bytes.Contains(mounts, []byte(s.Dir+"/"))
		}
		if ourMounts[ns] {
			ours[pid] = true
		}
	}
	var list []process
	for pid, p := range all {
		// A loop is not possible, but a parent may have ended, and its pid come again, while we read.
		for up, depth := pid, 0; up > 1 && depth < len(all); up, depth = all[up].ppid, depth+1 {
			if ours[up] {
				list = append(list, p)
				break
			}
		}
	}
	return list, nil
}

// PIDs returns the processes that run the stack's program of that name, such as dockerd.
func (s *Stack) PIDs(program string) ([]int, error) {
	processes, err := s.processes()
	var pids []int
	for _, p := range processes {
		if p.exe == filepath.Join(s.binDir(), program) {
			pids = append(pids, p.pid)
		}
	}
	return pids, err
}

// readProcess returns false for a process that has ended or is a zombie.
func readProcess(pid int) (process, bool) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, false
	}
	// The command, field 2, may contain spaces and parentheses.
	_, rest, ok := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return process{}, false
	}
	ppid, err := strconv.Atoi(fields[1])
	if err != nil {
		return process{}, false
	}
	// Empty for a kernel thread, and for another user's process.
	exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return process{pid: pid, ppid: ppid, start: fields[19], exe: strings.TrimSuffix(exe, " (deleted)")}, true
}

// signal sends sig to the process, and to no other one that has got its pid since.
func (p process) signal(sig unix.Signal) error {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil {
		return ignoreGone(err)
	}
	defer unix.Close(fd)
	if now, ok := readProcess(p.pid); !ok || now.start != p.start {
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
