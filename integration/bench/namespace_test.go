//go:build integration

package bench

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"berth/integration/stacktest"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// inUserNamespace is set in the environment of an ordinary user's benchmarks.
const inUserNamespace = "BERTH_BENCH_IN_USER_NAMESPACE"

// stateDir is where dockerd learns of RootlessKit's state directory.
const stateDir = "ROOTLESSKIT_STATE_DIR"

// As in dockerd, the main thread stays where it is: on the host.
func init() { runtime.LockOSThread() }

// TestMain runs the benchmarks in a network namespace that is their host. An
// ordinary user's need a user namespace for that, and to be allowed to do what
// the allocator does; a stack, which takes all the user's sub-ids, can't be
// there. What needs one is left to root.
func TestMain(m *testing.M) {
	_ = log.SetLevel("error") // A line for each search would be measured, too.
	if os.Getuid() != 0 {
		fmt.Println(WithoutStack + ": only root's can be where the benchmarks are")
		if err := runInUserNamespace(); err != nil {
			fmt.Fprintln(os.Stderr, "run the benchmarks in a user namespace:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	stacktest.Main(m)
}

func runInUserNamespace() error {
	cmd := &exec.Cmd{Path: "/proc/self/exe", Args: os.Args, Stdout: os.Stdout, Stderr: os.Stderr}
	cmd.Env = append(os.Environ(), inUserNamespace+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGTERM,
	}
	return cmd.Run()
}

// inChild moves the benchmark to a network namespace of its own, as dockerd
// does before it calls MapPorts. The rest of the process stays on the host. The
// thread ends with the benchmark, and the namespace with the thread.
func inChild(b *testing.B) {
	runtime.LockOSThread()
	assert.NilError(b, unix.Unshare(unix.CLONE_NEWNET))
	assert.NilError(b, exec.Command("ip", "link", "set", "lo", "up").Run())
}

// inChildWithView is inChild, with the host in sight. As RootlessKit does with
// --detach-netns, it mounts the namespace on a file: what is in the way there,
// such as a link to /proc, would be measured, too.
func inChildWithView(b *testing.B) {
	inChild(b)
	dir := b.TempDir()
	netns := filepath.Join(dir, "netns")
	assert.NilError(b, os.WriteFile(netns, nil, 0o600))
	assert.NilError(b, unix.Unshare(unix.CLONE_NEWNS))
	assert.NilError(b, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	assert.NilError(b, unix.Mount("/proc/thread-self/ns/net", netns, "", unix.MS_BIND, ""))
	b.Cleanup(func() { assert.NilError(b, unix.Unmount(netns, unix.MNT_DETACH)) })
	b.Setenv(stateDir, dir)
}

// setHostRange sets the host's range of dynamic ports until the end of b.
func setHostRange(b *testing.B, first, last int) {
	before := writeHostRange(b, fmt.Sprintf("%d %d", first, last))
	b.Cleanup(func() { writeHostRange(b, before) })
}

func writeHostRange(b *testing.B, value string) (before string) {
	const file = "/proc/sys/net/ipv4/ip_local_port_range"
	done := make(chan error)
	go func() { // On the host, like every thread but the benchmark's own.
		data, err := os.ReadFile(file)
		before = string(data)
		done <- errors.Join(err, os.WriteFile(file, []byte(value), 0))
	}()
	assert.NilError(b, <-done)
	return before
}
