package nat

import (
	"context"
	"errors"
	"net/netip"
)

// PortDriverClient asks RootlessKit's port driver to expose ports on the host.
type PortDriverClient interface {
	// ChildHostIP returns the address that stands in for hostIP in the child namespace. It is invalid when
	// the driver does not serve proto ("tcp", "udp" or "sctp") on hostIP's address family.
	ChildHostIP(proto string, hostIP netip.Addr) netip.Addr
	// AddPort exposes hostPort on hostIP, forwarding to the same port on childIP. The returned function
	// undoes it.
	AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, hostPort int) (func() error, error)
}

// errRemoved is what the function that undoes an AddPort returns from the second call on.
var errRemoved = errors.New("the host port was removed before")

// unsettled is the error of an AddPort or a removal that was given up: what it did is not known yet.
type unsettled struct {
	error
	// settled is closed once nothing of the call is left on the host; nil if that will never be known.
	settled <-chan struct{}
}

func (u *unsettled) Unwrap() error { return u.error }
