package nat

import (
	"math/rand/v2"
	"os"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
)

const (
	// inOrder is how many ports of the dynamic range are tried one after the other, as people know it, before
	// the search jumps: taken ports often come in blocks. It jumps sooner if they have taken inOrderTime.
	inOrder     = 8
	inOrderTime = 250 * time.Millisecond
)

// allocatorPorts is the source of the ports in the allocator's order: of a user's own range to its end, of
// the dynamic range until it jumps.
type allocatorPorts struct {
	req         *request
	first, last int
	start       time.Time
	tried       int
	over        bool     // over is set when the allocator has no more.
	held        []uint16 // held has the ports that were refused by the driver.
	left        []uint16 // left has the ports to choose from, once it jumps.
}

// newAllocatorPorts takes the allocator's own range from where upstream tells it, though for tests only.
func newAllocatorPorts(r *request) *allocatorPorts {
	s := &allocatorPorts{req: r, first: r.first, last: r.last, start: time.Now()}
	if r.dynamic() {
		first, last := portallocator.GetPortRange()
		s.first, s.last = int(first), int(last)
	}
	return s
}

func (s *allocatorPorts) next() (first, last int, ok bool) {
	if s.left == nil {
		if s.over || s.tried > max(s.last-s.first, 0) {
			return 0, 0, false
		}
		if !s.req.dynamic() || s.tried == 0 || s.tried < inOrder && time.Since(s.start) < inOrderTime {
			return s.req.first, s.req.last, true
		}
		s.jump()
	}
	if len(s.left) == 0 {
		return 0, 0, false
	}
	i, n := rand.N(len(s.left)), len(s.left)-1
	port := int(s.left[i])
	s.left[i], s.left = s.left[n], s.left[:n]
	return port, port, true
}

// jump collects what is left: without the ports that the kernel reserves, which the allocator leaves out of
// the range, but not one by one.
func (s *allocatorPorts) jump() {
	text, _ := os.ReadFile(reservedPorts)
	var out portSet
	out.parse(string(text))
	for _, port := range s.held {
		out.add(int(port))
	}
	s.left = make([]uint16, 0, s.last-s.first+1)
	for port := s.first; port <= s.last; port++ {
		if !out.has(port) {
			s.left = append(s.left, uint16(port))
		}
	}
}

func (s *allocatorPorts) refused(n, port int) {
	if s.over = n < 0; !s.over {
		s.tried += n
	}
	if s.left == nil && port != 0 {
		s.held = append(s.held, uint16(port))
	}
}

func (s *allocatorPorts) seen() (first, last, tried int, taken error) {
	return s.first, s.last, min(s.tried, s.last-s.first+1), nil
}
