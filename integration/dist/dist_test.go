//go:build integration

// Package dist takes a release from the package to a Docker that runs it, and back.
package dist

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

const repository = "../.."

// A user's home in the root of the test's own, whose rootless Docker systemd starts.
const (
	home = "/home/someone"
	unit = "[Service]\nExecStart=/usr/bin/dockerd-rootless.sh\n"
)

func TestPackageInARootOfItsOwn(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("a root of its own takes root")
	}
	out := filepath.Join(t.TempDir(), "dist")
	cmd := exec.Command("go", "run", "./hack/dist", "-o", out, runtime.GOARCH)
	cmd.Dir = repository
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1000000000") // the checkout may be no git repository
	said, err := cmd.CombinedOutput()
	assert.NilError(t, err, "%s", said)
	sums := exec.Command("sha256sum", "--check", "--strict", "SHA256SUMS")
	sums.Dir = out
	said, err = sums.CombinedOutput()
	assert.NilError(t, err, "%s", said)
	checkSources(t, out)
	packages, err := filepath.Glob(filepath.Join(out, "berth_*_"+runtime.GOARCH+".deb"))
	assert.NilError(t, err)
	assert.Equal(t, len(packages), 1)

	root, err := os.MkdirTemp("", "berth-root-") // t.TempDir's parents are the tester's only
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, os.RemoveAll(root)) })
	assert.NilError(t, os.Chmod(root, 0o755))
	for _, dir := range []string{"var/lib/dpkg/info", "var/lib/dpkg/updates", "var/log"} {
		assert.NilError(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	write(t, filepath.Join(root, "var/lib/dpkg/status"), nil, 0o644)
	write(t, filepath.Join(root, home, ".config/systemd/user/docker.service"), []byte(unit), 0o644)
	stock, err := os.ReadFile(filepath.Join(repository, "build/bin/dockerd-stock"))
	assert.NilError(t, err)
	write(t, filepath.Join(root, "usr/bin/dockerd"), stock, 0o755)
	script, err := os.ReadFile(filepath.Join(repository, "build/bin/dockerd-rootless.sh"))
	assert.NilError(t, err)
	write(t, filepath.Join(root, "usr/bin/dockerd-rootless.sh"), script, 0o755)
	for _, dir := range []string{"tmp", "proc", "dev"} {
		assert.NilError(t, os.Mkdir(filepath.Join(root, dir), 0o777))
	}
	run(t, exec.Command("chown", "-R", "12345:12345", filepath.Join(root, home)))

	before := tree(t, root)
	dpkg := func(args ...string) {
		t.Helper()
		run(t, exec.Command("dpkg", append([]string{"--root=" + root, "--force-script-chrootless"}, args...)...))
	}
	// in runs a program there, with a /proc and a /dev that nobody else sees there.
	in := func(program string, args ...string) string {
		t.Helper()
		cmd := exec.Command("unshare", append([]string{"--mount", "sh", "-euc", `for d in proc dev; do mount --rbind "/$d" "$0/$d"; done; exec chroot --userspec=12345:12345 "$0" "$@"`, root, program}, args...)...)
		cmd.Env = []string{"HOME=" + home, "PATH=/usr/bin:/usr/sbin:/bin:/sbin"}
		return run(t, cmd)
	}
	dpkg("-i", packages[0])
	for _, file := range []string{"usr/bin/berth", "usr/share/man/man1/berth-install.1.gz", "usr/share/doc/berth/NOTICE.gz", "usr/share/doc/berth/examples/stress.sh"} {
		_, err := os.Stat(filepath.Join(root, file))
		assert.NilError(t, err)
	}
	assert.Check(t, is.Contains(in("/usr/bin/berth", "install"), "systemctl --user restart docker\n"))
	assert.Check(t, is.Contains(in("/usr/bin/berth", "status"), ", for your docker.service\nyour Docker  not up\n"))
	dropIn, err := os.ReadFile(filepath.Join(root, home, ".config/systemd/user/docker.service.d/berth.conf"))
	assert.NilError(t, err)
	_, dockerd, ok := strings.Cut(string(dropIn), `"DOCKERD=`)
	assert.Assert(t, ok, "%s", dropIn)
	dockerd, _, _ = strings.Cut(dockerd, `"`)
	assert.Check(t, is.Contains(in(dockerd, "--version"), "+berth."))
	in("/usr/bin/berth", "uninstall")
	dpkg("-r", "berth")
	assert.Equal(t, tree(t, root), before)
}

// checkSources holds the patched package in the sources against the patch.
func checkSources(t *testing.T, out string) {
	t.Helper()
	archives, err := filepath.Glob(filepath.Join(out, "berth-*-source.tar.gz"))
	assert.NilError(t, err)
	assert.Equal(t, len(archives), 1)
	dir := t.TempDir()
	run(t, exec.Command("tar", "--strip-components=1", "-C", dir, "-xzf", archives[0]))
	const nat = "daemon/libnetwork/portmappers/nat"
	run(t, exec.Command("diff", "-r", "--exclude=mapper_linux_test.go", filepath.Join(repository, nat), filepath.Join(dir, nat)))
	for _, upstreams := range []string{"go.mod", "cmd/dockerd/main.go", nat + "/mapper_linux_test.go"} {
		_, err := os.Stat(filepath.Join(dir, upstreams))
		assert.NilError(t, err)
	}
}

func run(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	assert.NilError(t, err, "%v\n%s", cmd.Args, out)
	return string(out)
}

func write(t *testing.T, name string, data []byte, mode os.FileMode) {
	t.Helper()
	assert.NilError(t, os.MkdirAll(filepath.Dir(name), 0o755))
	assert.NilError(t, os.WriteFile(name, data, mode))
}

// tree is all that is in root, but for what dpkg keeps for itself.
func tree(t *testing.T, root string) string {
	t.Helper()
	cmd := exec.Command("find", ".", "-path", "./var/lib/dpkg", "-prune", "-o", "-path", "./var/log", "-prune", "-o", "-printf", "%p %M %u %s\n")
	cmd.Dir = root
	lines := strings.Split(run(t, cmd), "\n")
	for i, line := range lines { // a folder's size is the file system's matter
		if f := strings.Fields(line); len(f) == 4 && strings.HasPrefix(f[1], "d") {
			lines[i] = strings.Join(f[:3], " ")
		}
	}
	return strings.Join(lines, "\n")
}
