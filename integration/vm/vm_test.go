//go:build vm

// Package vm shows what needs a whole machine: systemd with cgroup v2, which limits containers and starts the Docker that a user
// has, and a power cut. The machine is QEMU's, without a network, and made of the machine's own Debian. See `make vm`.
package vm

import (
	"bufio"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"

	"berth/hack/checkout"
)

const (
	packages = "linux-image-cloud-amd64,systemd-sysv,dbus-user-session,libpam-systemd,uidmap,iptables,slirp4netns,fuse-overlayfs,iproute2,procps,kmod,passwd,login"
	modules  = "nf_tables nft_compat nft_chain_nat ip_tables iptable_nat iptable_filter ip6table_nat ip6table_filter xt_conntrack xt_MASQUERADE xt_addrtype xt_nat xt_tcpudp xt_mark veth bridge br_netfilter tun overlay fuse"
	atMost   = 15 * time.Minute // It is emulated: KVM is not everywhere.
	service  = `[Service]
Type=idle
ExecStart=/bin/bash /opt/guest.sh
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
`
)

func TestUnderSystemd(t *testing.T) {
	root, err := checkout.Root()
	assert.NilError(t, err)
	dir, err := os.MkdirTemp(filepath.Join(root, "build"), "vm")
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, os.RemoveAll(dir)) })
	ctx, cancel := context.WithTimeout(t.Context(), atMost)
	defer cancel()

	system, disk := filepath.Join(dir, "root"), filepath.Join(dir, "disk")
	makeSystem(ctx, t, root, system)
	run(ctx, t, "truncate", "-s", "8G", disk)
	run(ctx, t, "mke2fs", "-q", "-t", "ext4", "-d", system, disk)
	boot(ctx, t, system, disk, "cut the power")
	boot(ctx, t, system, disk, "done")
}

// makeSystem makes a Debian with two users, the stock Docker of the one, and Berth: built, and as a release has it.
func makeSystem(ctx context.Context, t *testing.T, root, system string) {
	t.Helper()
	const sources = "/etc/apt/sources.list"
	mirrors := sources + ".d/debian.sources"
	if _, err := os.Stat(mirrors); err != nil {
		mirrors = sources
	}
	run(ctx, t, "mmdebstrap", "--quiet", "--variant=minbase", "--include="+packages, "bookworm", system, mirrors)
	for _, user := range []string{"alice", "bob"} {
		run(ctx, t, "chroot", system, "useradd", "--create-home", "--shell", "/bin/bash", user)
	}
	bin, built := checkout.Bin(root), filepath.Join(system, "opt/berth/build/bin")
	copies := map[string]string{
		"dockerd-stock": "usr/bin/dockerd", "berth": "opt/dist/berth", "dockerd": "opt/dist/dockerd", "docker-proxy": "opt/dist/docker-proxy",
	}
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "docker", "docker-proxy", "dockerd-rootless.sh", "rootlesskit", "runc"} {
		run(ctx, t, "install", "-D", "-t", filepath.Join(system, "usr/bin"), filepath.Join(bin, name))
		run(ctx, t, "install", "-D", "-t", built, filepath.Join(bin, name))
	}
	for _, name := range []string{"berth", "dockerd"} {
		run(ctx, t, "install", "-D", "-t", built, filepath.Join(bin, name))
	}
	for from, to := range copies {
		run(ctx, t, "install", "-D", filepath.Join(bin, from), filepath.Join(system, to))
	}
	for _, name := range []string{"go.mod", "vendor.conf"} {
		run(ctx, t, "install", "-t", filepath.Join(system, "opt/berth"), filepath.Join(root, name))
	}
	run(ctx, t, "chmod", "-R", "a+rwX", filepath.Join(system, "opt/berth")) // The checkout of each.
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", filepath.Join(system, "opt/hostname"), "./integration/whoami/hostname")
	build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	assert.NilError(t, err, string(out))
	guest, err := os.ReadFile("guest.sh")
	assert.NilError(t, err)
	for file, text := range map[string]string{
		"opt/guest.sh":                     string(guest),
		"etc/modules-load.d/docker.conf":   strings.ReplaceAll(modules, " ", "\n"),
		"etc/systemd/system/guest.service": service,
	} {
		assert.NilError(t, os.WriteFile(filepath.Join(system, file), []byte(text), 0o644))
	}
	wants := filepath.Join(system, "etc/systemd/system/multi-user.target.wants")
	assert.NilError(t, os.MkdirAll(wants, 0o755))
	assert.NilError(t, os.Symlink("../guest.service", filepath.Join(wants, "guest.service")))
	assert.NilError(t, os.Symlink("/dev/null", filepath.Join(system, "etc/systemd/system/serial-getty@ttyS0.service")))
}

func run(ctx context.Context, t *testing.T, name string, args ...string) {
	t.Helper()
	t.Log(name, strings.Join(args, " "))
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	assert.NilError(t, err, string(out))
}

// boot runs the machine until it says the word, and cuts its power then.
func boot(ctx context.Context, t *testing.T, system, disk, until string) {
	t.Helper()
	one := func(pattern string) string {
		files, err := filepath.Glob(filepath.Join(system, "boot", pattern))
		assert.NilError(t, err)
		assert.Assert(t, len(files) == 1, files)
		return files[0]
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "3072", "-smp", "2",
		"-nographic", "-no-reboot", "-net", "none", "-drive", "file="+disk+",format=raw,if=virtio",
		"-kernel", one("vmlinuz-*"), "-initrd", one("initrd.img-*"),
		"-append", "root=/dev/vda rw console=ttyS0 panic=-1 quiet systemd.show_status=0")
	console, err := cmd.StdoutPipe()
	assert.NilError(t, err)
	cmd.Stderr = os.Stderr
	assert.NilError(t, cmd.Start())
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	checks := 0
	for lines := bufio.NewReader(console); ; {
		line, err := lines.ReadString('\n')
		line = strings.TrimRight(line, "\r\n")
		switch {
		case err == io.EOF:
			t.Fatalf("the machine ended before it said %q: %v", until, ctx.Err())
		case err != nil:
			t.Fatal(err)
		case strings.HasPrefix(line, "not ok "):
			t.Error(line)
		case strings.HasPrefix(line, "ok "):
			checks++
			t.Log(line)
		case line == until:
			assert.Check(t, checks > 0)
			return
		default:
			t.Log(line)
		}
	}
}
