package nat

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"golang.org/x/sys/unix"
)

// pastaLag is how long pasta may keep a port after the child has let go of it: up to 0.8 s were seen.
const pastaLag = 3 * time.Second

// pasta stands in for RootlessKit's port driver "implicit". Nobody asks that one for a port: pasta watches
// the child namespace and binds on the host what is bound there, 0.7 s later, on the wildcard address. If it
// can't, since another process has the port, it says so to nobody, and the container's traffic goes to a
// stranger. So a port is looked at first, and kept for pasta.
type pasta struct {
	mu  sync.Mutex
	own map[ownPort]ownBindings
}

type ownPort struct {
	proto types.Protocol
	port  int
}

// ownBindings is what this daemon has of a host port.
type ownBindings struct {
	n     int
	until time.Time // until is when pasta has let go of the port, once n is 0.
}

func (b ownBindings) over() bool { return b.n == 0 && !time.Now().Before(b.until) }

// pastaAddrs are the addresses that pasta may bind, whatever the user asks for.
func pastaAddrs() []address {
	addrs := []address{{host: netip.IPv4Unspecified()}, {host: netip.IPv6Unspecified()}}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
		return addrs[:1]
	}
	return addrs
}

// portDriverIsImplicit tells whether RootlessKit's port driver is "implicit". Its API doesn't tell it from
// "none", which publishes nothing on the host; the command line does. RootlessKit is this process's parent.
func portDriverIsImplicit() bool {
	cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", os.Getppid()))
	return isImplicit(string(cmdline))
}

func isImplicit(cmdline string) bool {
	return strings.Contains(cmdline, "\x00--port-driver=implicit\x00") || strings.Contains(cmdline, "\x00--port-driver\x00implicit\x00")
}

// pastaClient is the driver for one request.
type pastaClient struct {
	*pasta
	fixed bool
	// insist is for a port that the user named: one counts as free, too, that pasta will get all the same,
	// since it is this daemon's own, or has connections that were served.
	insist bool

	socks []int // socks are shared by the host addresses of the request.
	users int
}

func (c *pastaClient) ChildHostIP(_ string, hostIP netip.Addr) netip.Addr { return hostIP }

// AddPort keeps the port on the host, for pasta. It fails open, where the host can't be looked at.
func (c *pastaClient) AddPort(_ context.Context, proto string, _, _ netip.Addr, port int) (func() error, error) {
	p := ownPort{types.ParseProtocol(proto), port}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.users == 0 {
		var err error
		onHost(func() { err = c.keep(p) })
		if err != nil {
			c.letGo()
			return nil, err
		}
	}
	c.users++
	maps.DeleteFunc(c.own, func(_ ownPort, b ownBindings) bool { return b.over() })
	c.own[p] = ownBindings{n: c.own[p].n + 1}
	removed := false
	return func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if removed {
			return errRemoved
		}
		removed = true
		c.own[p] = ownBindings{n: c.own[p].n - 1, until: time.Now().Add(pastaLag)}
		if c.users--; c.users == 0 {
			c.letGo()
		}
		return nil
	}, nil
}

// letGo ends what is kept.
func (c *pastaClient) letGo() {
	for _, fd := range c.socks {
		unix.Close(fd)
	}
	c.socks = nil
}

// keep binds p's port on all that pasta may bind, or returns why it can't. It is called on the host.
func (c *pastaClient) keep(p ownPort) error {
	mine := c.own[p].n > 0
	if mine && !c.fixed { // pasta has one for all host addresses.
		return listenError(p.proto, netip.IPv4Unspecified(), p.port, unix.EADDRINUSE)
	}
	// Other daemons of Berth's are told that p is published, also those that insist on it: to them, what is
	// kept for pasta is free. The name is one of the host's network namespace, and the kernel's to give back.
	if !mine {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		c.socks = append(c.socks, fd)
		name := fmt.Sprintf("@berth-published-%s-%d", p.proto, p.port)
		if err = unix.Bind(fd, &unix.SockaddrUnix{Name: name}); err != nil {
			return listenError(p.proto, netip.IPv4Unspecified(), p.port, err)
		}
	}
	// pasta takes the UDP port for every TCP port, too.
	own := !c.own[ownPort{types.TCP, p.port}].over() || !c.own[ownPort{types.UDP, p.port}].over()
	for _, a := range pastaAddrs() {
		if err := c.keepAt(p, a.host); err != nil && !(c.insist && own && errors.Is(err, unix.EADDRINUSE)) {
			return err
		}
	}
	return nil
}

// keepAt binds a socket that is in everybody's way but pasta's, which sets SO_REUSEADDR and comes later. One
// that is bound without SO_REUSEADDR finds other daemons' kept ports taken; but a connection that was served
// keeps that off for a minute, where pasta could listen: then, if it is to insist, it is bound as pasta does,
// for TCP. A UDP socket that is bound after pasta's would take its datagrams.
func (c *pastaClient) keepAt(p ownPort, addr netip.Addr) error {
	fd, err := socket(p.proto, addr, false)
	if err != nil {
		return err
	}
	c.socks = append(c.socks, fd) // Where it isn't bound, it does no harm.
	err = bind(fd, p.proto, addr, p.port, false)
	again := err != nil && c.insist && p.proto == types.TCP
	if again {
		err = (&look{proto: p.proto}).refusal(addr, p.port)
	}
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil && again {
		err = bind(fd, p.proto, addr, p.port, false) // A failed bind left the socket as it was.
	}
	return err
}
