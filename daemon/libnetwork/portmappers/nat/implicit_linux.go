package nat

import (
	"bytes"
	"fmt"
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
	onHost(func() {
		for _, addr := range v.addrs {
			fd, err := v.socket(addr)
			if err != nil {
				continue
			}
			if unix.Bind(fd, sockaddr(addr, port)) != nil {
				unix.Close(fd)
				continue
			}
			time.AfterFunc(pastaDelay, func() { unix.Close(fd) })
		}
	})
}

// ownPorts has the host ports that are bound by this daemon's pasta, or may
// still be: for TCP and UDP alike, since pasta takes the UDP port for every TCP
// port. A look can't tell them from a stranger's.
var ownPorts = ownPortSet{ports: map[int]ownPort{}}

type ownPortSet struct {
	mu    sync.Mutex
	ports map[int]ownPort
}

type ownPort struct {
	bindings int
	until    time.Time // until is when it ends to be ours, without bindings.
}

// add notes n more bindings of port.
func (o *ownPortSet) add(port, n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for p := range o.ports {
		if !o.own(p) {
			delete(o.ports, p)
		}
	}
	o.ports[port] = ownPort{bindings: o.ports[port].bindings + n}
}

// remove notes the end of one binding of port, if it is one of ours.
func (o *ownPortSet) remove(port int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if p := o.ports[port]; p.bindings > 0 {
		o.ports[port] = ownPort{bindings: p.bindings - 1, until: time.Now().Add(pastaLag)}
	}
}

// has tells whether port is ours.
func (o *ownPortSet) has(port int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.own(port)
}

func (o *ownPortSet) own(port int) bool {
	p, ok := o.ports[port]
	return ok && (p.bindings > 0 || time.Now().Before(p.until))
}
