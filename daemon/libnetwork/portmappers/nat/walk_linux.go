package nat

import (
	"math/rand/v2"
	"strings"

	ports "github.com/docker/go-connections/nat"
)

// walk goes through the ports of a range, each of them once.
type walk struct {
	first, last int
	at          int     // at is the next port, unless it is done.
	done        portSet // done has the ports that were passed, or are not to be used.
	tried       int     // tried is the number of those that were passed.
}

// step returns the next port, or 0 if there are no more.
func (w *walk) step() int {
	for range w.last - w.first + 1 {
		port := w.at
		if w.at++; w.at > w.last {
			w.at = w.first
		}
		if !w.done.has(port) {
			w.done.add(port)
			w.tried++
			return port
		}
	}
	return 0
}

// jump goes on at any other place, of those that aren't done if it can: they come in blocks, and each of one
// leads to the port after it.
func (w *walk) jump() {
	for range 64 {
		if w.at = w.first + rand.N(w.last-w.first+1); !w.done.has(w.at) {
			return
		}
	}
}

// portSet has a bit for each port.
type portSet [65536 / 64]uint64

func (s *portSet) has(port int) bool { return s[port/64]&(1<<(port%64)) != 0 }

func (s *portSet) add(port int) { s[port/64] |= 1 << (port % 64) }

// parse adds "8080,9000-9010" to the set. What can't be understood is left out.
func (s *portSet) parse(text string) {
	for part := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == ',' || r == '\n' }) {
		first, last, err := ports.ParsePortRange(part)
		for ; err == nil && first <= last; first++ {
			s.add(int(first))
		}
	}
}
