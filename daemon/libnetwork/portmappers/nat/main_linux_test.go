package nat

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// inNamespace is set in the environment of a test binary that TestMain started.
const inNamespace = "BERTH_TEST_IN_NAMESPACE"

// unlockedMain is set in the environment of a test binary whose main thread may
// be lent to any goroutine.
const unlockedMain = "BERTH_TEST_UNLOCKED_MAIN"

// As in dockerd, the main thread stays where it is.
func init() {
	if os.Getenv(unlockedMain) == "" {
		runtime.LockOSThread()
	}
}

// TestMain runs the tests again in namespaces like those of a rootless daemon:
// root in a user namespace, with a network namespace of its own. So an ordinary
// user can run them, and no port of the machine is in their way. Where user
// namespaces aren't to be had, root can run them in place.
func TestMain(m *testing.M) {
	if os.Getenv(inNamespace) != "" {
		if err := bringUpLoopback(); err != nil {
			fmt.Fprintln(os.Stderr, "bringing up the loopback interface:", err)
			os.Exit(1)
		}
		settings() // It keeps its files open.
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	err := cmd.Run()
	var failed *exec.ExitError
	switch {
	case err == nil:
		os.Exit(0)
	case errors.As(err, &failed):
		os.Exit(1)
	}
	fmt.Fprintln(os.Stderr, "running in the machine's own namespaces:", err)
	os.Exit(m.Run())
}

func bringUpLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	// On a host that the tests didn't make it is up, and may not be changed.
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr); err != nil || ifr.Uint16()&unix.IFF_UP != 0 {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}
