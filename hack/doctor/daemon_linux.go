package doctor

import (
	"context"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/moby/client"
	"github.com/prometheus/procfs"
	rlkclient "github.com/rootless-containers/rootlesskit/v3/pkg/api/client"
	"golang.org/x/sys/unix"
)

// Daemon is the one that is to publish.
type Daemon struct {
	version     string // "" where RootlessKit is silent: dockerd asks it for its version, too
	driver      string // RootlessKit's port driver; "" for a rootful daemon
	protos      []string
	rootlessKit string // the program, where it can be seen
	privileged  bool   // RootlessKit may bind every port
	silent      bool   // RootlessKit does not answer
	files       int    // RootlessKit's descriptors, of maxFiles; both 0 where that can't be seen
	maxFiles    int
	view        bool // dockerd sees the host's ports
	ports       map[string]string
}

func (d *Daemon) patched() bool { return strings.Contains(d.version, "+berth.") }

// serves tells whether the port driver does. Of a daemon without one, the kernel does.
func (d *Daemon) serves(network string) bool {
	return d.driver == "" || slices.Contains(d.protos, network)
}

// bindsItself tells whether it is RootlessKit's process that binds the ports, as it is of these drivers, and not another program.
func (d *Daemon) bindsItself() bool { return d.driver == "builtin" || d.driver == "gvisor-tap-vsock" }

// answerLimit is how long RootlessKit may take to answer, and then a daemon.
const answerLimit = 2 * time.Second

// AskDaemon asks the daemon, and RootlessKit by its socket; nil if the daemon does not answer. rootlessKit is ""
// for a rootful one.
func AskDaemon(ctx context.Context, c *client.Client, rootlessKit string) *Daemon {
	d := &Daemon{ports: map[string]string{}}
	if rootlessKit != "" {
		d.askRootlessKit(ctx, rootlessKit)
	}
	if d.silent {
		return d
	}
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	v, err := c.ServerVersion(ctx, client.ServerVersionOptions{})
	if err != nil {
		return nil
	}
	d.version = v.Version
	if list, err := c.ContainerList(ctx, client.ContainerListOptions{}); err == nil {
		for _, item := range list.Items {
			for _, p := range item.Ports {
				if p.PublicPort != 0 && len(item.Names) > 0 {
					d.ports[fmt.Sprintf("%d/%s", p.PublicPort, p.Type)] = strings.TrimPrefix(item.Names[0], "/")
				}
			}
		}
	}
	return d
}

// askRootlessKit asks the one that serves the socket, if there is any.
func (d *Daemon) askRootlessKit(ctx context.Context, socket string) {
	pid, ok := server(socket)
	if !ok {
		return
	}
	d.lookAtRootlessKit(pid)
	r, err := rlkclient.New(socket)
	if err != nil {
		return
	}
	defer r.Close()
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	info, err := r.Info(ctx)
	if err != nil {
		d.silent = true
		return
	}
	if info.PortDriver != nil {
		d.driver, d.protos = info.PortDriver.Driver, info.PortDriver.Protos
		// With --detach-netns RootlessKit keeps the child's namespace in a file, and leaves dockerd's process on the host.
		_, err := os.Stat(filepath.Join(info.StateDir, "netns"))
		d.view = err == nil
	}
}

// capNetBindService is its number (capability.h).
const capNetBindService = 10

// lookAtRootlessKit looks at its process, as far as this user may.
func (d *Daemon) lookAtRootlessKit(pid int) {
	if p, err := procfs.NewProc(pid); err == nil {
		files, err1 := p.FileDescriptorsLen()
		limits, err2 := p.Limits()
		if err1 == nil && err2 == nil {
			d.files, d.maxFiles = files, int(min(limits.OpenFiles, math.MaxInt32))
		}
		d.rootlessKit, _ = p.Executable()
		if s, err := p.NewStatus(); err == nil {
			d.privileged = s.CapEff&(1<<capNetBindService) != 0
		}
	}
}

// server is the process that listens on a unix socket, if any; 0 where that can't be seen.
func server(socket string) (pid int, ok bool) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return 0, false
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, true
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid, true
}
