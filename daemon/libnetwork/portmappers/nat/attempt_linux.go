package nat

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/log"
	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
)

// attempt is one allocate-and-bind in the child namespace, followed by one
// request per host address to the port driver.
type attempt struct {
	pdc   PortDriverClient
	reqs  []portmapperapi.PortBindingReq
	addrs []net.IP // addrs has the child addresses of reqs, without duplicates.

	port     int
	bindings []portmapperapi.PortBinding
	// kept is set when the port is still, or may be, on the host after all: its
	// reservation outlives the attempt.
	kept bool
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
		go spareSockets.refill() // While the port driver is at it.
		err := a.publish(ctx)
		select {
		case answered <- err:
		case <-gaveUp:
			if err == nil {
				a.unexposeAll(ctx)
			}
			if a.kept { // The log has, or will have, what is left.
				return
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
	callCtx := ctx
	if ctx.Done() != nil {
		callCtx = context.WithoutCancel(ctx)
	}
	unsupported := 0
	for i := range a.bindings {
		pb := &a.bindings[i]
		if err := ctx.Err(); err != nil {
			return err
		}
		var err error
		pb.PortDriverRemove, err = a.pdc.AddPort(callCtx, pb.Proto.String(), addrOf(pb.HostIP), addrOf(pb.ChildHostIP), a.port)
		if err == nil {
			continue
		}
		if isUnsupported(err) {
			log.G(ctx).WithFields(log.Fields{"error": err}).Warnf("discarding request for %q", hostPort(pb.HostIP, a.port))
			pb.RootlesskitUnsupported = true
			if unsupported++; unsupported < len(a.bindings) {
				continue
			}
		}
		if isLost(err) {
			// Nobody knows its ID. RootlessKit's life is the daemon's.
			a.kept = true
			log.G(ctx).WithFields(log.Fields{
				"hostIP": pb.HostIP, "port": a.port, "proto": pb.Proto, "error": err,
			}).Warn("RootlessKit's answer was lost, it may hold the host port: reserved until the daemon restarts")
		}
		return &hostRefusal{hostIP: addrOf(pb.HostIP), port: a.port, proto: pb.Proto, err: err}
	}
	return ctx.Err()
}

// unexposeAll undoes publish, as far as it got.
func (a *attempt) unexposeAll(ctx context.Context) {
	done := func(portmapperapi.PortBinding) {} // They share one reservation.
	failed, err := unexpose(a.bindings, done)
	for i := range a.bindings {
		a.bindings[i].PortDriverRemove = nil
	}
	if err == nil {
		return
	}
	forGood := a.kept
	a.kept = true
	go func() {
		if unexposeAgain(ctx, failed, done) && !forGood {
			a.release()
		}
	}()
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

// unanswered is the number of removals that were given up, and are not answered
// yet. The bridge driver removes a container's ports one by one: while there are
// any, the port driver is not waited for as long again.
var unanswered atomic.Int32

// unexposeWithin has the port driver remove the ports of pbs from the host, then
// ends their reservations. What fails is returned, and tried again in the
// background. A port driver that does not answer in time is waited for there, too.
func unexposeWithin(ctx context.Context, pbs []portmapperapi.PortBinding) error {
	limit := searchLimit
	if unanswered.Load() > 0 {
		limit = removeWaits[0]
	}
	answered, gaveUp := make(chan error), make(chan struct{})
	// As in publishWithin, another thread sends the requests.
	go func() {
		failed, err := unexpose(pbs, releaseReservation)
		select {
		case answered <- err:
		case <-gaveUp:
			unanswered.Add(-1)
		}
		unexposeAgain(ctx, failed, releaseReservation)
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case err := <-answered:
		return err
	case <-timer.C:
		unanswered.Add(1)
		close(gaveUp)
		var ports []string
		for _, pb := range pbs {
			ports = append(ports, hostPort(pb.HostIP, int(pb.HostPort))+"/"+pb.Proto.String())
		}
		return fmt.Errorf("failed to remove host port %s: %w (%s): it stays reserved until it does; %s",
			strings.Join(ports, ", "), errNoAnswer, limit, adviseAPI)
	}
}

// unexpose has the port driver remove the ports of pbs from the host, and calls
// done for each that it did. It returns the others, with the errors.
func unexpose(pbs []portmapperapi.PortBinding, done func(portmapperapi.PortBinding)) (failed []portmapperapi.PortBinding, _ error) {
	var errs []error
	for _, pb := range pbs {
		if pb.PortDriverRemove != nil {
			if err := pb.PortDriverRemove(); err != nil && !isUnknownPort(err) {
				failed = append(failed, pb)
				errs = append(errs, fmt.Errorf("failed to remove host port %s/%s: %w", hostPort(pb.HostIP, int(pb.HostPort)), pb.Proto, err))
				continue
			}
		}
		done(pb)
	}
	return failed, errors.Join(errs...)
}

// unexposeAgain is unexpose after removals that failed. It returns whether all
// went in the end. RootlessKit has the others until it ends, with the daemon.
func unexposeAgain(ctx context.Context, pbs []portmapperapi.PortBinding, done func(portmapperapi.PortBinding)) bool {
	var err error
	for _, wait := range removeWaits {
		if len(pbs) == 0 {
			return true
		}
		time.Sleep(wait)
		pbs, err = unexpose(pbs, done)
	}
	if err != nil {
		log.G(ctx).WithFields(log.Fields{"error": err}).Warn("RootlessKit may hold a host port: reserved until the daemon restarts")
	}
	return err == nil
}

// removeWaits is how long to wait each time before another removal.
var removeWaits = [...]time.Duration{100 * time.Millisecond, time.Second, 5 * time.Second}
