//go:build integration

package e2e

import (
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// Of the kernel's landlock.h: a program may bind the TCP ports that a rule names, and no others.
const (
	landlockCreateRulesetVersion = 1 << 0
	landlockAccessNetBindTCP     = 1 << 0
	landlockRuleNetPort          = 2
	landlockABIWithNet           = 4
)

type landlockNetPortAttr struct{ access, port uint64 }

// forbid has a policy deny a TCP port to the calling thread, and to all processes that it starts, for good. The thread ends with
// the test. Without a kernel that can, nothing is forbidden.
func forbid(t *testing.T, port int) (forbidden bool) {
	t.Helper()
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, landlockCreateRulesetVersion)
	if errno != 0 || abi < landlockABIWithNet {
		return false
	}
	runtime.LockOSThread()
	attr := unix.LandlockRulesetAttr{Handled_access_net: landlockAccessNetBindTCP}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	assert.Assert(t, errno == 0, "%v", errno)
	defer unix.Close(int(fd))
	for p := range 65536 {
		if p == port {
			continue
		}
		rule := landlockNetPortAttr{landlockAccessNetBindTCP, uint64(p)}
		_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, fd, landlockRuleNetPort, uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
		assert.Assert(t, errno == 0, "port %d: %v", p, errno)
	}
	_, _, errno = unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0)
	assert.Assert(t, errno == 0, "%v", errno)
	return true
}
