package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strconv"

	"golang.org/x/sys/windows"
)

// whoMay do what takes a privilege.
const whoMay = "an administrator"

// Host is what there is to know of this machine.
type Host struct {
	excluded map[string][]Excluded // by family and protocol, as netsh names them
	errs     []error
}

// Look asks netsh.
func Look(ctx context.Context) *Host {
	h := &Host{excluded: map[string][]Excluded{}}
	for _, family := range []string{"ipv4", "ipv6"} {
		for _, proto := range []string{"tcp", "udp"} {
			out, err := exec.CommandContext(ctx, "netsh", "int", family, "show", "excludedportrange", "protocol="+proto).Output()
			if err != nil {
				h.errs = append(h.errs, fmt.Errorf("ask netsh for the excluded ports of %s, %s: %w", family, proto, err))
			}
			h.excluded[family+proto] = ParseExcluded(string(out))
		}
	}
	return h
}

func (h *Host) portsOf(a Ask) (ports []int) {
	for port := a.First; port <= a.Last; port++ {
		ports = append(ports, port)
	}
	return ports
}

func (h *Host) shrugs() int { return 0 }

// Checks are all of them, in the order in which they are run.
var Checks = []Check{
	{Name: "excluded", Looks: "the ports that Windows keeps from programs (netsh)", machine: exclusions, ask: func(h *Host, a Ask) *Finding {
		if len(h.errs) > 0 {
			return &Finding{Mark: Note, Says: "whether Windows excludes it is not known: " + h.errs[0].Error()}
		}
		if !a.fixed() {
			return nil
		}
		return h.lookUp(administered, a, a.First)
	}, port: func(h *Host, a Ask, port int) *Finding { return h.lookUp(excluded, a, port) }},
	twice,
	{Name: "held", Looks: "whether the port can be bound", port: bindable},
}

// lookUp is what says has to say of a port, in the list of the first family of which it has something to say.
func (h *Host) lookUp(says func([]Excluded, string, string, int) *Finding, a Ask, port int) *Finding {
	for _, family := range families(a) {
		if f := says(h.excluded[family+a.Proto], family, a.Proto, port); f != nil {
			return f
		}
	}
	return nil
}

func exclusions(h *Host) (list []Finding) {
	for _, err := range h.errs {
		list = append(list, Finding{Mark: Fail, Says: err.Error()})
	}
	for _, proto := range []string{"tcp", "udp"} {
		spans := h.excluded["ipv4"+proto]
		f := Finding{Mark: OK, Says: fmt.Sprintf("%d ranges of %s ports are excluded", len(spans), proto)}
		if len(spans) > 0 {
			f.Do = "in a Linux VM or WSL on this host: " + reserveLine(spans)
		}
		list = append(list, f)
	}
	return list
}

func families(a Ask) []string {
	switch {
	case !a.Addr.IsValid():
		return []string{"ipv4", "ipv6"}
	case a.Addr.Is4():
		return []string{"ipv4"}
	}
	return []string{"ipv6"}
}

func bindable(_ *Host, a Ask, port int) *Finding {
	for _, family := range families(a) {
		addr := a.Addr
		if !addr.IsValid() {
			addr = map[string]netip.Addr{"ipv4": netip.IPv4Unspecified(), "ipv6": netip.IPv6Unspecified()}[family]
		}
		err := bind(a.Proto+map[string]string{"ipv4": "4", "ipv6": "6"}[family], net.JoinHostPort(addr.String(), strconv.Itoa(port)))
		switch {
		case errors.Is(err, windows.WSAEACCES):
			return &Finding{Says: "may not be bound (WSAEACCES): it is excluded, or a program has it for itself"}
		case errors.Is(err, windows.WSAEADDRINUSE):
			return &Finding{Says: "is taken by a program (WSAEADDRINUSE)", Do: fmt.Sprintf("netstat -ano | findstr :%d says which one", port)}
		}
	}
	return nil
}

func bind(network, address string) error {
	if network[:3] == "udp" {
		c, err := net.ListenPacket(network, address)
		if err == nil {
			err = c.Close()
		}
		return err
	}
	l, err := net.Listen(network, address)
	if err == nil {
		err = l.Close()
	}
	return err
}
