//go:build integration

// Package upstream holds the patched tree to upstream's own tests: what passes
// in the stock tree passes in the patched one.
package upstream

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"gotest.tools/v3/assert"

	"berth/hack/checkout"
	"berth/hack/pins"
)

// packages has the patch's own, what it stands on, and what calls it.
var packages = []string{
	"./daemon/libnetwork/portmappers/nat",
	"./daemon/libnetwork/portallocator",
	"./daemon/libnetwork/drivers/bridge",
}

func TestUpstreamsTestsHold(t *testing.T) {
	root, err := checkout.Root()
	assert.NilError(t, err)
	list, err := pins.Load(filepath.Join(root, "vendor.conf"))
	assert.NilError(t, err)
	for _, pin := range list {
		if pin.Patch == 0 {
			continue
		}
		trees := filepath.Join(root, "build", "tree", pin.Version)
		stock := run(t, filepath.Join(trees, "stock"))
		berth := run(t, filepath.Join(trees, "berth"))
		passed := 0
		for test, result := range stock {
			// Some fail in stock, too: those of SCTP, where the kernel has none.
			if result != "pass" {
				t.Logf("%s: %s in stock, %s in Berth", test, result, berth[test])
				continue
			}
			passed++
			assert.Check(t, berth[test] == "pass", "%s passes in stock; in Berth: %q", test, berth[test])
		}
		t.Logf("%d of upstream's tests pass in both trees", passed)
		assert.Check(t, passed > 100, "the tests did not run")
		return
	}
	t.Fatal("vendor.conf has no base")
}

// run runs the tests in a network namespace of their own, and returns each
// one's result.
func run(t *testing.T, dir string) map[string]string {
	// As `berth build` compiles, for its cache.
	cmd := exec.Command("sh", append([]string{"-c", `ip link set lo up && exec go test -json -count=1 -trimpath "$@"`, "sh"}, packages...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=-mod=readonly")
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
	results := map[string]string{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var event struct{ Action, Package, Test string }
		err := dec.Decode(&event)
		if errors.Is(err, io.EOF) {
			break
		}
		assert.NilError(t, err, "%s", stderr.String())
		if event.Test != "" && (event.Action == "pass" || event.Action == "fail" || event.Action == "skip") {
			results[event.Package+"."+event.Test] = event.Action
		}
	}
	assert.Assert(t, len(results) > 0, "%s", stderr.String())
	return results
}
