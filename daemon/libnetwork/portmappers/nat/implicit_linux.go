package nat

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"golang.org/x/sys/unix"
)

// With RootlessKit's port driver "implicit", nobody is asked for a host port:
// pasta watches the child namespace, and binds on the host what is bound there,
// on the wildcard address. If it can't, since another process has the port, it
// says so to nobody: the container's traffic goes to a stranger. So, where the
// host can be seen, such a port is looked at first: for both families, since
// the daemon reports it for both.

// pastaDelay is how long pasta may take to bind a port: up to 0.7 s were seen.
const pastaDelay = 2 * time.Second

// pastaLag is how long pasta may keep a port after the child has let go of it:
// up to 0.8 s were seen.
const pastaLag = 3 * time.Second

// portDriverIsImplicit tells whether RootlessKit's port driver is "implicit".
// Its API doesn't tell it from "none", which publishes nothing on the host; the
// command line does. RootlessKit is this process's parent.
var portDriverIsImplicit = sync.OnceValue(func() bool {
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", os.Getppid()))
	return err == nil && isImplicit(cmdline)
})

func isImplicit(cmdline []byte) bool {
	args := bytes.Split(cmdline, []byte{0})
	return slices.ContainsFunc(args, func(arg []byte) bool { return string(arg) == "--port-driver=implicit" }) ||
		bytes.Contains(cmdline, []byte("\x00--port-driver\x00implicit\x00"))
}

// keepForPasta keeps the kernel from choosing port for another process (bind to
// port 0, connect) before pasta has bound it, for TCP: a socket that is bound
// with SO_REUSEADDR and does not listen is in the way of those, not of pasta's.
// A process that names the port can still have it.
func (v *hostView) keepForPasta(port int) {
	if v.proto != types.TCP {
		return
	}
	for _, addr := range v.addrs {
		fd, err := v.socket(addr)
		if err != nil {
			continue
		}
		sa, setPort := sockaddr(addr)
		setPort(port)
		if unix.Bind(fd, sa) != nil {
			unix.Close(fd)
			continue
		}
		time.AfterFunc(pastaDelay, func() { unix.Close(fd) })
	}
}

// ownPorts has the host ports that are bound by this daemon's pasta, or may
// still be. A look can't tell them from a stranger's.
var ownPorts = ownPortSet{ports: map[ownPort]ownBindings{}}

type ownPortSet struct {
	mu    sync.Mutex
	ports map[ownPort]ownBindings
}

type ownPort struct {
	proto types.Protocol
	port  int
}

type ownBindings struct {
	n     int
	until time.Time // until is when pasta has let go of the port, without bindings.
}

func (b ownBindings) over() bool { return b.n == 0 && !time.Now().Before(b.until) }

// add notes n more bindings of port.
func (o *ownPortSet) add(proto types.Protocol, port, n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	maps.DeleteFunc(o.ports, func(_ ownPort, b ownBindings) bool { return b.over() })
	p := ownPort{proto, port}
	o.ports[p] = ownBindings{n: o.ports[p].n + n}
}

// remove notes the end of one binding of port, if it is one of ours.
func (o *ownPortSet) remove(proto types.Protocol, port int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p := ownPort{proto, port}
	if b := o.ports[p]; b.n > 0 {
		o.ports[p] = ownBindings{n: b.n - 1, until: time.Now().Add(pastaLag)}
	}
}

// has tells whether port is ours, for TCP and UDP alike: pasta takes the UDP
// port for every TCP port.
func (o *ownPortSet) has(port int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return !o.ports[ownPort{types.TCP, port}].over() || !o.ports[ownPort{types.UDP, port}].over()
}
