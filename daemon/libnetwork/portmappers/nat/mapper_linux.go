// Package nat maps container ports to host ports by binding them in the
// daemon's network namespace and, in rootless mode, by asking RootlessKit's
// port driver to expose them on the host.
//
// Two network namespaces have two port tables: a port that is free in the
// child (where the daemon's sockets are) can be taken on the host (where
// RootlessKit listens). MapPorts therefore searches: see search_linux.go for
// which port is tried next, and refusal_linux.go for what an error means.
package nat

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
)

const driverName = "nat"

// PortDriverClient asks RootlessKit's port driver to expose ports on the host.
type PortDriverClient interface {
	// ChildHostIP returns the address that stands in for hostIP in the child
	// namespace. It is invalid when the driver does not serve proto ("tcp",
	// "udp" or "sctp") on hostIP's address family.
	ChildHostIP(proto string, hostIP netip.Addr) netip.Addr
	// AddPort exposes hostPort on hostIP, forwarding to the same port on
	// childIP. The returned function undoes it.
	AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, hostPort int) (func() error, error)
}

// Register the "nat" port mapper with libnetwork.
func Register(r portmapperapi.Registerer, cfg Config) error {
	return r.Register(driverName, NewPortMapper(cfg))
}

// PortMapper publishes ports by binding them and, in rootless mode, by having
// RootlessKit expose them. The zero value is a rootful PortMapper.
type PortMapper struct {
	// pdc is used to interact with RootlessKit's port driver.
	pdc PortDriverClient
}

// Config is the configuration of a PortMapper.
type Config struct {
	// RlkClient is called by MapPorts to determine the ChildHostIP and ask
	// RootlessKit to expose ports on the host. It is nil, or a nil pointer,
	// when no port driver is to be asked.
	RlkClient PortDriverClient
}

// NewPortMapper returns a PortMapper that asks cfg.RlkClient for host ports.
func NewPortMapper(cfg Config) PortMapper {
	return PortMapper{pdc: cfg.RlkClient}
}

// MapPorts publishes cfg's container port on one host port, the same for every
// host address in cfg. The caller ensures that cfg's entries have the same
// protocol, container port and host port range; their host addresses differ.
//
// In rootless mode a dynamic host port (0, or a range) is searched for until
// one is free in the child namespace and on the host; a fixed one is asked for
// once. The search ends with ctx, with errors.Is(err, ctx.Err()), and takes 10
// seconds at most. When MapPorts fails, nothing stays published.
//
// cfg is neither written to nor kept.
func (pm PortMapper) MapPorts(ctx context.Context, cfg []portmapperapi.PortBindingReq) ([]portmapperapi.PortBinding, error) {
	if len(cfg) == 0 {
		return nil, nil
	}
	// Ensure that all of cfg's entries have the same proto and ports.
	first := cfg[0]
	for _, c := range cfg[1:] {
		if c.Proto != first.Proto || c.Port != first.Port || c.HostPort != first.HostPort || c.HostPortEnd != first.HostPortEnd {
			return nil, types.InternalErrorf("port binding mismatch %d/%s:%d-%d, %d/%s:%d-%d",
				first.Port, first.Proto, first.HostPort, first.HostPortEnd,
				c.Port, c.Proto, c.HostPort, c.HostPortEnd)
		}
	}

	reqs, err := pm.served(cfg)
	if err != nil {
		return nil, err
	}
	view := newHostView(ctx, reqs)
	switch {
	case pm.hasPortDriver():
		if err := checkOverlap(reqs); err != nil {
			return nil, err
		}
	case view != nil && portDriverIsImplicit():
		view.lookForPasta()
	default:
		// Nobody can refuse what was bound here: there is nothing to search.
		a := attempt{pdc: pm.pdc, reqs: reqs, addrs: childAddrs(reqs)}
		if err := a.allocate(int(first.HostPort), int(first.HostPortEnd)); err != nil {
			return nil, err
		}
		if err := a.publish(context.WithoutCancel(ctx)); err != nil {
			a.closeSockets(ctx)
			a.release()
			return nil, err
		}
		return a.bindings, nil
	}

	s := newSearch(ctx, reqs, view)
	defer s.end()
	for s.next() {
		a := attempt{pdc: pm.pdc, reqs: reqs, addrs: s.addrs}
		if err := a.allocate(s.begin, s.last); err != nil {
			s.refusedInChild(err)
			continue
		}
		if err := a.publishWithin(ctx, s.limit.C); err != nil {
			s.refusedOnHost(a.port, err)
			continue
		}
		s.published(a)
		return a.bindings, nil
	}
	return nil, s.err
}

// UnmapPorts closes, removes and releases everything that MapPorts set up for
// pbs. A step that fails does not keep the others from being done; every
// failure is in the returned error.
func (pm PortMapper) UnmapPorts(ctx context.Context, pbs []portmapperapi.PortBinding) error {
	var errs []error
	for _, pb := range pbs {
		if pb.BoundSocket != nil {
			if err := pb.BoundSocket.Close(); err != nil {
				errs = append(errs, fmt.Errorf("failed to close socket for port mapping %s: %w", pb, err))
			}
		}
		if err := unexpose(pb); err != nil {
			errs = append(errs, err)
		}
	}
	for _, pb := range pbs {
		ownPorts.remove(int(pb.HostPort))
		// Without NAT, it's another binding's child port that is shared.
		if pb.NAT.IsValid() {
			portallocator.Get().ReleasePort(pb.ChildHostIP, pb.Proto.String(), int(pb.HostPort))
		}
	}
	return errors.Join(errs...)
}

// hasPortDriver tells whether there's a port driver to ask. There is none in
// rootful mode (a nil pointer in the interface), and none in rootless mode
// when RootlessKit's port driver is "none" or "implicit".
func (pm PortMapper) hasPortDriver() bool {
	if pm.pdc == nil {
		return false
	}
	v := reflect.ValueOf(pm.pdc)
	return v.Kind() != reflect.Pointer || !v.IsNil()
}

// served returns copies of cfg's entries with ChildHostIP set, without those
// whose protocol the port driver does not serve on the entry's host address.
func (pm PortMapper) served(cfg []portmapperapi.PortBindingReq) ([]portmapperapi.PortBindingReq, error) {
	reqs := make([]portmapperapi.PortBindingReq, 0, len(cfg))
	for _, req := range cfg {
		if pm.pdc == nil {
			req.ChildHostIP = req.HostIP
		} else {
			child := pm.pdc.ChildHostIP(req.Proto.String(), addrOf(req.HostIP))
			if !child.IsValid() {
				continue
			}
			req.ChildHostIP = child.AsSlice()
		}
		reqs = append(reqs, req)
	}
	if len(reqs) == 0 {
		return nil, notServed(cfg)
	}
	return reqs, nil
}

// notServed is the error for cfg, when the port driver serves none of it.
func notServed(cfg []portmapperapi.PortBindingReq) error {
	var protos []string
	for _, req := range cfg {
		family := "4"
		if addrOf(req.HostIP).Is6() {
			family = "6"
		}
		if p := req.Proto.String() + family; !slices.Contains(protos, p) {
			protos = append(protos, p)
		}
	}
	return fmt.Errorf("cannot publish container port %d/%s on host address %s: RootlessKit's port driver does not support %s; use another protocol or host address, or a port driver that supports it (DOCKERD_ROOTLESS_ROOTLESSKIT_PORT_DRIVER)",
		cfg[0].Port, cfg[0].Proto, hostAddrs(cfg), strings.Join(protos, " and "))
}

// checkOverlap returns an error if two of reqs' host addresses can't have the
// same port on any host: no search would find one.
func checkOverlap(reqs []portmapperapi.PortBindingReq) error {
	for i, req := range reqs {
		a := addrOf(req.HostIP)
		for _, other := range reqs[i+1:] {
			b := addrOf(other.HostIP)
			if a == b || a.Is4() == b.Is4() && (a.IsUnspecified() || b.IsUnspecified()) {
				return fmt.Errorf("cannot publish container port %d/%s on host addresses %s and %s with the same host port: address already in use; publish it on one of them",
					req.Port, req.Proto, a, b)
			}
		}
	}
	return nil
}

// attempt is one allocate-and-bind in the child namespace, followed by one
// request per host address to the port driver.
type attempt struct {
	pdc   PortDriverClient
	reqs  []portmapperapi.PortBindingReq
	addrs []net.IP // addrs has the child addresses of reqs, without duplicates.

	port     int
	bindings []portmapperapi.PortBinding
}

// allocate reserves and binds a port in [begin, end] on the child addresses.
func (a *attempt) allocate(begin, end int) error {
	proto := a.reqs[0].Proto
	port, socks, err := portallocator.NewOSAllocator().RequestPortsInRange(a.addrs, proto, begin, end)
	if err != nil {
		return err
	}
	a.port = port
	a.bindings = make([]portmapperapi.PortBinding, 0, len(a.reqs))
	for _, req := range a.reqs {
		pb := portmapperapi.PortBinding{
			PortBinding: req.PortBinding.Copy(),
			ChildHostIP: req.ChildHostIP,
		}
		pb.HostPort, pb.HostPortEnd = uint16(port), uint16(port)
		// Host addresses that share a child address share its socket and its
		// NAT rules; the first of them has both.
		i := slices.IndexFunc(a.addrs, req.ChildHostIP.Equal)
		if socks[i] != nil {
			pb.BoundSocket, socks[i] = socks[i], nil
			pb.NAT = netip.AddrPortFrom(addrOf(req.ChildHostIP), uint16(port))
		}
		a.bindings = append(a.bindings, pb)
	}
	return nil
}

// publishWithin is publish, given up when limit fires. Whoever gives up has
// its child sockets closed; the port driver's answer is then still waited for
// in the background, to undo what it did, and the port stays reserved until
// it comes.
func (a *attempt) publishWithin(ctx context.Context, limit <-chan time.Time) error {
	start := time.Now()
	answered, gaveUp := make(chan error), make(chan struct{})
	// The requests are sent from another thread: nothing in them depends on
	// the calling thread's network namespace.
	go func() {
		err := a.publish(ctx)
		select {
		case answered <- err:
		case <-gaveUp:
			if err == nil {
				a.unexposeAll(ctx)
			}
			a.release()
			log.G(ctx).WithFields(log.Fields{
				"port":     a.port,
				"duration": time.Since(start),
				"error":    err,
			}).Warn("RootlessKit answered a port request after it was given up: undone")
		}
	}()
	select {
	case err := <-answered:
		if err != nil {
			a.closeSockets(ctx)
		}
		return err
	case <-limit:
		close(gaveUp)
		a.closeSockets(ctx)
		return fmt.Errorf("host port %d/%s on %s: %w (%s)", a.port, a.reqs[0].Proto, hostAddrs(a.reqs), errNoAnswer, time.Since(start).Round(time.Millisecond))
	}
}

// publish has the port driver expose the bindings on the host. If one is
// refused, those before it are undone and the refusal is returned.
func (a *attempt) publish(ctx context.Context) (retErr error) {
	if a.pdc == nil {
		return nil
	}
	defer func() {
		if retErr != nil {
			a.unexposeAll(ctx)
		}
	}()
	// An outcome that isn't known can't be undone: see each request through.
	callCtx := context.WithoutCancel(ctx)
	unsupported := 0
	for i := range a.bindings {
		pb := &a.bindings[i]
		if err := ctx.Err(); err != nil {
			return err
		}
		var err error
		pb.PortDriverRemove, err = a.pdc.AddPort(callCtx, pb.Proto.String(), addrOf(pb.HostIP), addrOf(pb.ChildHostIP), a.port)
		if isUnsupported(err) {
			log.G(ctx).WithFields(log.Fields{"error": err}).Warnf("discarding request for %q", hostPort(pb.HostIP, a.port))
			pb.RootlesskitUnsupported = true
			if unsupported++; unsupported < len(a.bindings) {
				continue
			}
		}
		if err != nil {
			return &hostRefusal{hostIP: addrOf(pb.HostIP), port: a.port, proto: pb.Proto, err: err}
		}
	}
	return ctx.Err()
}

// unexposeAll undoes publish, as far as it got.
func (a *attempt) unexposeAll(ctx context.Context) {
	for i, pb := range slices.Backward(a.bindings) {
		if err := unexpose(pb); err != nil {
			log.G(ctx).WithFields(log.Fields{"binding": pb.PortBinding, "error": err}).Warn("Failed to remove a host port that is not needed")
		}
		a.bindings[i].PortDriverRemove = nil
	}
}

// closeSockets frees the port in the child namespace. It remains reserved.
func (a *attempt) closeSockets(ctx context.Context) {
	for i := range a.bindings {
		// Only this field: publish may still be writing to others.
		sock := a.bindings[i].BoundSocket
		if sock == nil {
			continue
		}
		if err := sock.Close(); err != nil {
			log.G(ctx).WithFields(log.Fields{"port": a.port, "error": err}).Warn("Failed to close a socket in the child namespace")
		}
	}
}

// release ends the reservation of the port.
func (a *attempt) release() {
	portallocator.NewOSAllocator().ReleasePorts(a.addrs, a.reqs[0].Proto, a.port)
}

// unexpose has the port driver remove pb's port from the host.
func unexpose(pb portmapperapi.PortBinding) error {
	if pb.PortDriverRemove == nil {
		return nil
	}
	if err := pb.PortDriverRemove(); err != nil && !isUnknownPort(err) {
		return fmt.Errorf("failed to remove host port %s/%s: %w", hostPort(pb.HostIP, int(pb.HostPort)), pb.Proto, err)
	}
	return nil
}

// childAddrs returns the child address of each of reqs.
func childAddrs(reqs []portmapperapi.PortBindingReq) []net.IP {
	addrs := make([]net.IP, 0, len(reqs))
	for _, req := range reqs {
		addrs = append(addrs, req.ChildHostIP)
	}
	return addrs
}

// addrOf converts ip, IPv4 or IPv6. An invalid ip gives the zero Addr.
func addrOf(ip net.IP) netip.Addr {
	addr, _ := netip.AddrFromSlice(ip)
	return addr.Unmap()
}
