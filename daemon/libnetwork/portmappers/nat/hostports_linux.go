package nat

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// jumpAfter is how many ports in a row may be taken before the search looks elsewhere: taken ports often
	// come in blocks.
	jumpAfter = 512
	// jumpAfterRefusals is the same for ports that are free as far as can be seen, and which the port driver
	// refuses all the same. There may be maxRefusals.
	jumpAfterRefusals = 8
	maxRefusals       = 64
)

// hostPorts is the source of the ports that are free on the host, one by one: of a user's own range in order,
// and of the dynamic range from the one on that comes after the port given last.
type hostPorts struct {
	walk
	look interface {
		find(func() int) (int, netip.Addr)
	}
	req    *request
	own    *reservations // What this daemon has on the same child address needs no look.
	cursor *atomic.Int32 // cursor is the dynamic port that was given last.

	row      int   // row is the number of taken ports in a row.
	refusals int   // refusals is the number of the driver's.
	unbound  int   // unbound is the number of ports that did not bind in the child.
	taken    error // taken is the last look that found a port taken.
}

func newHostPorts(l *look, r *request, own *reservations, cursor *atomic.Int32) (*hostPorts, error) {
	h := &hostPorts{walk: walk{first: r.first, last: r.last}, look: l, req: r, own: own, cursor: cursor}
	if r.dynamic() {
		var buf [64]byte
		text := hostSetting(portRange, buf[:])
		first, last, _ := strings.Cut(string(text), "\t")
		h.first, _ = strconv.Atoi(first)
		h.last, _ = strconv.Atoi(last)
		if h.first < 1 || h.last > 65535 || h.last < h.first {
			return nil, fmt.Errorf("%s is %q: want two ports", portRange, string(text))
		}
		h.done.parse(string(hostSetting(reservedPorts, buf[:])))
		h.at = int(cursor.Load()) + 1
	}
	if h.at < h.first || h.at > h.last {
		h.at = h.first
	}
	return h, nil
}

func (h *hostPorts) next() (first, last int, ok bool) {
	var port int
	if h.tried == 0 {
		port = h.step() // Without a look: it is free as a rule, and to look takes another thread.
	} else if h.refusals < maxRefusals || !h.req.dynamic() {
		port = h.find()
	}
	if h.row = 0; h.req.dynamic() && port != 0 {
		h.cursor.Store(int32(port))
	}
	return port, port, port != 0
}

// find looks for a port that is free on the host.
func (h *hostPorts) find() (free int) {
	h.own.each(func(p childPort) {
		for i := range h.req.addrs {
			if p == h.req.childPort(i, int(p.at.Port())) {
				h.done.add(int(p.at.Port()))
			}
		}
	})
	var addr netip.Addr
	var before, last int
	if !onHost(func() {
		free, addr = h.look.find(func() int {
			before, last = last, h.step()
			return last
		})
	}) {
		return h.step() // The port driver will see.
	}
	if addr.IsValid() {
		h.taken = &hostRefusal{addr, before, h.req.proto, listenError(h.req.proto, addr, before, unix.EADDRINUSE)}
	}
	return free
}

// step returns the next port to look at, or 0 if there are no more.
func (h *hostPorts) step() int {
	if h.row++; h.req.dynamic() && h.row > jumpAfter {
		h.row = 0
		h.jump()
	}
	return h.walk.step()
}

func (h *hostPorts) refused(_, port int) {
	limit, n := jumpAfterRefusals, &h.refusals
	if port == 0 { // The child's are not the driver's to know.
		limit, n = maxRefusals, &h.unbound
	}
	if *n++; h.req.dynamic() && *n%limit == 0 {
		h.jump()
	}
}

func (h *hostPorts) seen() (first, last, tried int, taken error) {
	return h.first, h.last, h.tried, h.taken
}
