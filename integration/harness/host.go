package harness

import (
	"errors"
	"net"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// host is a network namespace that plays a contender's host. An ordinary user, who can make none without using up the sub-ids
// that RootlessKit needs, has the one that we are in.
type host struct{ namespace netns.NsHandle }

func newHost() (*host, error) {
	h := &host{netns.None()}
	if os.Getuid() != 0 {
		return h, nil
	}
	return h, elsewhere(func() (err error) {
		if h.namespace, err = netns.New(); err != nil { // the thread is there now
			return err
		}
		// A way out that leads nowhere: without one, pasta serves IPv6 even if told not to.
		out := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "way-out"}, PeerName: "nowhere"}
		if err := netlink.LinkAdd(out); err != nil {
			return err
		}
		for _, name := range []string{"lo", "nowhere", "way-out"} {
			link, err := netlink.LinkByName(name)
			if err == nil {
				err = netlink.LinkSetUp(link)
			}
			if err != nil {
				return err
			}
		}
		anywhere := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
		address, _ := netlink.ParseAddr("192.0.2.1/24") // RFC 5737's
		if err := netlink.AddrAdd(out, address); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: out.Attrs().Index, Dst: anywhere})
	})
}

// do calls f on a thread that is there; so is what f starts.
func (h *host) do(f func() error) error {
	if !h.namespace.IsOpen() {
		return f()
	}
	return elsewhere(func() error {
		if err := netns.Set(h.namespace); err != nil {
			return err
		}
		return f()
	})
}

// elsewhere calls f on a thread that it may take to another network namespace.
func elsewhere(f func() error) error {
	runtime.LockOSThread()
	here, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer here.Close()
	err = f()
	if back := netns.Set(here); back != nil {
		return errors.Join(err, back) // nobody else gets this thread
	}
	runtime.UnlockOSThread()
	return err
}

func (h *host) close() {
	if h.namespace.IsOpen() {
		h.namespace.Close()
	}
}
