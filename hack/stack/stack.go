// Package stack runs one real rootless stack: RootlessKit and a dockerd, through upstream's dockerd-rootless.sh, as an
// ordinary user.
//
// The stack belongs to the current user or, when that is root (dockerd-rootless.sh refuses root), to another one. Everything
// it makes, and a copy of all it runs, lies beneath one directory in that user's home, so that it runs from a checkout which
// the user cannot enter, and [Stack.Purge] can remove it and show that nothing is left. What root runs for another user lies
// where root alone can write; everything in the user's home is done by a process of that user.
package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/moby/moby/client"
	"golang.org/x/sys/unix"

	"berth/hack/progress"
)

const (
	// DefaultNet and DefaultPortDriver are inside the rootlesskit binary: they need no package.
	DefaultNet        = "gvisor-tap-vsock"
	DefaultPortDriver = "builtin"

	// forRoot has the programs of the stacks that root runs, by user and directory.
	forRoot = "/var/lib/berth"
)

// ErrUp is what [Stack.Up] returns when the stack's daemon answers already.
var ErrUp = errors.New("the stack is up already")

// Options says what a stack is made of. Only Bin and Log are needed.
type Options struct {
	Checkout    string `json:"checkout"`    // whose stack it is: nobody else's Up, Down or Purge touches it, until it is gone
	Bin         string `json:"bin"`         // folder with rootlesskit, containerd, runc ... and dockerd
	Dockerd     string `json:"dockerd"`     // the daemon; Bin/dockerd by default
	RootlessKit string `json:"rootlesskit"` // Bin/rootlesskit by default
	Log         string `json:"log"`         // file for all the stack's output; it stays after Purge, and a new stack begins it anew

	Net           string `json:"net"`             // RootlessKit's network driver, DefaultNet by default
	PortDriver    string `json:"port_driver"`     // RootlessKit's port driver, DefaultPortDriver by default
	NoDetachNetns bool   `json:"no_detach_netns"` // dockerd's process is in the child namespace, as a whole

	Args []string `json:"args,omitempty"` // more arguments for dockerd
	// Env has more variables for the stack's processes, NAME=value. They go before the stack's own.
	Env []string `json:"env,omitempty"`

	Progress io.Writer `json:"-"` // told what takes more than 2 s; may be nil
}

// Stack is a place for a stack, whether one is up there or not.
type Stack struct {
	Dir     string // everything the stack makes lies beneath it
	bin     string // what it runs
	account account
}

// At returns the place of the user's stack called name; "" is a name, too. Stacks with
// different names can be up at the same time.
func At(name string) (*Stack, error) { return AtUser(name, DefaultUser) }

// AtUser is [At] for root, with the user that the stack runs as. Anyone else's stacks
// are their own.
func AtUser(name, rootRunsAs string) (*Stack, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	a, err := stackAccount(rootRunsAs)
	if err != nil {
		return nil, err
	}
	dir := ".berth"
	if name != "" {
		dir += "-" + name
	}
	s := &Stack{Dir: filepath.Join(a.Home, dir), account: a}
	s.bin = filepath.Join(s.Dir, "bin")
	if os.Getuid() == 0 {
		s.bin = filepath.Join(forRoot, a.Name, dir)
	}
	// The longest socket path that dockerd makes, and what sun_path takes (unix(7)).
	if p := s.runtimeDir() + "/docker/containerd/containerd.sock.ttrpc"; len(p) > 107 {
		return nil, fmt.Errorf("stack directory %s: its sockets' paths would be too long (%d bytes, at most 107): use a shorter HOME or name", s.Dir, len(p))
	}
	return s, nil
}

var names = regexp.MustCompile(`^[a-z0-9-]*$`)

// CheckName tells whether a stack can be called so.
func CheckName(name string) error {
	if !names.MatchString(name) {
		return fmt.Errorf("stack name %q: want lower case letters, digits and dashes", name)
	}
	return nil
}

// Host is the stack's DOCKER_HOST.
func (s *Stack) Host() string { return "unix://" + s.socket() }

// RootlessKitSocket is where the stack's RootlessKit serves its API.
func (s *Stack) RootlessKitSocket() string {
	return filepath.Join(s.runtimeDir(), "dockerd-rootless", "api.sock")
}

// User is the name of the user that the stack runs as.
func (s *Stack) User() string { return s.account.Name }

// UID is the user's.
func (s *Stack) UID() int { return s.account.UID }

func (s *Stack) homeDir() string    { return filepath.Join(s.Dir, "home") }
func (s *Stack) tmpDir() string     { return filepath.Join(s.Dir, "tmp") }
func (s *Stack) runtimeDir() string { return filepath.Join(s.Dir, "run") }
func (s *Stack) socket() string     { return filepath.Join(s.runtimeDir(), "docker.sock") }

// Up starts the stack and returns when its API answers, or [ErrUp] when one is up there already. What an earlier one has left
// is used again: images, volumes, containers, of which those with a restart policy run again. When the start fails, or ctx
// ends first, no process of it stays and nothing new but the log. The stack lives in the network namespace of the calling
// thread, and outlives this process.
func (s *Stack) Up(ctx context.Context, o Options) error { return s.start(ctx, opUp, o) }

// Restart is [Stack.Up] for a stack that may run, as a whole or in part: what runs is stopped first, as by [Stack.Down].
func (s *Stack) Restart(ctx context.Context, o Options) error { return s.start(ctx, opRestart, o) }

func (s *Stack) start(ctx context.Context, op operation, o Options) (retErr error) {
	o = o.withDefaults()
	unlock, err := s.lockForRoot()
	if err != nil {
		return err
	}
	defer unlock()
	// A running stack must keep the programs that it has: it runs some of them for each container.
	if _, err := s.act(ctx, call{Op: opCheck, For: op, Options: o}, nil); err != nil {
		return err
	}
	if os.Getuid() == 0 {
		defer func() {
			if retErr != nil && !s.Exists() {
				retErr = errors.Join(retErr, os.RemoveAll(s.bin))
			}
		}()
		if err := s.install(ctx, o); err != nil {
			return err
		}
		if err := writeJSON(s.rootsOptions(), o); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Dir(o.Log), 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(o.Log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	_, err = s.act(ctx, call{Op: op, Options: o}, log)
	if err == nil || ctx.Err() != nil || errors.Is(err, ErrUp) {
		return err
	}
	if lines := tail(o.Log, 15); lines != "" {
		return fmt.Errorf("%w; the last lines of its log, %s:\n%s", err, o.Log, lines)
	}
	return err
}

// Down stops the stack, and keeps what it has: images, volumes, containers. A stack that is not up, or only half, is no error.
// When ctx ends the stack is killed instead of waited for. It may take 30 s and more for containers that do not end.
func (s *Stack) Down(ctx context.Context, o Options) error {
	_, err := s.act(ctx, call{Op: opDown, Options: o.withDefaults()}, nil)
	return err
}

// Purge is [Stack.Down], and removes all the stack made, but the log. It returns an error that names what is left if that is
// anything: a process, a mount, a socket, a file; and what it removed.
func (s *Stack) Purge(ctx context.Context, o Options) (removed []string, _ error) {
	o = o.withDefaults()
	unlock, err := s.lockForRoot()
	if err != nil {
		return nil, err
	}
	defer unlock()
	answer, err := s.act(ctx, call{Op: opPurge, Options: o}, nil)
	if err != nil {
		return answer.Removed, err
	}
	if os.Getuid() == 0 {
		if _, err := os.Lstat(s.bin); err == nil {
			done := progress.Start(o.Progress, "removing "+s.bin)
			defer done()
			if err := os.RemoveAll(s.bin); err != nil {
				return answer.Removed, err
			}
		}
	}
	return answer.Removed, nil
}

// Status tells what there is of the stack now.
func (s *Stack) Status(ctx context.Context) (Status, error) {
	answer, err := s.act(ctx, call{Op: opStatus}, nil)
	if err == nil && os.Getuid() == 0 {
		// Programs and files that root would run and read are not for the user to name.
		answer.Status.Options = Options{}
		if data, err := os.ReadFile(s.rootsOptions()); err == nil {
			if err := json.Unmarshal(data, &answer.Status.Options); err != nil {
				return answer.Status, fmt.Errorf("%s: %w", s.rootsOptions(), err)
			}
			answer.Status.Options.Env = nil // as of any other user's
		}
	}
	return answer.Status, err
}

// rootsOptions is the file with the options of root's last start.
func (s *Stack) rootsOptions() string { return filepath.Join(s.bin, "options.json") }

// Process returns the process that runs that program of the stack: dockerd, or docker-rootlesskit. Of RootlessKit's two
// processes it is the parent, the one on the host.
func (s *Stack) Process(ctx context.Context, program string) (Process, error) {
	status, err := s.Status(ctx)
	if err != nil {
		return Process{}, err
	}
	p, ok := oldest(status.Processes, program)
	if !ok {
		return Process{}, fmt.Errorf("the stack at %s runs no %s", s.Dir, program)
	}
	return p, nil
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

// Running says whether the stack's API answers, within 5 s.
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
func (s *Stack) Client() (*client.Client, error) {
	return client.New(client.WithHost(s.Host()), client.WithDialContext(s.Dial))
}

// Dial connects to the stack's API, whatever address is given. The user can put another daemon's socket in its place, root's
// own, say: so it is no one's but a process of that user.
func (s *Stack) Dial(ctx context.Context, _, _ string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", s.socket())
	if err != nil {
		return nil, err
	}
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err == nil {
		var peer *unix.Ucred
		var peerErr error
		err = raw.Control(func(fd uintptr) {
			peer, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		})
		if err = errors.Join(err, peerErr); err == nil && peer.Uid != uint32(s.account.UID) {
			err = fmt.Errorf("%s is served by user %d, not by %s", s.socket(), peer.Uid, s.User())
		}
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// Exists says whether anything is at the stack's place.
func (s *Stack) Exists() bool {
	_, err := os.Lstat(s.Dir)
	return err == nil
}

// tail returns the last n lines of the file, indented.
func tail(file string, n int) string {
	data, err := os.ReadFile(file)
	if err != nil {
		return "    " + err.Error()
	}
	text := strings.TrimRight(string(data), "\n")
	if text == "" {
		return ""
	}
	lines := strings.Split(text, "\n")
	lines = lines[max(0, len(lines)-n):]
	return "    " + strings.Join(lines, "\n    ")
}
