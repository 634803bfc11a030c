//go:build integration

// Package clients runs what people start containers with, on a host where others hold ports: with a stock daemon it fails, with
// Berth's it does not.
package clients

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/client"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/checkout"
	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
	"berth/integration/whoami"
)

var full = flag.Bool("full", false, "10 services, of which one is scaled to 20, and 30 containers at once")

func TestMain(m *testing.M) { stacktest.MainAfter(m, compile) }

func compile() (program string, _ error) {
	root, err := checkout.Root()
	if err != nil {
		return "", err
	}
	program = filepath.Join(root, "build", "testcontainers.test")
	cmd := exec.Command("go", "test", "-trimpath", "-c", "-o", program, ".")
	cmd.Dir = filepath.Join(root, "integration", "clients", "testcontainers")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=-mod=readonly")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return program, nil
}

func TestCompose(t *testing.T) {
	services, scale := 3, 5
	if *full {
		services, scale = 10, 20
	}
	t.Run("stock", func(t *testing.T) {
		up := project(t, busy(t, "dockerd-stock"), services)
		out, err := up("up", "--detach")
		assert.ErrorContains(t, err, "exit status")
		assert.Check(t, is.Contains(out, "bind: address already in use"))
	})
	t.Run("Berth", func(t *testing.T) {
		d := busy(t, "dockerd")
		up := project(t, d, services)
		for _, want := range []int{services, services - 1 + scale, services} {
			args := []string{"up", "--detach"}
			if want > services {
				args = append(args, "--scale", fmt.Sprint("s1=", scale))
			}
			out, err := up(args...)
			assert.NilError(t, err, out)
			assertAllAnswer(t, d, want)
			if want > services {
				out, err = up("down", "--timeout", "0")
				assert.NilError(t, err, out)
				assertAllAnswer(t, d, 0)
			}
		}
	})
}

func TestTestcontainers(t *testing.T) {
	count := 10
	if *full {
		count = 30
	}
	t.Run("stock", func(t *testing.T) {
		out, err := parallel(t, busy(t, "dockerd-stock"), count)
		assert.ErrorContains(t, err, "exit status")
		assert.Check(t, is.Contains(out, "bind: address already in use"))
	})
	t.Run("Berth", func(t *testing.T) {
		out, err := parallel(t, busy(t, "dockerd"), count)
		assert.NilError(t, err, out)
		assert.Equal(t, strings.Count(out, "--- PASS: TestParallel/"), count, out)
	})
}

// busy starts a stack on a host where the first dynamic ports are held.
func busy(t *testing.T, dockerd string) *stacktest.Daemon {
	t.Helper()
	ports, err := hostload.DynamicPorts(100)
	assert.NilError(t, err)
	stacktest.Hold(t, hostload.Load{Network: "tcp4", Ports: ports})
	return stacktest.Start(t, dockerd, stack.Options{})
}

// project makes a project of services with a dynamic port each, and returns what runs Compose on it.
func project(t *testing.T, d *stacktest.Daemon, services int) func(args ...string) (string, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "compose.yaml")
	text := "services:\n"
	for i := range services {
		text += fmt.Sprintf("  s%d:\n    image: %s\n    ports: [\"80\"]\n", i+1, whoami.Image)
	}
	assert.NilError(t, os.WriteFile(file, []byte(text), 0o644))
	return func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), filepath.Join(d.Options.Bin, "compose"), append([]string{"--file", file, "--project-name", "busy"}, args...)...)
		cmd.Env = append(os.Environ(), "DOCKER_HOST="+d.Host(), "DOCKER_CONFIG="+t.TempDir())
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
}

// parallel runs testcontainers' program.
func parallel(t *testing.T, d *stacktest.Daemon, count int) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), stacktest.Prepared(), "-test.v", "-test.parallel", fmt.Sprint(count))
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir(), "IMAGE="+whoami.Image, fmt.Sprint("COUNT=", count), "DOCKER_HOST="+d.Host(),
		"TESTCONTAINERS_HOST_OVERRIDE=127.0.0.1", // inside a container, it would ask at the bridge's address
		"TESTCONTAINERS_RYUK_DISABLED=true")      // what cleans up behind it is an image that is nowhere here
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// assertAllAnswer checks that so many containers run, each behind a port that answers with its id.
func assertAllAnswer(t *testing.T, d *stacktest.Daemon, count int) {
	t.Helper()
	list, err := d.API.ContainerList(t.Context(), client.ContainerListOptions{})
	assert.NilError(t, err)
	assert.Equal(t, len(list.Items), count)
	seen := map[netip.AddrPort]bool{}
	for _, c := range list.Items {
		published := d.Published(t, c.ID)
		assert.Assert(t, len(published) > 0, "%s", c.Names)
		for _, at := range published {
			assert.Check(t, !seen[at], "%s is published twice", at)
			seen[at] = true
			assert.Check(t, whoami.Await("tcp", at, c.ID, 30*time.Second))
		}
	}
	t.Logf("%d containers answer at %d host addresses", count, len(seen))
}
