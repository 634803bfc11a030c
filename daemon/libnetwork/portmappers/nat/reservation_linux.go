package nat

import (
	"context"
	"net"
	"os"
	"sync"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
)

// reservations knows who still needs a child port that the allocator has reserved: bindings, some of which
// share one, and calls to RootlessKit that are not settled. Whoever leaves last, or has not joined, ends the
// reservation.
type reservations struct {
	allocator interface { // It reserves a port, and binds it.
		RequestPortsInRange(ips []net.IP, proto types.Protocol, first, last int) (port int, socks []*os.File, err error)
	}
	mu    sync.Mutex
	parts map[childPort]int
	late  map[*unsettled]childPort
	vain  bool // vain is set once one of late was waited for in vain, until one is settled.
}

func newReservations() *reservations {
	return &reservations{allocator: portallocator.NewOSAllocator(), parts: map[childPort]int{}, late: map[*unsettled]childPort{}}
}

// join takes part in the reservation of p, which the caller made or has joined.
func (r *reservations) join(p childPort) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.parts[p]++
}

// leave ends one part in the reservation of p: now or, where the call that should have freed it on the host
// is unsettled, when that is settled.
func (r *reservations) leave(p childPort, u *unsettled) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if u == nil {
		r.end(p)
	} else if u.settled != nil { // Else it stays: nobody will know.
		r.late[u] = p
		go func() {
			<-u.settled
			r.settle(u)
		}()
	}
}

// settle ends the part of a call that is settled, once.
func (r *reservations) settle(u *unsettled) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.vain = false
	if p, ok := r.late[u]; ok {
		delete(r.late, u)
		r.end(p)
	}
}

// end ends one part. Whoever calls it holds mu, so that wait sees a call as settled with its reservation ended.
func (r *reservations) end(p childPort) {
	if r.parts[p]--; r.parts[p] > 0 {
		return
	}
	delete(r.parts, p)
	portallocator.Get().ReleasePort(p.at.Addr().AsSlice(), p.proto.String(), int(p.at.Port()))
}

// each calls f with each child port that this daemon has.
func (r *reservations) each(f func(childPort)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for p := range r.parts {
		f(p)
	}
}

// wait waits until nothing of a fixed port is unsettled: so that a container which is restarted while
// RootlessKit stalls comes back. It waits for as long as for an answer, and in vain only once a silence: the
// daemon's lock is held.
func (r *reservations) wait(ctx context.Context, req *request) {
	var timeout <-chan time.Time
	for u := r.lateOf(req); u != nil; u = r.lateOf(req) {
		if timeout == nil {
			timeout = time.After(patience)
		}
		select {
		case <-u.settled:
			r.settle(u)
		case <-ctx.Done():
			return
		case <-timeout:
			r.mu.Lock()
			defer r.mu.Unlock()
			_, r.vain = r.late[u]
			return
		}
	}
}

// lateOf returns a call that has a child port of the fixed one and isn't settled.
func (r *reservations) lateOf(req *request) *unsettled {
	r.mu.Lock()
	defer r.mu.Unlock()
	for u, p := range r.late {
		for i := range req.addrs {
			if !r.vain && p == req.childPort(i, req.first) {
				return u
			}
		}
	}
	return nil
}
