//go:build integration

// Package install runs `berth install` as a user does who has no Go and no checkout.
package install

import (
	"debug/elf"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

const bin = "../../build/bin"

// unit is what dockerd-rootless-setuptool.sh writes, without what it asks of other units.
const unit = `[Unit]
Description=Docker Application Container Engine (Rootless)

[Service]
Environment=PATH=/usr/bin:/bin:/usr/sbin:/sbin
ExecStart=%h/bin/dockerd-rootless.sh
ExecReload=/bin/kill -s HUP $MAINPID
TimeoutSec=0
RestartSec=2
Restart=always
Type=notify
NotifyAccess=all
KillMode=mixed

[Install]
WantedBy=default.target
`

// home is a user's who has a stock Docker in ~/bin, which systemd starts, and Berth in ~/berth, as it is unpacked.
func home(t *testing.T) (dir string, owner *syscall.Credential) {
	t.Helper()
	dir, err := os.MkdirTemp("", "berth-install-") // t.TempDir's parents are the tester's only
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, os.RemoveAll(dir)) })
	copies := map[string]string{"berth/berth": "berth", "berth/dockerd": "dockerd", "berth/docker-proxy": "docker-proxy", "bin/dockerd": "dockerd-stock", "bin/dockerd-rootless.sh": "dockerd-rootless.sh"}
	for to, from := range copies {
		copyFile(t, filepath.Join(dir, to), filepath.Join(bin, from))
	}
	name := filepath.Join(dir, ".config/systemd/user/docker.service")
	assert.NilError(t, os.MkdirAll(filepath.Dir(name), 0o755))
	assert.NilError(t, os.WriteFile(name, []byte(unit), 0o644))
	if os.Getuid() != 0 {
		return dir, nil
	}
	u, err := user.Lookup("berth") // hack/deps.sh makes it
	assert.NilError(t, err)
	uid, err := strconv.Atoi(u.Uid)
	assert.NilError(t, err)
	gid, err := strconv.Atoi(u.Gid)
	assert.NilError(t, err)
	assert.NilError(t, filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, uid, gid)
	}))
	return dir, &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
}

func copyFile(t *testing.T, to, from string) {
	t.Helper()
	assert.NilError(t, os.MkdirAll(filepath.Dir(to), 0o755))
	src, err := os.Open(from)
	assert.NilError(t, err)
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	assert.NilError(t, err)
	_, err = io.Copy(dst, src)
	assert.NilError(t, err)
	assert.NilError(t, dst.Close())
}

// tree is all that is below dir, for comparison.
func tree(t *testing.T, dir string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", `cd "$1" && find . -printf '%p %M %u %s\n' | sort`, "sh", dir).CombinedOutput()
	assert.NilError(t, err, "%s", out)
	return string(out)
}

func command(dir string, owner *syscall.Credential, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(dir, "berth/berth"), args...)
	cmd.Dir = "/"
	cmd.Env = []string{"HOME=" + dir, "PATH=/usr/bin:/bin", "TMPDIR=" + dir, "XDG_RUNTIME_DIR=" + dir} // where Debian has no Go; what is left anywhere is seen
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: owner}
	return cmd
}

func TestInstallAndBackWithoutGoOrACheckout(t *testing.T) {
	dir, owner := home(t)
	before := tree(t, dir)
	berth := func(args ...string) string {
		t.Helper()
		out, err := command(dir, owner, args...).CombinedOutput()
		assert.NilError(t, err, "%s", out)
		return string(out)
	}

	assert.Check(t, is.Contains(berth("install", "--dry-run"), "nothing was changed\n"))
	assert.Equal(t, tree(t, dir), before)
	assert.Check(t, is.Contains(berth("status"), "installed    no: `berth install` has"))
	said := berth("install")
	assert.Check(t, is.Contains(said, "systemd-analyze --user verify finds no fault with it\n"))
	assert.Check(t, is.Contains(said, "systemctl --user restart docker\n"))

	status := berth("status")
	assert.Check(t, is.Contains(status, "+berth."))
	assert.Check(t, is.Contains(status, ", for your docker.service\nyour Docker  not up\n"))

	// As systemd would.
	dropIn, err := os.ReadFile(filepath.Join(dir, ".config/systemd/user/docker.service.d/berth.conf"))
	assert.NilError(t, err)
	_, dockerd, ok := strings.Cut(string(dropIn), `Environment="DOCKERD=`)
	assert.Assert(t, ok, "%s", dropIn)
	dockerd, _, _ = strings.Cut(dockerd, `"`)
	version, err := exec.Command(dockerd, "--version").Output()
	assert.NilError(t, err)
	assert.Check(t, is.Contains(string(version), "+berth."))

	once := tree(t, dir)
	berth("install")
	assert.Equal(t, tree(t, dir), once)
	assert.Check(t, is.Contains(berth("uninstall"), "Docker has its own dockerd again"))
	assert.Equal(t, tree(t, dir), before)
	assert.Equal(t, berth("uninstall"), "nothing is installed\n")
}

// A failed install says what this user's Docker lacks here, too.
func TestFailedInstallSaysWhatTheMachineLacks(t *testing.T) {
	dir, owner := home(t)
	assert.NilError(t, os.Remove(filepath.Join(dir, "berth/dockerd")))
	cmd := command(dir, owner, "install")
	cmd.Env = []string{"HOME=" + dir, "PATH=/nowhere"} // no newuidmap, and no XDG_RUNTIME_DIR
	out, err := cmd.CombinedOutput()
	assert.ErrorContains(t, err, "exit status 1")
	lines := strings.Join(strings.Fields(string(out)), " ")
	assert.Check(t, is.Contains(lines, "`berth doctor` says of this machine: fail newuidmap machine newuidmap or newgidmap is missing -> install them fail runtime-dir machine XDG_RUNTIME_DIR is not set"))
	assert.Check(t, is.Regexp(`As root:\n  \S.*\n  loginctl enable-linger \w+\nberth: no patched dockerd beside this command`, string(out)))
}

// However far it came: a kill -9 leaves what can be taken back, Ctrl-C nothing.
func TestInterruptedInstallGoesBack(t *testing.T) {
	dir, owner := home(t)
	before := tree(t, dir)
	start := time.Now()
	for _, args := range []string{"install", "uninstall"} {
		out, err := command(dir, owner, args).CombinedOutput()
		assert.NilError(t, err, "%s", out)
	}
	const steps = 5
	took := time.Since(start)
	for i := range steps {
		for _, sig := range []os.Signal{syscall.SIGKILL, os.Interrupt} {
			cmd := command(dir, owner, "install")
			assert.NilError(t, cmd.Start())
			time.Sleep(took * time.Duration(i) / steps)
			if err := cmd.Process.Signal(sig); err != nil {
				assert.ErrorIs(t, err, os.ErrProcessDone)
			}
			err := cmd.Wait()
			if sig == os.Interrupt && err != nil && cmd.ProcessState.Exited() { // else it ended before it could answer
				assert.Equal(t, tree(t, dir), before)
				continue
			}
			out, err := command(dir, owner, "uninstall").CombinedOutput()
			assert.NilError(t, err, "%s", out)
			assert.Equal(t, tree(t, dir), before)
		}
	}
}

// An image as Docker's own, which are made from Alpine, has no loader of the usual C library.
func TestDockerdNeedsNoLoader(t *testing.T) {
	for _, name := range []string{"dockerd", "docker-proxy"} {
		f, err := elf.Open(filepath.Join(bin, name))
		assert.NilError(t, err)
		for _, p := range f.Progs {
			assert.Check(t, p.Type != elf.PT_INTERP && p.Type != elf.PT_DYNAMIC, "%s is linked dynamically", name)
		}
		assert.NilError(t, f.Close())
	}

	root := t.TempDir()
	copyFile(t, filepath.Join(root, "usr/local/bin/dockerd"), filepath.Join(bin, "dockerd"))
	cmd := exec.Command("/usr/local/bin/dockerd", "--version")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	if uid := os.Getuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: uid, Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	assert.NilError(t, err, "%s", out)
	assert.Check(t, is.Contains(string(out), "+berth."))
}
