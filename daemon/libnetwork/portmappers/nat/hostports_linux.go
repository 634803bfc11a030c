package nat

import (
	"math/rand/v2"
	"sync/atomic"
)

const (
	// jumpAfter is how many ports in a row may be taken before the search looks
	// elsewhere: taken ports often come in blocks.
	jumpAfter = 512
	// jumpAfterRefusals is the same for ports that are free as far as can be seen,
	// and which the port driver refuses all the same.
	jumpAfterRefusals = 8
	// maxRefusals is how many of those there may be.
	maxRefusals = 64
)

// hostPorts is the source of the ports that are free on the host, one by one:
// of a user's own range in order, and of the dynamic range from the one on that
// comes after the port given last.
type hostPorts struct {
	look        look
	first, last int
	dynamic     bool
	cursor      *atomic.Int32 // cursor is the dynamic port that was given last.

	at       int      // at is the next port to look at.
	done     *portSet // done has the ports that were given, or taken, or are not to be used.
	tried    int      // tried is the number of ports looked at, or given.
	row      int      // row is the number of taken ports in a row.
	refusals int
}

func newHostPorts(l look, r *request, cursor *atomic.Int32) (*hostPorts, error) {
	h := &hostPorts{look: l, first: r.first, last: r.last, dynamic: r.dynamic(), cursor: cursor}
	if h.dynamic {
		var err error
		if h.first, h.last, h.done, err = hostDynamicPorts(); err != nil {
			return nil, err
		}
		h.at = int(cursor.Load()) + 1
	}
	if h.at < h.first || h.at > h.last {
		h.at = h.first
	}
	return h, nil
}

func (h *hostPorts) next() (first, last int, ok bool) {
	port := 0
	switch {
	case h.refusals >= maxRefusals:
	case h.tried == 0:
		// Without a look: it is free as a rule, and to look takes another thread.
		port = h.step()
	case !onHost(func() { port = h.look.find(h.step) }):
		port = h.step() // The port driver will see.
	}
	if port == 0 {
		return 0, 0, false
	}
	h.row = 0
	if h.dynamic {
		h.cursor.Store(int32(port))
	}
	return port, port, true
}

// step returns the next port to look at, or 0 if there are no more.
func (h *hostPorts) step() int {
	if h.row++; h.dynamic && h.row > jumpAfter {
		h.jump()
	}
	for range h.last - h.first + 1 {
		port := h.at
		if h.at++; h.at > h.last {
			h.at = h.first
		}
		if !h.done.has(port) {
			if h.done == nil {
				h.done = new(portSet)
			}
			h.done.add(port)
			h.tried++
			return port
		}
	}
	return 0
}

// jump goes on at any other place.
func (h *hostPorts) jump() {
	h.row, h.at = 0, h.first+rand.N(h.last-h.first+1)
}

func (h *hostPorts) refused(_, port int) {
	if port == 0 || !h.dynamic { // The child's are not the driver's to know.
		return
	}
	if h.refusals++; h.refusals%jumpAfterRefusals == 0 {
		h.jump()
	}
}

func (h *hostPorts) count() int { return h.tried }

func (h *hostPorts) ports() (first, last int) { return h.first, h.last }
