package portdriver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	client2 "github.com/rootless-containers/rootlesskit/v2/pkg/api/client"
	port2 "github.com/rootless-containers/rootlesskit/v2/pkg/port"
	"github.com/rootless-containers/rootlesskit/v3/pkg/api"
	"github.com/rootless-containers/rootlesskit/v3/pkg/api/client"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
)

// RootlessKit is a [Client] of a real RootlessKit. It does as dockerd's own
// (upstream's daemon/libnetwork/internal/rlkclient, which nobody else may import).
type RootlessKit struct {
	port.Manager
	Driver  string // as RootlessKit has it
	protos  []string
	childIP netip.Addr // the only address that the driver forwards to, if valid
}

// Dial returns a client of the RootlessKit of that version that serves its API at socket.
func Dial(ctx context.Context, version, socket string) (*RootlessKit, error) {
	if version[0] == '2' {
		return dial2(ctx, socket)
	}
	c, err := client.New(socket)
	if err != nil {
		return nil, err
	}
	info, err := c.Info(ctx)
	if err != nil {
		return nil, err
	}
	return newRootlessKit(c.PortManager(), info)
}

func dial2(ctx context.Context, socket string) (*RootlessKit, error) {
	c, err := client2.New(socket)
	if err != nil {
		return nil, err
	}
	info, err := c.Info(ctx)
	if err != nil {
		return nil, err
	}
	info3 := &api.Info{}
	if d := info.PortDriver; d != nil {
		info3.PortDriver = &api.PortDriverInfo{Driver: d.Driver, Protos: d.Protos, DisallowLoopbackChildIP: d.DisallowLoopbackChildIP}
	}
	if d := info.NetworkDriver; d != nil {
		info3.NetworkDriver = &api.NetworkDriverInfo{Driver: d.Driver, ChildIP: d.ChildIP}
	}
	return newRootlessKit(manager2{c.PortManager()}, info3)
}

func newRootlessKit(m port.Manager, info *api.Info) (*RootlessKit, error) {
	if info.PortDriver == nil {
		return nil, errors.New("RootlessKit has no port driver")
	}
	r := &RootlessKit{Manager: m, Driver: info.PortDriver.Driver, protos: info.PortDriver.Protos}
	if info.PortDriver.DisallowLoopbackChildIP {
		if info.NetworkDriver == nil {
			return nil, fmt.Errorf("RootlessKit's port driver %s forwards to no loopback address, and there is no other", r.Driver)
		}
		ip, _ := netip.AddrFromSlice(info.NetworkDriver.ChildIP)
		r.childIP = ip.Unmap()
	}
	return r, nil
}

// ChildHostIP returns the child's address for hostIP, an invalid one if the
// driver does not serve the protocol on hostIP's family.
func (r *RootlessKit) ChildHostIP(proto string, hostIP netip.Addr) netip.Addr {
	switch {
	case !slices.Contains(r.protos, apiProto(proto, hostIP)):
		return netip.Addr{}
	case r.childIP.IsValid():
		return r.childIP
	case hostIP.IsLoopback():
		return hostIP
	case hostIP.Is6():
		return netip.IPv6Loopback()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// AddPort exposes hostPort on hostIP, and returns what undoes it.
func (r *RootlessKit) AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, hostPort int) (func() error, error) {
	proto = apiProto(proto, hostIP)
	if !slices.Contains(r.protos, proto) {
		return nil, fmt.Errorf("protocol %q is not supported by the RootlessKit port driver %q", proto, r.Driver)
	}
	st, err := r.Manager.AddPort(ctx, port.Spec{
		Proto:      proto,
		ParentIP:   hostIP.String(),
		ParentPort: hostPort,
		ChildIP:    childIP.String(),
		ChildPort:  hostPort,
	})
	if err != nil {
		return nil, fmt.Errorf("%s%w", addPortFailed, err)
	}
	return func() error {
		if err := r.RemovePort(context.WithoutCancel(ctx), st.ID); err != nil {
			return fmt.Errorf("%s%w", removePortFailed, err)
		}
		return nil
	}, nil
}

// What dockerd's client puts before RootlessKit's answers.
const (
	addPortFailed    = "error while calling RootlessKit PortManager.AddPort(): "
	removePortFailed = "error while calling RootlessKit PortManager.RemovePort(): "
)

// apiProto is proto as RootlessKit's API has it: "tcp4".
func apiProto(proto string, hostIP netip.Addr) string {
	if hostIP.Is6() {
		return proto + "6"
	}
	return proto + "4"
}

// manager2 makes a RootlessKit 2's port.Manager one of version 3.
type manager2 struct{ port2.Manager }

func (m manager2) AddPort(ctx context.Context, spec port.Spec) (*port.Status, error) {
	st, err := m.Manager.AddPort(ctx, port2.Spec(spec))
	if err != nil {
		return nil, err
	}
	return &port.Status{ID: st.ID, Spec: port.Spec(st.Spec)}, nil
}

func (m manager2) ListPorts(ctx context.Context) ([]port.Status, error) {
	list, err := m.Manager.ListPorts(ctx)
	list3 := make([]port.Status, 0, len(list))
	for _, st := range list {
		list3 = append(list3, port.Status{ID: st.ID, Spec: port.Spec(st.Spec)})
	}
	return list3, err
}
