//go:build integration

// Package busyhost runs the integration test that the patch has for upstream: it fails with a stock daemon and passes with Berth's.
package busyhost

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/checkout"
	"berth/hack/pins"
	"berth/hack/stack"
	"berth/integration/stacktest"
	"berth/integration/whoami"
)

const (
	rounds = 10
	name   = "TestPublishOnBusyHost"
)

// images are those that upstream's tests load before they run. Ours does for all: the test needs one that stays.
var images = []string{"busybox:latest", "busybox:glibc", "hello-world:frozen", "debian:trixie-slim", "hello-world:amd64", "hello-world:arm64"}

func TestMain(m *testing.M) { stacktest.MainAfter(m, compile) }

// compile makes a binary of upstream's tests of networking, with ours among them.
func compile() (binary string, _ error) {
	root, err := checkout.Root()
	if err != nil {
		return "", err
	}
	list, err := pins.Load(filepath.Join(root, "vendor.conf"))
	if err != nil {
		return "", err
	}
	base, err := pins.Base(list, "")
	if err != nil {
		return "", err
	}
	stock := filepath.Join(root, "build", "tree", base.Version, "stock")
	const folder = "integration/networking"
	own, err := filepath.Glob(filepath.Join(root, "hack/patch/testdata/upstream", folder, "*_test.go"))
	if err != nil || len(own) != 1 {
		return "", fmt.Errorf("want one test, there are %q: %w", own, err)
	}
	var overlay struct{ Replace map[string]string }
	overlay.Replace = map[string]string{filepath.Join(stock, folder, filepath.Base(own[0])): own[0]}
	text, err := json.Marshal(overlay)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, "build", "busyhost")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	overlayFile := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlayFile, text, 0o644); err != nil {
		return "", err
	}
	binary = filepath.Join(dir, "networking.test")
	cmd := exec.Command("go", "test", "-trimpath", "-overlay", overlayFile, "-c", "-o", binary, "./"+folder)
	cmd.Dir = stock
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=-mod=readonly")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return binary, nil
}

func TestStockFails(t *testing.T) {
	passed, failed, out := run(t, "dockerd-stock")
	assert.Check(t, is.Equal(failed, rounds), "%s", out)
	assert.Check(t, is.Equal(passed, 0))
	assert.Check(t, is.Equal(strings.Count(out, "bind: address already in use"), rounds), "%s", out)
}

func TestBerthPasses(t *testing.T) {
	passed, failed, out := run(t, "dockerd")
	assert.Check(t, is.Equal(passed, rounds), "%s", out)
	assert.Check(t, is.Equal(failed, 0))
}

// run runs the test over and over, with the daemon of that name.
func run(t *testing.T, dockerd string) (passed, failed int, _ string) {
	t.Helper()
	d := stacktest.Start(t, dockerd, stack.Options{})
	for _, name := range images {
		_, err := d.Docker("tag", whoami.Image, name)
		assert.NilError(t, err)
	}
	cmd := exec.CommandContext(t.Context(), stacktest.Prepared(), "-test.v", "-test.run", "^"+name+"$", "-test.count", fmt.Sprint(rounds))
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+d.Host())
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	text := string(out)
	passed, failed = strings.Count(text, "--- PASS: "+name+" "), strings.Count(text, "--- FAIL: "+name+" ")
	t.Logf("%s with %s: %d of %d pass", name, dockerd, passed, rounds)
	return passed, failed, text
}
