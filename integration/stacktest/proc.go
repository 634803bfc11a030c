package stacktest

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/procfs"
	"github.com/rootless-containers/rootlesskit/v3/pkg/api/client"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"

	"berth/hack/stack"
)

// Socket is one that can be reached from elsewhere: it listens for TCP, or is of UDP.
type Socket struct {
	Network string // "tcp", "tcp6", "udp" or "udp6"
	At      netip.AddrPort
	UID     int
	inode   uint32
}

func (s Socket) String() string { return s.Network + " " + s.At.String() }

// Sockets lists those in our network namespace.
func Sockets(t testing.TB) (list []Socket) {
	t.Helper()
	for _, dump := range []struct {
		network string
		family  uint8
		diag    func(uint8) ([]*netlink.Socket, error)
	}{
		{"tcp", unix.AF_INET, netlink.SocketDiagTCP},
		{"tcp6", unix.AF_INET6, netlink.SocketDiagTCP},
		{"udp", unix.AF_INET, netlink.SocketDiagUDP},
		{"udp6", unix.AF_INET6, netlink.SocketDiagUDP},
	} {
		sockets, err := dump.diag(dump.family)
		assert.NilError(t, err)
		for _, s := range sockets {
			const listen = 0x0A // include/net/tcp_states.h
			if dump.network[:3] == "tcp" && s.State != listen {
				continue
			}
			addr, ok := netip.AddrFromSlice(s.ID.Source)
			assert.Assert(t, ok, "%v", s.ID.Source)
			if dump.family == unix.AF_INET {
				addr = addr.Unmap()
			}
			list = append(list, Socket{dump.network, netip.AddrPortFrom(addr, s.ID.SourcePort), int(s.UID), s.INode})
		}
	}
	return list
}

// SocketsOf is [Sockets] of the process alone.
func SocketsOf(t testing.TB, pid int) (list []Socket) {
	t.Helper()
	own := map[string]bool{}
	for _, to := range Descriptors(t, pid) {
		own[to] = true
	}
	for _, s := range Sockets(t) {
		if own[fmt.Sprintf("socket:[%d]", s.inode)] {
			list = append(list, s)
		}
	}
	return list
}

// Exposed is what the stack's RootlessKit says it forwards.
func Exposed(t testing.TB, s *stack.Stack) []port.Status {
	t.Helper()
	c, err := client.New(s.RootlessKitSocket())
	assert.NilError(t, err)
	defer c.Close()
	list, err := c.PortManager().ListPorts(t.Context())
	assert.NilError(t, err)
	return list
}

// Descriptors has where the descriptors of a process lead to.
func Descriptors(t testing.TB, pid int) []string {
	t.Helper()
	p, err := procfs.NewProc(pid)
	assert.NilError(t, err)
	to, err := p.FileDescriptorTargets()
	assert.NilError(t, err)
	assert.Assert(t, len(to) > 0, "the descriptors of process %d cannot be seen", pid)
	return to
}

// LogLine is what a dockerd has said.
type LogLine struct {
	Level    string        `json:"level"`
	Message  string        `json:"msg"`
	Error    string        `json:"error"`
	Attempts int           `json:"attempts"`
	Duration time.Duration `json:"duration"`

	HostIP string `json:"hostIP"`
	Port   int    `json:"port"`
	Proto  string `json:"proto"`
}

// HostPort is the host port that the line is about, such as "[::1]:8080/tcp".
func (l LogLine) HostPort() string {
	return net.JoinHostPort(l.HostIP, fmt.Sprint(l.Port)) + "/" + l.Proto
}

// IsLost tells whether the line is the one that names a host port which RootlessKit may hold though nobody knows.
func (l LogLine) IsLost() bool {
	return l.Level == "warning" && strings.HasPrefix(l.Message, "RootlessKit's answer was lost")
}

// ReadLog returns what the daemon has said since its log was as long as from.
func (d *Daemon) ReadLog(t testing.TB, from int64) (said []LogLine) {
	t.Helper()
	f, err := os.Open(d.Log)
	assert.NilError(t, err)
	defer f.Close()
	_, err = f.Seek(from, io.SeekStart)
	assert.NilError(t, err)
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		// RootlessKit and others write there, too, and other lines of dockerd have fields of these names that are something else.
		var l LogLine
		_ = json.Unmarshal(lines.Bytes(), &l)
		if l.Message != "" {
			said = append(said, l)
		}
	}
	assert.NilError(t, lines.Err())
	return said
}
