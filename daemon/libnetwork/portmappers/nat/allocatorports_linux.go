package nat

import (
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
	walk
	req   *request
	look  look // look is where the allocator binds. Without addresses, nothing is looked at.
	start time.Time
	over  bool // over is set when the allocator has no more.
	jumps bool
}

// newAllocatorPorts takes the allocator's own range from where upstream tells it, though for tests only.
func newAllocatorPorts(r *request) *allocatorPorts {
	s := &allocatorPorts{req: r, walk: walk{first: r.first, last: r.last}, start: time.Now()}
	if r.dynamic() {
		first, last := portallocator.GetPortRange()
		s.first, s.last = int(first), int(last)
	}
	return s
}

func (s *allocatorPorts) next() (first, last int, ok bool) {
	switch {
	case s.jumps:
	case s.over || s.tried > max(s.last-s.first, 0):
		return 0, 0, false
	case !s.req.dynamic() || s.tried == 0 || s.tried < inOrder && time.Since(s.start) < inOrderTime:
		return s.req.first, s.req.last, true
	default:
		s.jumps = true
		// What the kernel reserves, the allocator leaves out of the range, but not one by one.
		if f, err := os.Open(reservedPorts); err == nil {
			s.done.parse(string(readSetting(int(f.Fd()), make([]byte, 1024))))
			f.Close()
		}
	}
	s.jump()
	port, _ := s.look.find(s.step)
	return port, port, port != 0
}

func (s *allocatorPorts) refused(n, port int) {
	if s.over = n < 0; !s.over && !s.jumps {
		s.tried += n
	}
	s.done.add(port) // 0 is none.
}

func (s *allocatorPorts) seen() (first, last, tried int, taken error) {
	return s.first, s.last, min(s.tried, s.last-s.first+1), nil
}
