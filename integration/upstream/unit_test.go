//go:build integration

package upstream

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"gotest.tools/v3/assert"
)

// packages of upstream's whose tests are held against stock's: the patch's own, what it stands on, and what calls it.
var unitPackages = []string{
	"./daemon/libnetwork/portmappers/nat",
	"./daemon/libnetwork/portmapperapi",
	"./daemon/libnetwork/portallocator",
	"./daemon/libnetwork/internal/rlkclient",
	"./daemon/libnetwork/drvregistry",
	"./daemon/libnetwork/drivers/bridge",
	"./daemon/libnetwork",
}

// unitTestsHold compares the tests one by one, by the trees' results: some fail in stock, too, as those of SCTP do where the kernel has none.
func unitTestsHold(t *testing.T, b *base) {
	stock := runUnitTests(t, b.stock)
	berth := runUnitTests(t, b.berth)
	passed := 0
	for test, result := range stock {
		if result != "pass" {
			t.Logf("%s.%s: %s in stock, %s in Berth", test.Package, test.Test, result, berth[test])
			continue
		}
		passed++
		assert.Check(t, berth[test] == "pass", "%s.%s passes in stock; in Berth: %q", test.Package, test.Test, berth[test])
	}
	t.Logf("%d of upstream's %d tests pass in both trees", passed, len(stock))
	assert.Check(t, passed > 100, "the tests did not run")
	b.tell("%d of %d pass in both", passed, len(stock))
}

// unitTest names a test, in its package.
type unitTest struct{ Package, Test string }

// runUnitTests runs the tests in a network namespace of their own, and returns each one's result. Packages go one after the other: an old kernel
// does not bear it when several of them close their filtered sockets at once.
func runUnitTests(t *testing.T, dir string) map[unitTest]string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", append([]string{"-c", `ip link set lo up && exec go test -json -p 1 -count=1 -trimpath "$@"`, "sh"}, unitPackages...)...)
	cmd.Dir = dir
	cmd.Env = goEnv()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if uid := os.Getuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	results, packages := map[unitTest]string{}, 0
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var event struct {
			unitTest
			Action string
		}
		err := dec.Decode(&event)
		if errors.Is(err, io.EOF) {
			break
		}
		assert.NilError(t, err, "%s", stderr.String())
		switch ended := event.Action == "pass" || event.Action == "fail" || event.Action == "skip"; { // skip: a base's package may have no tests
		case ended && event.Test != "":
			results[event.unitTest] = event.Action
		case ended:
			packages++
		}
	}
	assert.Assert(t, packages == len(unitPackages), "%d of %d packages were tested: %s", packages, len(unitPackages), stderr.String())
	return results
}
