// Package stack starts and stops one real rootless stack: RootlessKit and a dockerd,
// through upstream's dockerd-rootless.sh, as an ordinary user.
//
// The stack belongs to the current user or, when that is root (dockerd-rootless.sh
// refuses root), to another one. Everything it makes, and a copy of all it runs,
// lies beneath one directory in that user's home, so that it runs from a checkout which
// the user cannot enter, and [Stack.Down] can remove it and show that nothing is left.
package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"
)

const (
	startTimeout = time.Minute     // upstream's daemon is up in 1-2 s on an idle machine
	quietFor     = 2 * time.Second // Up says nothing when it takes no longer
	pollInterval = 50 * time.Millisecond

	// DefaultNet and DefaultPortDriver are inside the rootlesskit binary: they need no package.
	DefaultNet        = "gvisor-tap-vsock"
	DefaultPortDriver = "builtin"
)

// ErrUp is what [Stack.Up] returns when the stack's daemon answers already.
var ErrUp = errors.New("the stack is up already")

// Options says what a stack is made of. Only Bin and Log are needed.
type Options struct {
	Bin         string // folder with rootlesskit, containerd, runc ... and dockerd
	Dockerd     string // the daemon; Bin/dockerd by default
	RootlessKit string // Bin/rootlesskit by default
	Log         string // file for all the stack's output, truncated first; it stays after Down

	Net           string // RootlessKit's network driver, DefaultNet by default
	PortDriver    string // RootlessKit's port driver, DefaultPortDriver by default
	NoDetachNetns bool   // dockerd's process is in the child namespace, as a whole

	// Env has more variables for the stack's processes, NAME=value. They go before the stack's own.
	Env []string

	Progress io.Writer // told what Up waits for when it takes more than 2 s; may be nil
}

// Stack is a place for a stack, whether one is up there or not.
type Stack struct {
	Dir     string // everything the stack makes lies beneath it
	account account
}

// At returns the place of the user's stack called name; "" is a name, too. Stacks with
// different names can be up at the same time.
func At(name string) (*Stack, error) { return AtUser(name, DefaultUser) }

// AtUser is [At] for root, with the user that the stack runs as. Anyone else's stacks
// are their own.
func AtUser(name, rootRunsAs string) (*Stack, error) {
	if !regexp.MustCompile(`^[a-z0-9-]*$`).MatchString(name) {
		return nil, fmt.Errorf("stack name %q: want lower case letters, digits and dashes", name)
	}
	a, err := stackAccount(rootRunsAs)
	if err != nil {
		return nil, err
	}
	dir := ".berth"
	if name != "" {
		dir += "-" + name
	}
	s := &Stack{Dir: filepath.Join(a.home, dir), account: a}
	// The longest socket path that dockerd makes, and what sun_path takes (unix(7)).
	if p := s.runtimeDir() + "/docker/containerd/containerd.sock.ttrpc"; len(p) > 107 {
		return nil, fmt.Errorf("stack directory %s: its sockets' paths would be too long (%d bytes, at most 107): use a shorter HOME or name", s.Dir, len(p))
	}
	return s, nil
}

// Host is the stack's DOCKER_HOST.
func (s *Stack) Host() string { return "unix://" + s.socket() }

// RootlessKitSocket is where the stack's RootlessKit serves its API.
func (s *Stack) RootlessKitSocket() string {
	return filepath.Join(s.runtimeDir(), "dockerd-rootless", "api.sock")
}

// User is the name of the user that the stack runs as.
func (s *Stack) User() string { return s.account.name }

func (s *Stack) binDir() string     { return filepath.Join(s.Dir, "bin") }
func (s *Stack) homeDir() string    { return filepath.Join(s.Dir, "home") }
func (s *Stack) tmpDir() string     { return filepath.Join(s.Dir, "tmp") }
func (s *Stack) runtimeDir() string { return filepath.Join(s.Dir, "run") }
func (s *Stack) socket() string     { return filepath.Join(s.runtimeDir(), "docker.sock") }

// Up starts the stack and returns when its API answers, or [ErrUp] when one is up there
// already. When the start fails, or ctx ends first, nothing of it stays but the log. The
// stack lives in the network namespace of the calling thread, and outlives this process.
func (s *Stack) Up(ctx context.Context, o Options) (retErr error) {
	o = o.withDefaults()
	err := os.Mkdir(s.Dir, 0o755)
	if err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make the stack's directory: %w", err)
	}
	made := err == nil
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if !made {
		if s.Running(ctx) {
			return ErrUp
		}
		return fmt.Errorf("%s is left from a stack that does not answer: remove it with `berth down`", s.Dir)
	}
	defer func() {
		if retErr == nil {
			return
		}
		if err := s.remove(ctx); err != nil {
			retErr = fmt.Errorf("%w; and the clean-up failed: %w", retErr, err)
		}
	}()

	if err := s.install(o); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(o.Log), 0o755); err != nil {
		return err
	}
	return s.start(ctx, o, os.O_TRUNC)
}

// Restart stops what there still is of the stack, as [Stack.Down] does, and starts it again with
// its files: images, containers, and whatever a killed process has left. o is as for the Up, and
// the log goes on. When the start fails, the files stay.
func (s *Stack) Restart(ctx context.Context, o Options) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.stop(ctx); err != nil {
		return err
	}
	// The processes that these name have ended, but where their parent was killed, too, they can be
	// zombies for a while, until init reaps them. dockerd takes a zombie for a running daemon.
	for _, file := range []string{"docker.pid", "docker/containerd/containerd.pid"} {
		if err := os.Remove(filepath.Join(s.runtimeDir(), file)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return s.start(ctx, o.withDefaults(), os.O_APPEND)
}

// start runs what install has put in its place, and returns when the API answers.
func (s *Stack) start(ctx context.Context, o Options, logFlag int) error {
	log, err := os.OpenFile(o.Log, os.O_WRONLY|os.O_CREATE|logFlag, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()

	cmd := s.command(o)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start dockerd-rootless.sh as user %s: %w", s.account.name, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	err = s.waitUntilRunning(ctx, ended, o.Progress)
	if ctx.Err() != nil {
		return fmt.Errorf("start the stack: %w", context.Cause(ctx))
	}
	if err != nil {
		return fmt.Errorf("%w; the last lines of its log, %s:\n%s", err, o.Log, tail(o.Log, 15))
	}
	return nil
}

func (o Options) withDefaults() Options {
	if o.Dockerd == "" {
		o.Dockerd = filepath.Join(o.Bin, "dockerd")
	}
	if o.RootlessKit == "" {
		o.RootlessKit = filepath.Join(o.Bin, "rootlesskit")
	}
	if o.Net == "" {
		o.Net = DefaultNet
	}
	if o.PortDriver == "" {
		o.PortDriver = DefaultPortDriver
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	return o
}

// command is upstream's script with what it needs from the environment, and nothing else from ours.
func (s *Stack) command(o Options) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.binDir(), "dockerd-rootless.sh"),
		// A systemd driver would need a login session of the user on a machine with cgroup v2.
		// In rootless mode this means: no cgroups.
		"--exec-opt", "native.cgroupdriver=cgroupfs",
	)
	// The user may not be able to enter the folder that we are in.
	cmd.Dir = s.Dir
	cmd.Env = []string{
		"HOME=" + s.homeDir(), // dockerd's data root lies beneath it
		"XDG_RUNTIME_DIR=" + s.runtimeDir(),
		"TMPDIR=" + s.tmpDir(),
		"USER=" + s.account.name,
		"PATH=" + s.binDir() + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"DOCKERD=" + filepath.Join(s.binDir(), "dockerd"),
		"DOCKERD_ROOTLESS_ROOTLESSKIT_NET=" + o.Net,
		"DOCKERD_ROOTLESS_ROOTLESSKIT_PORT_DRIVER=" + o.PortDriver,
		"DOCKERD_ROOTLESS_ROOTLESSKIT_DETACH_NETNS=" + strconv.FormatBool(!o.NoDetachNetns),
	}
	// The last one of a name holds.
	cmd.Env = append(cmd.Env, o.Env...)
	// A session of its own: a Ctrl-C at the terminal is for us, and the stack outlives us.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(s.account.uid), Gid: uint32(s.account.gid)}
	}
	return cmd
}

func (s *Stack) waitUntilRunning(ctx context.Context, ended <-chan error, progress io.Writer) error {
	start := time.Now()
	said := start
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
		if time.Since(said) > quietFor {
			said = time.Now()
			fmt.Fprintf(progress, "waiting for dockerd at %s (%v)\n", s.Host(), time.Since(start).Round(time.Second))
		}
	}
	return nil
}

// Running says whether the stack's API answers.
func (s *Stack) Running(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c, err := s.Client()
	if err != nil {
		return false
	}
	defer c.Close()
	_, err = c.Ping(ctx, client.PingOptions{})
	return err == nil
}

// Client returns a client of the stack's API.
func (s *Stack) Client() (*client.Client, error) { return client.New(client.WithHost(s.Host())) }

// Exists says whether anything is at the stack's place.
func (s *Stack) Exists() bool {
	_, err := os.Lstat(s.Dir)
	return err == nil
}

// lock keeps other Ups and Downs from the stack's directory, which must be there. The lock
// is on the directory itself, so that it goes with it.
func (s *Stack) lock() (unlock func(), _ error) {
	d, err := os.Open(s.Dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		d.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("the stack at %s is being started or stopped: wait for that and try again", s.Dir)
		}
		return nil, fmt.Errorf("lock %s: %w", s.Dir, err)
	}
	return func() { d.Close() }, nil
}

// tail returns the last n lines of the file, indented.
func tail(file string, n int) string {
	data, err := os.ReadFile(file)
	if err != nil {
		return "    " + err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	lines = lines[max(0, len(lines)-n):]
	return "    " + strings.Join(lines, "\n    ")
}
