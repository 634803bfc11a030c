package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"berth/hack/progress"
)

const (
	startTimeout = 3 * time.Minute // upstream's daemon is up in 1-2 s on an idle machine, and in a minute on an emulated one
	pollInterval = 50 * time.Millisecond
	// dockerd gives its containers 10 s to end, and itself 15 s.
	stopTimeout = 30 * time.Second
	killTimeout = 10 * time.Second
)

// do is the operation itself, done by the stack's user.
func (s *Stack) do(ctx context.Context, c call, log *os.File, tell io.Writer) (answer, error) {
	if _, err := os.Stat(s.account.Home); err != nil {
		return answer{}, fmt.Errorf("the home of user %s: %w", s.User(), err)
	}
	c.Options.Progress = tell
	switch c.Op {
	case opStatus:
		status, err := s.status(ctx)
		return answer{Status: status}, err
	case opCheck:
		_, err := s.check(ctx, c.For, c.Options)
		return answer{}, err
	case opUp, opRestart:
		return answer{}, s.up(ctx, c.Op, c.Options, log)
	}

	if !s.Exists() {
		return answer{}, s.stop(ctx, "", tell) // somebody may have removed it under a running stack
	}
	unlock, err := lock(s.Dir)
	if err != nil {
		return answer{}, err
	}
	defer unlock()
	st, err := s.check(ctx, c.Op, c.Options)
	if err != nil || st == nil {
		return answer{}, err
	}
	if err := s.stop(ctx, st.ID, tell); err != nil {
		return answer{}, err
	}
	if c.Op == opDown {
		return answer{}, nil
	}
	removed, err := s.remove(st.ID, tell)
	return answer{Removed: removed}, err
}

// check tells why the operation may not be done with what is at the stack's place, and returns that.
func (s *Stack) check(ctx context.Context, op operation, o Options) (*state, error) {
	st, err := s.load()
	if err != nil || st == nil {
		return nil, err
	}
	if whose := st.Options.Checkout; whose != o.Checkout && whose != "" {
		if _, err := os.Stat(whose); !errors.Is(err, os.ErrNotExist) { // one may be where this user cannot look
			return nil, fmt.Errorf("the stack at %s is that of another checkout, %s: use %s, or another --name", s.Dir, whose, filepath.Join(whose, "build/bin/berth"))
		}
	}
	if op == opUp && s.Running(ctx) {
		return nil, ErrUp
	}
	return st, nil
}

// up starts the stack, on what an earlier one has left. What fails is stopped, and removed if it is new.
func (s *Stack) up(ctx context.Context, op operation, o Options, log *os.File) (retErr error) {
	isNew := !s.Exists()
	unlock, err := lock(s.Dir)
	if err != nil {
		return err
	}
	defer unlock()
	st := &state{ID: newID(), Options: o}
	if isNew {
		if err := s.stop(ctx, "", o.Progress); err != nil {
			return err
		}
		if err := s.save(st); err != nil {
			return errors.Join(err, os.RemoveAll(s.Dir)) // nobody would know whose it is
		}
	} else {
		have, err := s.check(ctx, op, o)
		if err != nil {
			return err
		}
		st.ID = have.ID
		if err := s.stop(ctx, st.ID, o.Progress); err != nil { // all of it, or what a crash has left
			return err
		}
		// The processes that these name have ended. Where their parent was killed, too, they can be zombies for a while, until
		// init reaps them, and dockerd takes a zombie for a running daemon.
		for _, file := range []string{"docker.pid", "docker/containerd/containerd.pid"} {
			if err := os.Remove(filepath.Join(s.runtimeDir(), file)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	defer func() {
		if retErr == nil {
			return
		}
		ctx := context.WithoutCancel(ctx)
		err := s.stop(ctx, st.ID, o.Progress)
		if err == nil && isNew {
			_, err = s.remove(st.ID, o.Progress)
		}
		if err != nil {
			retErr = fmt.Errorf("%w; and the clean-up failed: %w", retErr, err)
		}
	}()

	if isNew {
		if err := log.Truncate(0); err != nil && !errors.Is(err, unix.EINVAL) { // /dev/null, say
			return err
		}
	}
	for _, d := range []string{s.homeDir(), s.tmpDir(), s.runtimeDir()} {
		if err := os.Mkdir(d, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if s.bin == filepath.Join(s.Dir, "bin") { // else root has done it
		if err := s.install(ctx, o); err != nil {
			return err
		}
	}
	if st.Dockerd, err = Sum(filepath.Join(s.bin, "dockerd")); err != nil {
		return err
	}
	if err := s.save(st); err != nil {
		return err
	}
	return s.run(ctx, st, log)
}

// run starts what install has put in its place, and returns when the API answers.
func (s *Stack) run(ctx context.Context, st *state, log *os.File) error {
	cmd := s.command(st)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start dockerd-rootless.sh as user %s: %w", s.User(), err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	err := s.waitUntilRunning(ctx, ended, st.Options.Progress)
	if ctx.Err() != nil {
		return fmt.Errorf("start the stack: %w", context.Cause(ctx))
	}
	return err
}

// command is upstream's script with what it needs from the environment, and nothing else from ours.
func (s *Stack) command(st *state) *exec.Cmd {
	o := st.Options
	cmd := exec.Command(filepath.Join(s.bin, "dockerd-rootless.sh"))
	cmd.Dir = s.Dir
	cmd.Env = append([]string{
		s.mark(st.ID),
		"HOME=" + s.homeDir(), // dockerd's data root lies beneath it
		"XDG_RUNTIME_DIR=" + s.runtimeDir(),
		"TMPDIR=" + s.tmpDir(),
		"USER=" + s.User(),
		"PATH=" + s.bin + ":" + systemPath,
		"DOCKERD=" + filepath.Join(s.bin, "dockerd"),
		"DOCKERD_ROOTLESS_ROOTLESSKIT_NET=" + o.Net,
		"DOCKERD_ROOTLESS_ROOTLESSKIT_PORT_DRIVER=" + o.PortDriver,
		"DOCKERD_ROOTLESS_ROOTLESSKIT_DETACH_NETNS=" + strconv.FormatBool(!o.NoDetachNetns),
	}, o.Env...) // the last one of a name holds
	if bus, _ := s.cgroups("/"); bus != "" {
		cmd.Env = append(cmd.Env, "DBUS_SESSION_BUS_ADDRESS=unix:path="+bus)
	} else {
		// dockerd would ask for a systemd that is not there. In rootless mode this means: no cgroups.
		cmd.Args = append(cmd.Args, "--exec-opt", "native.cgroupdriver=cgroupfs")
	}
	cmd.Args = append(cmd.Args, o.Args...)
	// A session of its own: a Ctrl-C at the terminal is for us, and the stack outlives us.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd
}

// cgroups returns the bus of the user's systemd, if containers can be limited through it, and what is to be said of limits.
// It is as dockerd-rootless-setuptool.sh has it: cgroup v2, and a systemd that delegates to its users. root is /.
func (s *Stack) cgroups(root string) (bus, note string) {
	const useless = "none: %s, so that docker run's --memory and --cpus do nothing"
	fs := filepath.Join(root, "sys/fs/cgroup")
	if _, err := os.Stat(filepath.Join(fs, "cgroup.controllers")); err != nil {
		return "", fmt.Sprintf(useless, "this machine has no cgroup v2")
	}
	bus = filepath.Join(root, fmt.Sprintf("run/user/%d/bus", s.UID()))
	if _, err := os.Stat(bus); err != nil {
		return "", fmt.Sprintf(useless, fmt.Sprintf("no systemd runs for user %s (loginctl enable-linger %[1]s starts one)", s.User()))
	}
	have, missing := Delegated(root, s.UID())
	if len(have) == 0 {
		return "", fmt.Sprintf(useless, fmt.Sprintf("systemd delegates nothing to user %s", s.User()))
	}
	note = "systemd's, with " + strings.Join(have, " ")
	if len(missing) > 0 {
		note += fmt.Sprintf("; without %s, so that docker run's limits that need it do nothing", strings.Join(missing, " and "))
	}
	return bus, note
}

// Delegated returns the cgroup v2 controllers that systemd lets a user have, and those that docker run's limits need and it
// does not: cpu for --cpus, memory for --memory, pids for --pids-limit. root is /.
func Delegated(root string, uid int) (have, missing []string) {
	file := fmt.Sprintf("sys/fs/cgroup/user.slice/user-%d.slice/user@%[1]d.service/cgroup.controllers", uid)
	text, _ := os.ReadFile(filepath.Join(root, file)) // There is none where no systemd runs for the user.
	have = strings.Fields(string(text))
	for _, needed := range []string{"cpu", "memory", "pids"} {
		if !slices.Contains(have, needed) {
			missing = append(missing, needed)
		}
	}
	return have, missing
}

func (s *Stack) waitUntilRunning(ctx context.Context, ended <-chan error, tell io.Writer) error {
	defer progress.Start(tell, "waiting for dockerd at "+s.Host())()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for !s.Running(ctx) {
		select {
		case err := <-ended:
			return fmt.Errorf("the stack ended while it started: %w", err)
		case <-ctx.Done():
			return fmt.Errorf("the stack did not answer within %v", startTimeout)
		case <-tick.C:
		}
	}
	return nil
}

// stop ends the stack's processes. Its files stay.
func (s *Stack) stop(ctx context.Context, id string, tell io.Writer) error {
	defer progress.Start(tell, "waiting for the containers and dockerd to end")()
	processes, err := s.processes(id)
	if err != nil {
		return err
	}
	// RootlessKit and containerd end by themselves after dockerd. Without a dockerd there is
	// nothing to wait for.
	asked := false
	for _, p := range processes {
		if p.Program == "dockerd" {
			asked = true
			if err := p.Signal(unix.SIGTERM); err != nil {
				return fmt.Errorf("stop process %v: %w", p, err)
			}
		}
	}
	if asked {
		if err := s.waitUntilGone(ctx, id, stopTimeout, 0); err != nil {
			return err
		}
	}
	if err := s.waitUntilGone(context.WithoutCancel(ctx), id, killTimeout, unix.SIGKILL); err != nil {
		return err
	}
	if processes, err = s.processes(id); err != nil {
		return err
	}
	if len(processes) > 0 {
		return fmt.Errorf("these processes of the stack do not end: %v", processes)
	}
	return s.waitUntilClosed()
}

// waitUntilGone returns when the stack has no process left, or after the timeout; it sends
// sig, if not 0, to each one it sees.
func (s *Stack) waitUntilGone(ctx context.Context, id string, timeout time.Duration, sig unix.Signal) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		processes, err := s.processes(id)
		if err != nil || len(processes) == 0 {
			return err
		}
		if sig != 0 {
			for _, p := range processes {
				if err := p.Signal(sig); err != nil {
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

// remove removes the files of a stack that has been stopped, and returns what it removed.
func (s *Stack) remove(id string, tell io.Writer) ([]string, error) {
	mounts, err := s.mounts()
	if err != nil {
		return nil, err
	}
	if len(mounts) > 0 { // the stack's own were in its own namespace, and went with it
		return nil, fmt.Errorf("somebody has mounted something in the stack's directory, and nothing is removed before that is unmounted: %s", strings.Join(mounts, ", "))
	}
	defer progress.Start(tell, "removing "+s.Dir)()
	if err := s.removeOwnedBySubIDs(); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(s.Dir); err != nil {
		return nil, err
	}
	return []string{s.Dir}, s.left(id)
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
	cmd := exec.Command(filepath.Join(s.bin, "docker-rootlesskit"), append([]string{"rm", "-rf"}, dirs...)...)
	cmd.Dir = s.Dir
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("remove the files in %s: %w: %s", s.Dir, err, out)
	}
	return nil
}

// left returns an error that names what there still is of the stack.
func (s *Stack) left(id string) error {
	var left []string
	processes, err := s.processes(id)
	if err != nil {
		return err
	}
	for _, p := range processes {
		left = append(left, "process "+p.String())
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

// mounts lists the mounts in the stack's directory, in our namespace.
func (s *Stack) mounts() ([]string, error) {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(s.Dir))
	var mounts []string
	for _, m := range infos {
		if m.Mountpoint != s.Dir { // a home of its own file system is the user's business
			mounts = append(mounts, m.Mountpoint)
		}
	}
	return mounts, err
}
