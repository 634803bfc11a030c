package nat

import (
	"math/rand/v2"
	"os"
	"slices"
	"time"
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

func newAllocatorPorts(r *request) *allocatorPorts {
	s := &allocatorPorts{req: r, start: time.Now()}
	s.first, s.last = r.ports()
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
	var reserved portSet
	text, _ := os.ReadFile(reservedPorts)
	reserved.parse(string(text))
	s.left = make([]uint16, 0, s.last-s.first+1)
	for port := s.first; port <= s.last; port++ {
		if !reserved.has(port) && !slices.Contains(s.held, uint16(port)) {
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

func (s *allocatorPorts) seen() (int, error) { return min(s.tried, s.last-s.first+1), nil }

func (s *allocatorPorts) ports() (first, last int) { return s.first, s.last }
