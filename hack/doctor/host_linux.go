package doctor

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// whoMay do what takes a privilege.
const whoMay = "root"

// span is a range of ports.
type span struct{ first, last int }

func (s span) has(port int) bool { return s.first <= port && port <= s.last }

// Host is what there is to know of this machine, of its ports, and of the daemon that is to publish them.
type Host struct {
	unprivileged int // ip_unprivileged_port_start
	dynamic      span
	reserved     []span
	addresses    []netip.Addr
	ipv6         bool
	daemon       *Daemon // nil: none answers
	rootful      bool
	bind         func(proto string, addr netip.Addr, port int) error
	sockets      func() []socket
	processes    func() map[uint32]string
	machine      machine
}

// Look gathers what is the same for all requests, of the network namespace that the caller is in.
func Look(d *Daemon, rootful bool) (*Host, error) {
	h := &Host{daemon: d, rootful: rootful, bind: tryBind, sockets: sync.OnceValue(listSockets), processes: sync.OnceValue(listProcesses), machine: lookAtMachine(os.Getuid())}
	var err error
	if h.unprivileged, err = number("/proc/sys/net/ipv4/ip_unprivileged_port_start"); err != nil {
		return nil, err
	}
	data, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return nil, err
	}
	if _, err := fmt.Sscan(string(data), &h.dynamic.first, &h.dynamic.last); err != nil {
		return nil, fmt.Errorf("ip_local_port_range: %w", err)
	}
	if data, err = os.ReadFile("/proc/sys/net/ipv4/ip_local_reserved_ports"); err != nil {
		return nil, err
	}
	if h.reserved, err = parseSpans(strings.TrimSpace(string(data))); err != nil {
		return nil, fmt.Errorf("ip_local_reserved_ports: %w", err)
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			h.addresses = append(h.addresses, p.Addr())
			h.ipv6 = h.ipv6 || p.Addr().Is6()
		}
	}
	return h, nil
}

func number(file string) (int, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(data)))
}

// parseSpans reads a list of ports as the kernel prints it.
func parseSpans(s string) (list []span, _ error) {
	if s == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(s, ",") {
		first, last, ok := strings.Cut(part, "-")
		if !ok {
			last = first
		}
		f, err1 := strconv.Atoi(first)
		l, err2 := strconv.Atoi(last)
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		list = append(list, span{f, l})
	}
	return list, nil
}

func (h *Host) isReserved(port int) bool {
	return slices.ContainsFunc(h.reserved, func(s span) bool { return s.has(port) })
}

// portsOf are the ports that a request can be served with.
func (h *Host) portsOf(a Ask) (ports []int) {
	s, anyPort := span{a.First, a.Last}, a.First == 0
	if anyPort {
		s = h.dynamic
	}
	for port := s.first; port <= s.last; port++ {
		if !anyPort || !h.isReserved(port) {
			ports = append(ports, port)
		}
	}
	return ports
}

// shrugs is how many refusals that do not say why end a search; 0: the kernel or the driver says why.
func (h *Host) shrugs() int {
	if d := h.daemon; d != nil && d.driver == "slirp4netns" && !d.view {
		return 64
	}
	return 0
}

// families are the addresses that a request is bound on.
func (h *Host) families(a Ask) []netip.Addr {
	if a.Addr.IsValid() && (!h.dualStack() || a.Addr != netip.IPv4Unspecified()) {
		return []netip.Addr{a.Addr}
	}
	both := []netip.Addr{netip.IPv4Unspecified()}
	if h.ipv6 && (h.daemon == nil || h.daemon.serves(a.Proto+"6") || h.dualStack()) {
		both = append(both, netip.IPv6Unspecified())
	}
	return both
}

// dualStack tells whether the port driver's 0.0.0.0 is [::], too.
func (h *Host) dualStack() bool { return h.daemon != nil && h.daemon.driver == "gvisor-tap-vsock" }

// tryBind binds the port, as RootlessKit's Go does, and lets go of it at once: it does not listen, so no connection is taken.
func tryBind(proto string, addr netip.Addr, port int) error {
	family, kind := unix.AF_INET6, unix.SOCK_STREAM
	var at unix.Sockaddr = &unix.SockaddrInet6{Port: port, Addr: addr.As16()}
	if addr.Is4() {
		family, at = unix.AF_INET, &unix.SockaddrInet4{Port: port, Addr: addr.As4()}
	}
	if proto == "udp" {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if family == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return err
		}
	}
	// With it a connection in TIME_WAIT is not in the way; for UDP it would share the port of another one that has it set.
	if proto == "tcp" {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return err
		}
	}
	return unix.Bind(fd, at)
}

func (s span) String() string {
	if s.first == s.last {
		return strconv.Itoa(s.first)
	}
	return fmt.Sprintf("%d-%d", s.first, s.last)
}
