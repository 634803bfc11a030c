package nat

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"strings"

	"github.com/containerd/log"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
)

// attempt is one allocate-and-bind in the child namespace, followed by one request per host address to the
// port driver.
type attempt struct {
	req    *request
	leases *reservations
	port   int
	socks  []*os.File // by child address, as req.binds has them
	parts  []part     // by host address
	few    [2]part    // As a rule, these are enough.
}

// part is what a host address has of an attempt.
type part struct {
	remove      func() error
	unsupported bool
	unsettled   *unsettled
}

// try makes an attempt at a port in [first, last]. What it did is undone when it fails, but a port that the
// driver refused stays reserved until it is let go of: then both the attempt and the error are returned.
func try(ctx context.Context, r *request, driver PortDriverClient, leases *reservations, first, last int) (*attempt, error) {
	port, socks, err := leases.allocator.RequestPortsInRange(r.binds, r.proto, first, last)
	if err != nil {
		return nil, &childRefusal{first: first, err: err}
	}
	a := &attempt{req: r, leases: leases, port: port, socks: socks}
	a.parts = a.few[:0]
	for i := range r.addrs {
		a.parts = append(a.parts, part{})
		leases.join(r.childPort(i, port))
	}
	if driver == nil {
		return a, nil
	}
	if err = a.publish(ctx, driver); err != nil {
		a.undo()
	}
	return a, err
}

// publish has the driver expose the port on the host, address by address.
func (a *attempt) publish(ctx context.Context, driver PortDriverClient) error {
	calls, proto, served := ctx, a.req.proto.String(), len(a.parts)
	if ctx.Done() != nil { // An outcome that isn't known can't be undone: see each request through.
		calls = context.WithoutCancel(ctx)
	}
	for i, addr := range a.req.addrs {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := &a.parts[i]
		var err error
		p.remove, err = driver.AddPort(calls, proto, addr.host, addr.child, a.port)
		if err == nil {
			continue
		}
		if strings.Contains(strings.ToLower(err.Error()), textUnsupported) {
			log.G(ctx).WithFields(log.Fields{"error": err}).Warnf("discarding request for %q", netip.AddrPortFrom(addr.host, uint16(a.port)))
			p.unsupported = true
			if served--; served > 0 {
				continue
			}
		}
		// RootlessKit would take the child port for another host address, too.
		sharable := !addr.host.IsUnspecified() && !(addr.child.Is4() && addr.child.IsLoopback())
		if !errors.As(err, &p.unsettled) && isLost(err) && sharable {
			p.unsettled = &unsettled{error: err}
		}
		return &hostRefusal{addr.host, a.port, a.req.proto, err}
	}
	return ctx.Err()
}

// undo closes the child's sockets and undoes what the driver did.
func (a *attempt) undo() {
	for _, sock := range a.socks {
		sock.Close()
	}
	for i := range a.parts {
		if p := &a.parts[i]; p.remove != nil {
			errors.As(p.remove(), &p.unsettled) // Another failure is tried again, and told then.
		}
	}
}

// letGo ends the reservation of an attempt that was undone.
func (a *attempt) letGo() {
	for i, p := range a.parts {
		a.leases.leave(a.req.childPort(i, a.port), p.unsettled)
	}
}

// bindings are what a successful attempt made. Host addresses that share a child address share its socket and
// its NAT rules; the first of them has both.
func (a *attempt) bindings() []portmapperapi.PortBinding {
	pbs := make([]portmapperapi.PortBinding, len(a.parts))
	socks := a.socks
	for i, addr := range a.req.addrs {
		pb := &pbs[i]
		pb.PortBinding = addr.cfg.PortBinding.Copy()
		pb.HostPort, pb.HostPortEnd = uint16(a.port), uint16(a.port)
		pb.ChildHostIP = addr.bind
		pb.PortDriverRemove, pb.RootlesskitUnsupported = a.parts[i].remove, a.parts[i].unsupported
		if !addr.shares {
			pb.BoundSocket, socks = socks[0], socks[1:]
			pb.NAT = netip.AddrPortFrom(addr.child, pb.HostPort)
		}
	}
	return pbs
}
