package nat

import (
	"context"
	"sync"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
)

// reservations knows who still needs a child port that the allocator has
// reserved: bindings, some of which share one, and calls to RootlessKit that are
// not settled. Whoever leaves last ends the reservation. A nil one doesn't
// share: the reservation ends with whoever leaves first.
type reservations struct {
	mu        sync.Mutex
	joined    map[childPort]int
	unsettled map[childPort]chan struct{} // Closed once their calls are settled.
	vain      bool                        // vain is set once one was waited for in vain, until one is settled.
}

func newReservations() *reservations {
	return &reservations{joined: map[childPort]int{}, unsettled: map[childPort]chan struct{}{}}
}

// join takes part in the reservation of p, which the caller made or has joined.
func (r *reservations) join(p childPort) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.joined[p]++
}

// leave ends one part in the reservation of p: now or, where the call that
// should have freed it on the host is unsettled, when that is settled.
func (r *reservations) leave(p childPort, u *unsettled) {
	switch {
	case u == nil || r == nil:
		r.end(p)
	case u.settled != nil: // Else it stays: nobody will know.
		ended := make(chan struct{})
		r.mu.Lock()
		before := r.unsettled[p]
		r.unsettled[p] = ended
		r.mu.Unlock()
		go func() {
			<-u.settled
			r.end(p)
			if before != nil { // Of another host address at the same child port.
				<-before
			}
			r.mu.Lock()
			r.vain = false
			if r.unsettled[p] == ended {
				delete(r.unsettled, p)
			}
			r.mu.Unlock()
			close(ended)
		}()
	}
}

func (r *reservations) end(p childPort) {
	if r != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.joined[p] > 1 {
			r.joined[p]--
			return
		}
		delete(r.joined, p)
	}
	portallocator.Get().ReleasePort(p.at.Addr().AsSlice(), p.proto.String(), int(p.at.Port()))
}

// ports returns the ports that this daemon has, on any child address.
func (r *reservations) ports(proto types.Protocol) *portSet {
	own := new(portSet)
	if r == nil {
		return own
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for p := range r.joined {
		if p.proto == proto {
			own.add(int(p.at.Port()))
		}
	}
	return own
}

// wait waits until nothing of a fixed port is unsettled: so that a
// container which is restarted while RootlessKit stalls comes back. It waits for
// as long as for an answer, and in vain only once a silence: the daemon's lock
// is held meanwhile.
func (r *reservations) wait(ctx context.Context, req *request) {
	if r == nil {
		return
	}
	var timeout <-chan time.Time
	for i := range req.hosts {
		p := req.childPort(i, req.first)
		r.mu.Lock()
		ended, vain := r.unsettled[p], r.vain
		r.mu.Unlock()
		if ended == nil || vain {
			continue
		}
		if timeout == nil {
			timeout = time.After(patience)
		}
		select {
		case <-ended:
		case <-ctx.Done():
			return
		case <-timeout:
			r.mu.Lock()
			r.vain = r.unsettled[p] != nil
			r.mu.Unlock()
			return
		}
	}
}
