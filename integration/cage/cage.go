// Package cage runs daemons that are no rootless stack: a dockerd as root, and a user's podman. Each is in namespaces of its own
// that go with it, but for the network: that is the calling thread's. It takes root.
package cage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/moby/moby/client"
)

// Daemon is one that is up.
type Daemon struct {
	API *client.Client

	dir   string
	stdin io.Closer
	ended <-chan error
	log   *os.File
}

// Both scripts run as the first process of a process namespace: with it goes all that was started and mounted. It ends when the
// daemon has, which is told to when nobody holds the standard input any more. Files are in memory, where an overlay can be
// mounted whatever file system the machine has, but for the socket.
const (
	begin = `set -eu
dir=$1 program=$2
exec 3<&0
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs "$dir/memory"
`
	dockerd = begin + `
echo '{}' >"$dir/memory/daemon.json" # not the machine's own
"$program" --host "unix://$dir/api/socket" --data-root "$dir/memory/data" --exec-root "$dir/memory/exec" \
	--pidfile "$dir/memory/pid" --log-format json --cgroup-parent "/${dir##*/}" --exec-opt native.cgroupdriver=cgroupfs \
	--config-file "$dir/memory/daemon.json" 3<&- &
` + end
	podman = begin + `
runc=$3 user=$4
cp "$runc" "$dir/memory/runc" # where the user can read it
mkdir "$dir/memory/home" "$dir/memory/run"
chown "$user:" "$dir/memory/home" "$dir/memory/run" "$dir/api"
cd "$dir/memory/home"
env -i HOME="$dir/memory/home" XDG_RUNTIME_DIR="$dir/memory/run" USER="$user" PATH="$PATH" \
	setpriv --reuid="$user" --regid="$user" --init-groups "$program" --runtime "$dir/memory/runc" --cgroup-manager cgroupfs \
	--events-backend none system service --time 0 "unix://$dir/api/socket" 3<&- &
` + end
	end = `daemon=$!
{ read -r _ <&3 || kill -TERM $daemon; } &
wait $daemon
`
)

const timeout = time.Minute // of a start, and of an end

// Dockerd starts the program, with what it needs beside it, and returns when its API answers. log gets what it says. It ends
// with this process, however that ends, or by [Daemon.Stop].
func Dockerd(ctx context.Context, program, log string) (*Daemon, error) {
	return start(ctx, log, "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"), dockerd, program)
}

// Podman is as [Dockerd], of a user's podman, the machine's own, with a runc.
func Podman(ctx context.Context, user, runc, log string) (*Daemon, error) {
	program, err := exec.LookPath("podman")
	if err != nil {
		return nil, fmt.Errorf("%w: apt-get install podman", err)
	}
	return start(ctx, log, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", podman, program, runc, user)
}

func start(ctx context.Context, log, path, script string, args ...string) (_ *Daemon, retErr error) {
	if os.Getuid() != 0 {
		return nil, errors.New("it takes root")
	}
	dir, err := os.MkdirTemp("", "berth-cage-") // the path of a socket must be short
	if err != nil {
		return nil, err
	}
	d := &Daemon{dir: dir}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, d.Stop())
		}
	}()
	err = os.Chmod(dir, 0o755)
	for _, sub := range []string{"memory", "api"} {
		err = errors.Join(err, os.Mkdir(filepath.Join(dir, sub), 0o755))
	}
	if err := errors.Join(err, os.MkdirAll(filepath.Dir(log), 0o755)); err != nil {
		return nil, err
	}
	if d.log, err = os.Create(log); err != nil {
		return nil, err
	}
	cmd := exec.Command("sh", append([]string{"-c", script, "sh", dir}, args...)...)
	cmd.Env = append(os.Environ(), path)
	cmd.Stdout, cmd.Stderr = d.log, d.log
	// A session of its own: a Ctrl-C at the terminal is for us.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Unshareflags: syscall.CLONE_NEWNS, Setsid: true}
	if d.stdin, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	d.ended = ended
	go func() { ended <- cmd.Wait() }()
	if d.API, err = client.New(client.WithHost("unix://" + filepath.Join(dir, "api", "socket"))); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the daemon does not answer within %v", timeout))
	defer cancel()
	for {
		_, err := d.API.Ping(ctx, client.PingOptions{})
		if err == nil {
			return d, nil
		}
		select {
		case err := <-ended:
			ended <- err
			return nil, fmt.Errorf("the daemon ended while it started: %v: see %s", err, log)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Stop ends the daemon, and leaves nothing but its log.
func (d *Daemon) Stop() (err error) {
	if d.API != nil {
		d.API.Close()
	}
	if d.ended != nil {
		err = d.stdin.Close()
		select {
		case endErr := <-d.ended:
			err = errors.Join(err, endErr)
		case <-time.After(timeout):
			return errors.Join(err, fmt.Errorf("the daemon does not end within %v", timeout))
		}
	}
	if d.log != nil {
		err = errors.Join(err, d.log.Close())
	}
	return errors.Join(err, removeCgroup(filepath.Base(d.dir)), os.RemoveAll(d.dir))
}

// removeCgroup removes what runc leaves: its containers' parent, in each hierarchy.
func removeCgroup(name string) (err error) {
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		dirs, globErr := filepath.Glob(pattern + name)
		err = errors.Join(err, globErr)
		for _, dir := range dirs {
			if rmErr := os.Remove(dir); rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
				err = errors.Join(err, rmErr)
			}
		}
	}
	return err
}
