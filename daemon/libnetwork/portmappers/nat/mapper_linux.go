// Package nat maps container ports to host ports by binding them in the
// daemon's network namespace and, in rootless mode, by asking RootlessKit's
// port driver to expose them on the host.
//
// Two network namespaces have two port tables: a port that is free in the
// child (where the daemon's sockets are) can be taken on the host (where
// RootlessKit listens). MapPorts therefore searches: see search_linux.go for
// which port is tried next, attempt_linux.go for one try, refusal_linux.go for
// what an error means, and hostview_linux.go for looking at the host.
package nat

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"

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

// Register makes the port mapper known to libnetwork, as "nat".
func Register(r portmapperapi.Registerer, cfg Config) error {
	return r.Register(driverName, NewPortMapper(cfg))
}

// PortMapper publishes ports by binding them and, in rootless mode, by having
// RootlessKit expose them. The zero value is a rootful PortMapper.
type PortMapper struct {
	// pdc asks for host ports. It is nil in rootful mode, or a nil pointer.
	pdc PortDriverClient
}

// Config is the configuration of a PortMapper.
type Config struct {
	// RlkClient speaks to RootlessKit's port driver. It is nil, or a nil
	// pointer, when there is none to ask.
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
	first := cfg[0]
	for _, c := range cfg {
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
	var pdc PortDriverClient
	switch {
	case pm.hasPortDriver():
		pdc = pm.pdc
		if err := checkOverlap(reqs); err != nil {
			return nil, err
		}
	case view != nil && portDriverIsImplicit():
		view.lookForPasta()
	default:
		// Nobody can refuse what was bound here: there is nothing to search.
		a := attempt{reqs: reqs, addrs: childAddrs(reqs)}
		if err := a.allocate(int(first.HostPort), int(first.HostPortEnd)); err != nil {
			return nil, err
		}
		return a.bindings, nil
	}

	s := newSearch(ctx, reqs, view)
	defer s.end()
	for s.next() {
		a := attempt{pdc: pdc, reqs: reqs, addrs: s.addrs}
		if err := a.allocate(s.begin, s.last); err != nil {
			s.refusedInChild(err)
			continue
		}
		if err := a.publishWithin(ctx, s.limit.C); err != nil {
			s.refusedOnHost(&a, err)
			continue
		}
		s.published(&a)
		return a.bindings, nil
	}
	return nil, s.err
}

// UnmapPorts closes, removes and releases everything that MapPorts set up for
// pbs. A step that fails does not keep the others from being done; every
// failure is in the returned error. The removal of a host port that RootlessKit
// failed to remove is tried again in the background, and one that it has not
// answered in 10 seconds is waited for there: the port stays reserved until
// RootlessKit has let go of it.
func (pm PortMapper) UnmapPorts(ctx context.Context, pbs []portmapperapi.PortBinding) error {
	var (
		errs    []error
		exposed []portmapperapi.PortBinding
	)
	for _, pb := range pbs {
		if pb.BoundSocket != nil {
			if err := pb.BoundSocket.Close(); err != nil {
				errs = append(errs, fmt.Errorf("failed to close the child's socket of %s: %w", pb, err))
			}
		}
		ownPorts.remove(pb.Proto, int(pb.HostPort))
		if pb.PortDriverRemove == nil {
			releaseReservation(pb)
			continue
		}
		exposed = append(exposed, pb)
	}
	if len(exposed) > 0 {
		errs = append(errs, unexposeWithin(ctx, exposed))
	}
	return errors.Join(errs...)
}

// releaseReservation ends pb's part in the reservation of its child port, and
// the reservation with the last part.
func releaseReservation(pb portmapperapi.PortBinding) {
	if !sharedPorts.leave(pb) {
		portallocator.Get().ReleasePort(pb.ChildHostIP, pb.Proto.String(), int(pb.HostPort))
	}
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
			req.ChildHostIP = slices.Clone(req.HostIP)
		} else {
			if !addrOf(req.HostIP).IsValid() {
				return nil, fmt.Errorf("invalid host IP address in %s", req.PortBinding)
			}
			child := pm.pdc.ChildHostIP(req.Proto.String(), addrOf(req.HostIP))
			if !child.IsValid() {
				continue
			}
			req.ChildHostIP = childIPs.of(addrOf(req.HostIP), child).AsSlice()
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
	if p := cfg[0].Proto; p != types.TCP && p != types.UDP && p != types.SCTP {
		return fmt.Errorf("cannot publish container port %d: unknown protocol %s", cfg[0].Port, p)
	}
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
			switch {
			case a == b:
				return fmt.Errorf("cannot publish container port %d/%s twice on host port %s of %s: address already in use; publish it once",
					req.Port, req.Proto, portsOf(req), a)
			case a.Is4() == b.Is4() && (a.IsUnspecified() || b.IsUnspecified()):
				return fmt.Errorf("cannot publish container port %d/%s on host port %s of both %s and %s: address already in use; publish it on one of them",
					req.Port, req.Proto, portsOf(req), a, b)
			}
		}
	}
	return nil
}

// portsOf is the host port, or the range, that req asks for.
func portsOf(req portmapperapi.PortBindingReq) string {
	if req.HostPort == req.HostPortEnd {
		return strconv.Itoa(int(req.HostPort))
	}
	return fmt.Sprintf("%d-%d", req.HostPort, req.HostPortEnd)
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
