package nat

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"

	"github.com/containerd/log"
	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
)

// attempt is one allocate-and-bind in the child namespace, followed by one
// request per host address to the port driver.
type attempt struct {
	req    *request
	leases *reservations
	port   int
	socks  []*os.File // by child address, as req.binds has them
	ends   []end      // by host address
}

// end is what a host address has of an attempt.
type end struct {
	remove      func() error
	unsupported bool
	unsettled   *unsettled
}

// try makes an attempt at a port in [first, last]. What it did is undone when
// it fails, but a port that the driver refused stays reserved until it is let go
// of: then both the attempt and the error are returned.
func try(ctx context.Context, r *request, driver PortDriverClient, leases *reservations, first, last int) (*attempt, error) {
	port, socks, err := portallocator.NewOSAllocator().RequestPortsInRange(r.binds, r.proto, first, last)
	if err != nil {
		return nil, &childRefusal{first: first, err: err}
	}
	a := &attempt{req: r, leases: leases, port: port, socks: socks, ends: make([]end, len(r.hosts))}
	for i := range r.hosts {
		leases.join(a.req.childPort(i, a.port))
	}
	if driver == nil {
		return a, nil
	}
	if err := a.publish(ctx, driver); err != nil {
		a.undo(ctx)
		return a, err
	}
	return a, nil
}

// publish has the driver expose the port on the host, address by address.
func (a *attempt) publish(ctx context.Context, driver PortDriverClient) error {
	// An outcome that isn't known can't be undone: see each request through.
	callCtx := ctx
	if ctx.Done() != nil {
		callCtx = context.WithoutCancel(ctx)
	}
	served := len(a.ends)
	for i, host := range a.req.hosts {
		if err := ctx.Err(); err != nil {
			return err
		}
		e := &a.ends[i]
		var err error
		if e.remove, err = driver.AddPort(callCtx, a.req.proto.String(), host, a.req.children[i], a.port); err == nil {
			continue
		}
		if isUnsupported(err) {
			log.G(ctx).WithFields(log.Fields{"error": err}).Warnf("discarding request for %q", netip.AddrPortFrom(host, uint16(a.port)))
			e.unsupported = true
			if served--; served > 0 {
				continue
			}
		}
		if !errors.As(err, &e.unsettled) && isLost(err) && a.shared(i) {
			e.unsettled = &unsettled{err: err} // RootlessKit wouldn't tell that it has it.
		}
		return &hostRefusal{host: host, port: a.port, proto: a.req.proto, err: err}
	}
	return ctx.Err()
}

// shared tells whether other host addresses have the child address of the i-th
// one: RootlessKit could have the port on each of them.
func (a *attempt) shared(i int) bool {
	child := a.req.children[i]
	return !a.req.hosts[i].IsUnspecified() && !(child.Is4() && child.IsLoopback())
}

// undo closes the child's sockets and undoes what the driver did.
func (a *attempt) undo(ctx context.Context) {
	for _, sock := range a.socks {
		if err := sock.Close(); err != nil {
			log.G(ctx).WithFields(log.Fields{"port": a.port, "error": err}).Warn("Failed to close a socket in the child namespace")
		}
	}
	for i := range a.ends {
		if e := &a.ends[i]; e.remove != nil {
			if err := e.remove(); err != nil && !errors.As(err, &e.unsettled) {
				log.G(ctx).WithFields(log.Fields{"error": err}).Warn("A host port that is not needed was not removed: it is tried again")
			}
		}
	}
}

// letGo ends the reservation of an attempt that was undone.
func (a *attempt) letGo() {
	for i, e := range a.ends {
		a.leases.leave(a.req.childPort(i, a.port), e.unsettled)
	}
}

// bindings are what a successful attempt made of cfg, whose entries are those
// of the request.
func (a *attempt) bindings(cfg []portmapperapi.PortBindingReq) []portmapperapi.PortBinding {
	pbs := make([]portmapperapi.PortBinding, len(cfg))
	for i, c := range cfg {
		child := a.req.children[i]
		pb := portmapperapi.PortBinding{
			PortBinding:            c.PortBinding.Copy(),
			ChildHostIP:            child.AsSlice(),
			PortDriverRemove:       a.ends[i].remove,
			RootlesskitUnsupported: a.ends[i].unsupported,
		}
		pb.HostPort, pb.HostPortEnd = uint16(a.port), uint16(a.port)
		// Host addresses that share a child address share its socket and its
		// NAT rules; the first of them has both.
		if n := slices.Index(a.req.children, child); n == i {
			n = slices.IndexFunc(a.req.binds, pb.ChildHostIP.Equal)
			pb.BoundSocket = a.socks[n]
			pb.NAT = netip.AddrPortFrom(child, uint16(a.port))
		}
		pbs[i] = pb
	}
	return pbs
}
