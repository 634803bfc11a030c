package doctor

import (
	"context"
	"fmt"
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
	version     string
	driver      string // RootlessKit's port driver; "" for a rootful daemon
	protos      []string
	rootlessKit string // the program, where it can be seen
	privileged  bool   // RootlessKit may bind every port
	view        bool   // dockerd sees the host's ports
	ports       map[string]string
}

func (d *Daemon) patched() bool { return strings.Contains(d.version, "+berth.") }

// serves tells whether the port driver does. Of a daemon without one, the kernel does.
func (d *Daemon) serves(network string) bool {
	return d.driver == "" || slices.Contains(d.protos, network)
}

// answerLimit is how long a daemon may take to answer.
const answerLimit = 2 * time.Second

// AskDaemon asks the daemon, and RootlessKit by its socket; nil if the daemon does not answer. rootlessKit is ""
// for a rootful one.
func AskDaemon(ctx context.Context, c *client.Client, rootlessKit string) *Daemon {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	v, err := c.ServerVersion(ctx, client.ServerVersionOptions{})
	if err != nil {
		return nil
	}
	d := &Daemon{version: v.Version, ports: map[string]string{}}
	if list, err := c.ContainerList(ctx, client.ContainerListOptions{}); err == nil {
		for _, item := range list.Items {
			for _, p := range item.Ports {
				if p.PublicPort != 0 && len(item.Names) > 0 {
					d.ports[fmt.Sprintf("%d/%s", p.PublicPort, p.Type)] = strings.TrimPrefix(item.Names[0], "/")
				}
			}
		}
	}
	if rootlessKit == "" {
		return d
	}
	r, err := rlkclient.New(rootlessKit)
	if err != nil {
		return d
	}
	defer r.Close()
	if info, err := r.Info(ctx); err == nil && info.PortDriver != nil {
		d.driver, d.protos = info.PortDriver.Driver, info.PortDriver.Protos
		d.lookAtRootlessKit(rootlessKit)
		// With --detach-netns RootlessKit keeps the child's namespace in a file, and leaves dockerd's process on the host.
		_, err := os.Stat(filepath.Join(info.StateDir, "netns"))
		d.view = err == nil
	}
	return d
}

// capNetBindService is its number (capability.h).
const capNetBindService = 10

// lookAtRootlessKit looks at the process that serves the socket, which is the one that binds.
func (d *Daemon) lookAtRootlessKit(socket string) {
	pid := server(socket)
	if pid == 0 {
		return
	}
	if p, err := procfs.NewProc(pid); err == nil {
		d.rootlessKit, _ = p.Executable()
		if s, err := p.NewStatus(); err == nil {
			d.privileged = s.CapEff&(1<<capNetBindService) != 0
		}
	}
}

// server is the process that listens on a unix socket, or 0.
func server(socket string) int {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return 0
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}
