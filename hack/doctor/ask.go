package doctor

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// Ask is a host port that somebody wants published. First is 0 where any will do.
type Ask struct {
	Addr        netip.Addr // the zero one: all addresses, of both families
	First, Last int
	Proto       string // tcp, udp, sctp
	Service     string // of a compose file, or ""
}

func (a Ask) String() string {
	ports := strconv.Itoa(a.First)
	if a.Last != a.First {
		ports += "-" + strconv.Itoa(a.Last)
	}
	if a.Addr.IsValid() {
		ports = net.JoinHostPort(a.Addr.String(), ports)
	}
	if a.Service != "" {
		ports = a.Service + " " + ports
	}
	return ports + "/" + a.Proto
}

func (a Ask) who() string {
	if a.Service != "" {
		return "service " + a.Service
	}
	return a.String()
}

// fixed tells whether it must be this port and no other.
func (a Ask) fixed() bool { return a.First == a.Last && a.First != 0 }

// clashes tells whether both can't be had, whatever the host has.
func (a Ask) clashes(b Ask) bool {
	if !a.fixed() || !b.fixed() || a.First != b.First || a.Proto != b.Proto {
		return false
	}
	all := func(x, y Ask) bool {
		return !x.Addr.IsValid() || x.Addr.IsUnspecified() && (!y.Addr.IsValid() || x.Addr.Is4() == y.Addr.Is4())
	}
	return a.Addr == b.Addr || all(a, b) || all(b, a)
}

// ParseAsk reads PORT, FIRST-LAST or ADDR:PORT, each with /PROTO or without.
func ParseAsk(s string) (Ask, error) {
	a := Ask{Proto: "tcp"}
	rest, proto, given := strings.Cut(s, "/")
	if given {
		a.Proto = strings.ToLower(proto)
	}
	if a.Proto != "tcp" && a.Proto != "udp" && a.Proto != "sctp" {
		return a, fmt.Errorf("%q: protocol %q: want tcp, udp or sctp", s, a.Proto)
	}
	if strings.Contains(rest, ":") {
		host, ports, err := net.SplitHostPort(rest)
		if err != nil {
			return a, fmt.Errorf("%q: %w", s, err)
		}
		if a.Addr, err = netip.ParseAddr(host); err != nil {
			return a, fmt.Errorf("%q: %w", s, err)
		}
		rest = ports
	}
	first, last, isRange := strings.Cut(rest, "-")
	if !isRange {
		last = first
	}
	var err error
	if a.First, err = parsePort(first); err == nil {
		a.Last, err = parsePort(last)
	}
	switch {
	case err != nil:
		return a, fmt.Errorf("%q: want PORT[/PROTO], FIRST-LAST, ADDR:PORT or a compose file: %w", s, err)
	case a.First > a.Last, isRange && a.First == 0:
		return a, fmt.Errorf("%q is no range of ports", s)
	}
	return a, nil
}

func parsePort(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	return int(n), err
}
