//go:build integration

package moby

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"berth/integration/hostload"
)

// Upstream's CI runs its tests in a container that they may do anything to. Here it is a host of namespaces: a pid namespace,
// whose end is the end of everything that runs in it, a mount namespace in which all that is written is memory, and two network
// namespaces: the host, and what is outside of it.
//
// This program plays both when it is started under these names: outside is the pid namespace's init, host is its one child.
const (
	outsideName = "berth-moby-outside"
	hostName    = "berth-moby-host"
)

const (
	work        = "/mnt" // a tmpfs, in which everything is
	account     = "unprivilegeduser"
	outsideIP   = "198.18.0.1" // RFC 2544; upstream's tests use the ranges of documentation
	hostIP      = "198.18.0.2"
	path        = work + "/bin:" + work + "/build/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	socket      = work + "/dest/docker.sock"
	storage     = "native" // as upstream's script: it needs nothing of the file system
	startWithin = time.Minute
	stopWithin  = 30 * time.Second
)

// job is what a host does.
type job struct {
	Build     string // the folder build/, which is read-only to it
	Dockerd   string // in build/bin
	Rootless  bool
	Hold      []hostload.Load
	Test2JSON string // relative to build/
	Runs      []testRun
}

// testRun is one run of one of upstream's test binaries.
type testRun struct {
	Package string   // integration/networking
	Dir     string   // its folder in the base, relative to build/
	Binary  string   // relative to build/, too
	Args    []string // -test.run and the like
}

func init() {
	var err error
	switch os.Args[0] {
	case outsideName:
		err = outside()
	case hostName:
		err = host()
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, os.Args[0]+":", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// outside is init of the namespaces, and what hub.docker.com's address leads to.
func outside() error {
	// Whoever has started us has the other end of our standard input, and nobody else.
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts from the machine: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	web, err := net.Listen("tcp", ":80") // tests connect to it to learn the host's address
	if err != nil {
		return err
	}
	defer web.Close()

	cmd := &exec.Cmd{Path: "/proc/self/exe", Args: []string{hostName, os.Args[1]}, Stdout: os.Stdout, Stderr: os.Stderr}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		return err
	}
	for { // as init, of orphans too
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return err
		case pid == cmd.Process.Pid && status.Exited():
			os.Exit(status.ExitStatus())
		case pid == cmd.Process.Pid:
			return fmt.Errorf("the host ended: %v", status.Signal())
		}
	}
}

// host sets itself up, starts the daemon, and runs the tests; test2json's events are its output.
func host() error {
	var j job
	if err := json.Unmarshal([]byte(os.Args[1]), &j); err != nil {
		return err
	}
	if err := os.Setenv("PATH", path); err != nil {
		return err
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"mounts", func() error { return mounts(j.Build) }},
		{"files", func() error { return files(j.Dockerd) }},
		{"user", addUser},
		{"network", network},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("set up the host's %s: %w", step.what, err)
		}
	}

	stop, err := startDaemon(j.Rootless)
	if err != nil {
		return err
	}
	if err := importImages(); err != nil {
		return errors.Join(err, stop())
	}
	for _, load := range j.Hold {
		p, err := hostload.Start(load)
		if err != nil {
			return errors.Join(err, stop())
		}
		defer p.Stop()
	}
	for _, r := range j.Runs {
		if err := j.run(r); err != nil {
			return errors.Join(err, stop())
		}
	}
	return stop()
}

// mounts makes the file systems the host's own. What the machine has under a path that is about to be hidden, such as a checkout
// in /tmp, is kept by a descriptor.
func mounts(build string) error {
	kept := map[string]string{}
	for _, dir := range []string{build, "/sys/fs/cgroup"} {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%s: %w", dir, err)
		}
		defer unix.Close(fd)
		kept[dir] = fmt.Sprintf("/proc/self/fd/%d", fd)
	}
	if err := mountAll([]mount{
		// As under systemd, which sets up a real host, and as upstream's CI does it.
		{"", "/", "", unix.MS_REC | unix.MS_SHARED, ""},
		{"tmpfs", work, "tmpfs", 0, "mode=755"},
	}); err != nil {
		return err
	}
	for _, dir := range []string{"build", "etc", "etc.work"} {
		if err := os.Mkdir(filepath.Join(work, dir), 0o755); err != nil {
			return err
		}
	}
	return mountAll([]mount{
		{kept[build], work + "/build", "", unix.MS_BIND, ""},
		{"", work + "/build", "", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY, ""},
		{"tmpfs", "/run", "tmpfs", 0, "mode=755"},
		{"tmpfs", "/tmp", "tmpfs", 0, "mode=1777"},
		{"tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777"},
		{"sysfs", "/sys", "sysfs", 0, ""},
		{kept["/sys/fs/cgroup"], "/sys/fs/cgroup", "", unix.MS_BIND | unix.MS_REC, ""},
		{"overlay", "/etc", "overlay", 0, "lowerdir=/etc,upperdir=" + work + "/etc,workdir=" + work + "/etc.work"},
	})
}

type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

func mountAll(list []mount) error {
	for _, m := range list {
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// files writes what the host needs of its own.
func files(dockerd string) error {
	for _, dir := range []string{"bin", "dest/fake-home", "xdg"} {
		if err := os.MkdirAll(filepath.Join(work, dir), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Chmod(work+"/dest", 0o777); err != nil {
		return err
	}
	for name, program := range map[string]string{"dockerd": dockerd, "nc": "busybox", "ping": "busybox", "ping6": "busybox"} {
		if err := os.Symlink(work+"/build/bin/"+program, work+"/bin/"+name); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"/etc/hosts":       "127.0.0.1 localhost " + hostName + "\n::1 localhost\n" + outsideIP + " hub.docker.com\n",
		"/etc/resolv.conf": "nameserver " + outsideIP + "\n", // refuses, at once
		"/etc/sudoers":     "root ALL=(ALL:ALL) SETENV: ALL\n",
		"/etc/subuid":      "", // useradd gives sub-ids when there are these two
		"/etc/subgid":      "",
	} {
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) { // it may be a link out of /etc
			return err
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return unix.Sethostname([]byte(hostName))
}

func addUser() error {
	if err := command("useradd", "--create-home", "--home-dir", work+"/home", "--shell", "/bin/sh", account); err != nil {
		return err
	}
	return command("chown", account, work+"/xdg")
}

// network gives the host an eth0 that leads outside, which is process 1.
func network() error {
	there, err := netns.GetFromPid(1)
	if err != nil {
		return err
	}
	defer there.Close()
	out, err := netlink.NewHandleAt(there)
	if err != nil {
		return err
	}
	defer out.Close()
	eth0 := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "outside", PeerNamespace: netlink.NsFd(there)}
	if err := netlink.LinkAdd(eth0); err != nil {
		return fmt.Errorf("add eth0: %w", err)
	}
	here, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer here.Close()
	for _, end := range []struct {
		*netlink.Handle
		link, addr string
	}{{here, "lo", ""}, {here, "eth0", hostIP}, {out, "lo", ""}, {out, "outside", outsideIP}} {
		link, err := end.LinkByName(end.link)
		if err != nil {
			return fmt.Errorf("%s: %w", end.link, err)
		}
		if end.addr != "" {
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(end.addr), Mask: net.CIDRMask(24, 32)}}
			if err := end.AddrAdd(link, addr); err != nil {
				return fmt.Errorf("%s: %w", end.link, err)
			}
		}
		if err := end.LinkSetUp(link); err != nil {
			return fmt.Errorf("%s: %w", end.link, err)
		}
	}
	return here.RouteAdd(&netlink.Route{Gw: net.ParseIP(outsideIP)})
}

// environment is that of upstream's script for the daemon and for the tests.
func environment(rootless bool) []string {
	env := []string{
		"PATH=" + path,
		"HOME=" + work + "/dest/fake-home",
		"DEST=" + work + "/dest",
		"DOCKER_HOST=unix://" + socket,
		"DOCKER_GRAPHDRIVER=" + storage,
		"DOCKER_USERLANDPROXY=true",
		"DOCKER_FIREWALL_BACKEND=iptables",
		"DOCKER_MIN_API_VERSION=1.24",
		"TEST_CLIENT_BINARY=docker",
		"GOTRACEBACK=all",
		// The network driver that needs no package.
		"DOCKERD_ROOTLESS_ROOTLESSKIT_NET=gvisor-tap-vsock",
		"DOCKERD_ROOTLESS_ROOTLESSKIT_PORT_DRIVER=builtin",
	}
	if rootless {
		env = append(env, "DOCKER_ROOTLESS=1")
	}
	return env
}

// startDaemon starts the daemon that the tests find, and returns when it answers.
func startDaemon(rootless bool) (stop func() error, _ error) {
	args := []string{"dockerd"}
	if rootless {
		args = []string{
			"sudo", "-u", account, "--preserve-env", "--preserve-env=PATH",
			"XDG_RUNTIME_DIR=" + work + "/xdg", "HOME=" + work + "/home", "--", work + "/build/bin/dockerd-rootless.sh",
		}
	} else {
		args = append(args, "--data-root", work+"/root", "--config-file", os.DevNull)
	}
	args = append(args, "--debug", "--host", "unix://"+socket, "--pidfile", work+"/dest/docker.pid",
		"--storage-driver", storage, "--userland-proxy=true", "--firewall-backend=iptables")
	log, err := os.Create(work + "/dest/docker.log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = environment(rootless)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	said := func() string {
		text, err := os.ReadFile(log.Name())
		return fmt.Sprintf("%v its log:\n%s", err, text)
	}
	deadline := time.After(startWithin)
	for docker(nil, "version") != nil {
		select {
		case err := <-ended:
			return nil, fmt.Errorf("the daemon ended: %w; %s", err, said())
		case <-deadline:
			return nil, fmt.Errorf("the daemon does not answer within %v; %s", startWithin, said())
		case <-time.After(100 * time.Millisecond):
		}
	}
	return func() error {
		if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
			return fmt.Errorf("stop the daemon: %w", err)
		}
		select {
		case <-ended: // sudo's status is the signal's
			return nil
		case <-time.After(stopWithin):
			return fmt.Errorf("the daemon does not stop within %v; %s", stopWithin, said())
		}
	}, nil
}

// images are all one: a file system with busybox in it, under the names that upstream's tests know.
var images = []struct {
	name, platform, cmd string
}{
	{"busybox:latest", "linux/" + runtime.GOARCH, `["sh"]`},
	{"busybox:glibc", "linux/" + runtime.GOARCH, `["sh"]`},
	{"debian:trixie-slim", "linux/" + runtime.GOARCH, `["sh"]`},
	{"hello-world:frozen", "linux/" + runtime.GOARCH, `["echo","Hello from Docker!"]`},
	{"hello-world:amd64", "linux/amd64", `["echo","Hello from Docker!"]`},
	{"hello-world:arm64", "linux/arm64", `["echo","Hello from Docker!"]`},
	{"arm32v7/hello-world:latest", "linux/arm/v7", `["echo","Hello from Docker!"]`},
}

func importImages() error {
	layer, err := busybox(work + "/build/bin/busybox")
	if err != nil {
		return fmt.Errorf("pack busybox: %w", err)
	}
	for _, i := range images {
		if err := docker(layer, "import", "--platform", i.platform, "--change", "CMD "+i.cmd, "-", i.name); err != nil {
			return err
		}
	}
	return nil
}

// busybox packs a root file system of that program alone.
func busybox(program string) ([]byte, error) {
	data, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	applets, err := exec.Command(program, "--list").Output()
	if err != nil {
		return nil, err
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	add := func(h tar.Header, content string) {
		h.Size = int64(len(content))
		err = errors.Join(err, w.WriteHeader(&h))
		_, werr := io.WriteString(w, content)
		err = errors.Join(err, werr)
	}
	for _, dir := range []string{"bin/", "dev/", "etc/", "home/", "root/", "usr/", "usr/sbin/", "var/", "var/www/"} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}, "")
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, string(data))
	for _, name := range strings.Fields(string(applets)) {
		if name != "busybox" {
			add(tar.Header{Typeflag: tar.TypeLink, Name: "bin/" + name, Linkname: "bin/busybox", Mode: 0o755}, "")
		}
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644},
		"root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/group", Mode: 0o644},
		"root:x:0:\ndaemon:x:1:\nwheel:x:10:root\naudio:x:29:\nstaff:x:50:\nnobody:x:65534:\n")
	return archive.Bytes(), errors.Join(err, w.Close())
}

// run runs the tests. That some fail is not an error of the host's: it is in the events.
func (j job) run(r testRun) error {
	in := func(file string) string { return filepath.Join(work, "build", file) }
	cmd := exec.Command(in(j.Test2JSON), slices.Concat([]string{"-p", r.Package, in(r.Binary), "-test.v=test2json"}, r.Args)...)
	cmd.Dir = in(r.Dir)
	cmd.Env = environment(j.Rootless)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return nil
	}
	return err
}

func docker(stdin []byte, args ...string) error {
	cmd := exec.Command(work+"/build/bin/docker", args...)
	cmd.Env = environment(false)
	cmd.Stdin = bytes.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

func command(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return nil
}
