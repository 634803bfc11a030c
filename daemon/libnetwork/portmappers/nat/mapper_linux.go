// Package nat maps container ports to host ports by binding them in the daemon's network namespace and, in
// rootless mode, by asking RootlessKit's port driver to expose them on the host.
//
// Two network namespaces have two port tables: a port that is free in the child (where the daemon's sockets
// are) can be taken on the host (where RootlessKit listens). MapPorts therefore searches: each room of this
// package is a file, and stands on those that it uses.
package nat

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"time" // For meterCall.

	"github.com/containerd/log"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"golang.org/x/sys/unix"
)

const driverName = "nat"

// Register makes the port mapper known to libnetwork, as "nat".
func Register(r portmapperapi.Registerer, cfg Config) error {
	return r.Register(driverName, NewPortMapper(cfg))
}

// PortMapper publishes ports by binding them and, in rootless mode, by having RootlessKit expose them. The
// zero value is a rootful PortMapper.
type PortMapper struct{ rooms *rooms }

// rooms is what a PortMapper remembers.
type rooms struct {
	driver  PortDriverClient // nil: nobody is asked.
	pasta   *pasta           // nil: RootlessKit's port driver is not "implicit".
	leases  *reservations
	cursors map[types.Protocol]*atomic.Int32 // See hostPorts.
	child   netNS                            // RootlessKit's network namespace.
}

// opened returns the rooms, of which the zero PortMapper remembers nothing.
func (pm PortMapper) opened() *rooms {
	if pm.rooms != nil {
		return pm.rooms
	}
	return &rooms{leases: newReservations()}
}

// Config is the configuration of a PortMapper.
type Config struct {
	// RlkClient speaks to RootlessKit's port driver. It is nil, or a nil pointer, when there is none to ask.
	RlkClient PortDriverClient
}

// NewPortMapper returns a PortMapper that asks cfg.RlkClient for host ports.
func NewPortMapper(cfg Config) PortMapper {
	m := &rooms{
		leases:  newReservations(),
		cursors: map[types.Protocol]*atomic.Int32{types.TCP: {}, types.UDP: {}},
		child:   netNSAt(filepath.Join(os.Getenv("ROOTLESSKIT_STATE_DIR"), "netns")),
	}
	// Upstream's client is a nil pointer where there is none to ask. Then, as no port driver's, its address
	// for 0.0.0.0 in the child is that one.
	any4 := netip.IPv4Unspecified()
	if c := cfg.RlkClient; c != nil && c.ChildHostIP("tcp", any4) != any4 {
		m.driver = &silence{PortDriverClient: &childIPs{PortDriverClient: c, byHost: map[netip.Addr]netip.Addr{}}}
		m.driver = meter{m.driver}
	} else if portDriverIsImplicit() {
		m.pasta = &pasta{own: map[ownPort]ownBindings{}}
		for _, c := range m.cursors {
			c.Store(rand.Int32N(65536)) // Other daemons look at the same host.
		}
	}
	return PortMapper{rooms: m}
}

// MapPorts publishes cfg's container port on one host port, the same for every host address in cfg. The
// caller ensures that cfg's entries have the same protocol, container port and host port range; their host
// addresses differ.
//
// A dynamic host port (0, or a range) is searched for until one is free in the child namespace and on the
// host, for two seconds; a fixed one is asked for once. The search ends with ctx, with errors.Is(err,
// ctx.Err()). RootlessKit is waited for as silence tells. When MapPorts fails, nothing stays published.
//
// cfg is neither written to nor kept.
func (pm PortMapper) MapPorts(ctx context.Context, cfg []portmapperapi.PortBindingReq) (pbs []portmapperapi.PortBinding, retErr error) {
	if len(cfg) == 0 {
		return nil, nil
	}
	m := pm.opened()
	s := search{driver: m.driver, leases: m.leases}
	defer meterCall(ctx, cfg, &s, time.Now(), &pbs, &retErr)
	r, err := newRequest(cfg, m.driver)
	if err != nil {
		return nil, err
	}
	s.req = r
	m.lookAtHost(ctx, &s)
	if s.ports == nil {
		ports := newAllocatorPorts(r)
		if s.driver == nil && r.proto != types.SCTP { // Rootful, it's the calling thread's namespace.
			ports.look = look{proto: r.proto, addrs: r.addrs}
		}
		s.ports = ports
	}
	if s.driver != nil || !r.fixed() {
		if err := r.checkOverlap(); err != nil {
			return nil, err
		}
	}
	if s.driver != nil && r.fixed() {
		m.leases.wait(ctx, r)
	}
	a, failed := s.run(ctx)
	if failed != nil && s.view.addrs != nil && m.pasta != nil && !r.dynamic() && !r.fixed() && errors.Is(failed, unix.EADDRINUSE) {
		meterPass(s.ports)
		s = search{req: r, driver: &pastaClient{pasta: m.pasta, insist: true}, leases: m.leases, ports: newAllocatorPorts(r), view: s.view, tries: s.tries}
		s.driver = meter{s.driver}
		a, failed = s.run(ctx)
	}
	if failed != nil {
		return nil, m.explain(&s, failed)
	}
	return a.bindings(), nil
}

// lookAtHost gives the search a view of the host, where that can be seen.
func (m *rooms) lookAtHost(ctx context.Context, s *search) {
	r := s.req
	if m.driver == nil && m.pasta == nil || m.cursors[r.proto] == nil || !hostInSight(m.child) {
		return
	}
	s.view = look{proto: r.proto, addrs: r.addrs, exclusive: m.pasta != nil}
	if m.pasta != nil {
		s.view.addrs, s.driver = pastaAddrs(), &pastaClient{pasta: m.pasta, fixed: r.fixed(), insist: r.fixed()}
		s.driver = meter{s.driver}
	}
	if r.dynamic() || 0 < r.first && r.first < r.last { // Of an invalid range, the allocator tells.
		ports, err := newHostPorts(&s.view, r, m.leases, m.cursors[r.proto])
		if err != nil {
			log.G(ctx).WithFields(log.Fields{"error": err}).Warn("The host's dynamic ports are not known: asking for the child's")
			return
		}
		s.ports = ports
	}
}

// explain adds what the mapper knows of a failed search. A rootful daemon's errors for a fixed port are the
// allocator's.
func (m *rooms) explain(s *search, f *failure) error {
	r, child := (*hostRefusal)(nil), (*childRefusal)(nil)
	if s.driver == nil && s.req.fixed() && errors.As(f.last, &child) {
		return child.err
	}
	f.limit, f.rootlessKit = s.limit(), rootlessKit()
	if s.req.fixed() && errors.As(f.last, &r) && causeOf(r, f.limit) == inUse {
		if s.view.addrs != nil {
			f.holder = holder(r.proto, r.host, r.port)
		}
		m.leases.each(func(p childPort) {
			if p.proto == r.proto && int(p.at.Port()) == r.port && p.at.Addr().Is4() == r.host.Is4() {
				f.holder = "a container of this daemon (on another host address)"
			}
		})
	}
	return f
}

// UnmapPorts closes, removes and releases everything that MapPorts set up for pbs. A step that fails does not
// keep the others from being done; every failure is in the returned error, but for removals that RootlessKit
// has not answered in time: those are logged, and their ports stay reserved until it has. How long it is
// waited for, silence tells.
func (pm PortMapper) UnmapPorts(_ context.Context, pbs []portmapperapi.PortBinding) error {
	leases := pm.opened().leases
	var errs []error
	for _, pb := range pbs {
		if pb.BoundSocket != nil {
			if err := pb.BoundSocket.Close(); err != nil {
				errs = append(errs, fmt.Errorf("failed to close the child's socket of %s: %w", pb, err))
			}
		}
		var late *unsettled
		if pb.PortDriverRemove != nil {
			err := pb.PortDriverRemove()
			if errors.Is(err, errRemoved) {
				continue // Its part in the reservation has ended, too.
			}
			if err != nil && !errors.As(err, &late) {
				errs = append(errs, err)
			}
		}
		child, _ := netip.AddrFromSlice(pb.ChildHostIP)
		leases.leave(childPort{pb.Proto, netip.AddrPortFrom(child.Unmap(), pb.HostPort)}, late)
	}
	return errors.Join(errs...)
}
