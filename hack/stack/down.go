package stack

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// dockerd gives its containers 10 s to end, and itself 15 s.
	stopTimeout = 30 * time.Second
	killTimeout = 10 * time.Second
)

// Down stops the stack, removes all it made, and returns an error that names what is left
// if that is anything: a process, a mount, a socket, a file. A stack that is not up, or
// only half, is no error. When ctx ends the stack is killed instead of waited for.
func (s *Stack) Down(ctx context.Context) error {
	if !s.Exists() {
		return s.left()
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	return s.remove(ctx)
}

// remove is Down without the lock.
func (s *Stack) remove(ctx context.Context) error {
	if err := s.stop(ctx); err != nil {
		return err // never remove files through a mount
	}
	err := s.removeFiles()
	return errors.Join(err, s.left())
}

// stop ends the stack's processes and mounts. Its files stay.
func (s *Stack) stop(ctx context.Context) error {
	processes, err := s.processes()
	if err != nil {
		return err
	}
	// RootlessKit and containerd end by themselves after dockerd. Without a dockerd there is
	// nothing to wait for.
	asked := false
	for _, p := range processes {
		if p.exe == filepath.Join(s.binDir(), "dockerd") {
			asked = true
			if err := p.signal(unix.SIGTERM); err != nil {
				return fmt.Errorf("stop process %v: %w", p, err)
			}
		}
	}
	if asked {
		if err := s.waitUntilGone(ctx, stopTimeout, 0); err != nil {
			return err
		}
	}
	if err := s.waitUntilGone(context.WithoutCancel(ctx), killTimeout, unix.SIGKILL); err != nil {
		return err
	}
	if err := s.waitUntilClosed(); err != nil {
		return err
	}

	// The stack's mounts were in its own namespace and went with it; this is for those that
	// someone else made.
	var errs []error
	for _, m := range slices.Backward(s.mounts()) {
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m, err))
		}
	}
	return errors.Join(errs...)
}

// waitUntilGone returns when the stack has no process left, or after the timeout; it sends
// sig, if not 0, to each one it sees.
func (s *Stack) waitUntilGone(ctx context.Context, timeout time.Duration, sig unix.Signal) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		processes, err := s.processes()
		if err != nil || len(processes) == 0 {
			return err
		}
		if sig != 0 {
			for _, p := range processes {
				if err := p.signal(sig); err != nil {
					return fmt.Errorf("kill process %v: %w", p, err)
				}
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (s *Stack) removeFiles() error {
	if os.Geteuid() != 0 {
		if err := s.removeOwnedBySubIDs(); err != nil {
			return err
		}
	}
	return os.RemoveAll(s.Dir)
}

// removeOwnedBySubIDs removes all but the bin folder. Files of containers belong to
// sub-ids, and overlayfs makes folders that nobody may enter: only a user namespace may
// remove those.
func (s *Stack) removeOwnedBySubIDs() error {
	dirs := []string{s.homeDir(), s.tmpDir(), s.runtimeDir()}
	var errs []error
	for _, d := range dirs {
		errs = append(errs, os.RemoveAll(d))
	}
	if errors.Join(errs...) == nil {
		return nil
	}
	cmd := exec.Command(filepath.Join(s.binDir(), "docker-rootlesskit"), append([]string{"rm", "-rf"}, dirs...)...)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("remove the files in %s: %w: %s", s.Dir, err, out)
	}
	return nil
}

// left returns an error that names what there still is of the stack.
func (s *Stack) left() error {
	var left []string
	processes, err := s.processes()
	if err != nil {
		return err
	}
	for _, p := range processes {
		left = append(left, "process "+p.String())
	}
	for _, m := range s.mounts() {
		left = append(left, "mount "+m)
	}
	sockets, err := s.sockets()
	if err != nil {
		return err
	}
	for _, socket := range sockets {
		left = append(left, "socket "+socket)
	}
	if s.Exists() {
		left = append(left, "directory "+s.Dir)
	}
	if left != nil {
		return fmt.Errorf("left of the stack: %s", strings.Join(left, ", "))
	}
	return nil
}

// waitUntilClosed returns when the stack's sockets are closed, or after killTimeout: a process
// seems to have ended when its first thread has, and its last one closes its files.
func (s *Stack) waitUntilClosed() error {
	for deadline := time.Now().Add(killTimeout); ; time.Sleep(pollInterval) {
		sockets, err := s.sockets()
		if err != nil || len(sockets) == 0 || time.Now().After(deadline) {
			return err
		}
	}
}

// sockets lists the sockets in the stack's directory, in our network namespace.
func (s *Stack) sockets() ([]string, error) {
	data, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return nil, err
	}
	var sockets []string
	for line := range strings.Lines(string(data)) {
		if i := strings.Index(line, s.Dir+"/"); i >= 0 {
			sockets = append(sockets, strings.TrimSpace(line[i:]))
		}
	}
	return sockets, nil
}

// mounts lists the mounts in the stack's directory, in our namespace, in the order they were made.
func (s *Stack) mounts() []string {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var mounts []string
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], s.Dir+"/") {
			mounts = append(mounts, f[4])
		}
	}
	return mounts
}
