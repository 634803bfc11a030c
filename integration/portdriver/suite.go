// Package portdriver has one suite for everything that answers as RootlessKit's
// port drivers do, in the manner of rootlesskit's own pkg/port/testsuite: the
// drivers themselves, and the fake of the patch's tests.
//
// The suite does not judge. It says what a driver answered, and what Berth's
// port mapper did about it: drivers can be compared then, and docs/port-drivers.md
// be written of it.
package portdriver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
)

// Client is nat.PortDriverClient. The patch's own tests take part in the suite,
// so it does not import the patch.
type Client interface {
	ChildHostIP(proto string, hostIP netip.Addr) netip.Addr
	AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, hostPort int) (func() error, error)
}

// Driver is a port driver, and what is around it.
type Driver struct {
	Client
	// Mapper returns a port mapper, at work in the child namespace, that asks c.
	Mapper func(c Client) portmapperapi.PortMapper
	// Hold makes another process have count ports from first on, at a host
	// address; network is "tcp4" or the like.
	Hold func(network, addr string, first, count int) (release func() error, err error)
	// Ports returns the first of count ports that are free on the host and in the child.
	Ports func(count int) (first int, err error)
}

// Case is a request for a host port, and what is in its way.
type Case struct {
	Name  string         // as a subtest's
	Proto types.Protocol // of the request
	Addrs []string       // the host addresses of the request
	Held  []string       // where another process has the first Holds ports, "tcp4 0.0.0.0" or the like
	Holds int            // how many
	Own   []string       // the host addresses where this RootlessKit exposes the first port already
	Size  int            // the size of the range that is requested, too
	First int            // the first port; 0 is any

	// Free is where the range comes out, if the driver serves the protocol: the
	// first port is 0. It is -1 if none of the range is to be had. The first
	// port by itself is to be had if Free is 0.
	Free int
}

// Result is what came of a case.
type Result struct {
	Case   string
	Served []string // those of the case's host addresses where the driver serves the protocol
	// Answer is the driver's error for the first port, "" if it exposes it.
	Answer string
	// Verdict is what a search makes of the answer, [Another] or another.
	Verdict string `json:",omitempty"`
	// Fixed is what the port mapper did when asked for the first port, and Range
	// when asked for any in the range.
	Fixed, Range Outcome
}

// Outcome is what came of a call of MapPorts.
type Outcome struct {
	Asked     []string // what the driver was asked for, each once
	Published []string `json:",omitempty"`
	Error     string   `json:",omitempty"`
}

// In a Result, the first port is PORT, the next one PORT+1, and an id is N.

// What a search makes of a refusal.
const (
	Another = "another port"
	Maybe   = "maybe another port"
	No      = "no port"
)

// LastPrivileged is the last port that takes a privilege on a host whose
// net.ipv4.ip_unprivileged_port_start is the kernel's default.
const LastPrivileged = 1023

// Cases returns the suite's cases.
func Cases() []Case {
	var cases []Case
	add := func(c Case) {
		c.Holds, c.Size = max(c.Holds, 1), max(c.Size, 2)
		cases = append(cases, c)
	}
	for _, proto := range []types.Protocol{types.TCP, types.UDP} {
		for _, family := range []struct{ name, wildcard, loopback, another, absent, otherFamily string }{
			{"4", "0.0.0.0", "127.0.0.2", "127.0.0.3", "10.1.2.3", "6 ::"},
			{"6", "::", "::1", "", "fd00:1:2::3", "4 0.0.0.0"},
		} {
			network := proto.String() + family.name
			on := func(addr string) []string { return []string{network + " " + addr} }
			add := func(name, addr string, c Case) {
				c.Name, c.Proto, c.Addrs = network+"/"+name, proto, []string{addr}
				add(c)
			}
			add("free", family.wildcard, Case{})
			add("free on one address", family.loopback, Case{})
			add("taken by another process", family.wildcard, Case{Held: on(family.wildcard), Free: 1})
			add("taken on one address, asked for on all", family.wildcard, Case{Held: on(family.loopback), Free: 1})
			add("taken on all addresses, asked for on one", family.loopback, Case{Held: on(family.wildcard), Free: 1})
			add("taken in the other family", family.wildcard, Case{Held: []string{proto.String() + family.otherFamily}})
			add("same mapping twice", family.wildcard, Case{Own: []string{family.wildcard}, Free: 1})
			add("exposed on one address, asked for on all", family.wildcard, Case{Own: []string{family.loopback}, Free: 1})
			add("exposed on all addresses, asked for on one", family.loopback, Case{Own: []string{family.wildcard}, Free: 1})
			if family.another != "" {
				add("taken on another address", family.another, Case{Held: on(family.loopback)})
				add("exposed on another address", family.another, Case{Own: []string{family.loopback}})
			}
			add("privileged", family.wildcard, Case{First: LastPrivileged, Free: 1})
			add("address not on the host", family.absent, Case{Free: -1})
			add("range with only the last free", family.wildcard, Case{Held: on(family.wildcard), Holds: 3, Size: maxSize, Free: 3})
			add("range exhausted", family.wildcard, Case{Held: on(family.wildcard), Holds: 3, Size: 3, Free: -1})
		}
		both := []string{"0.0.0.0", "::"}
		add(Case{Name: proto.String() + "/both families, free", Proto: proto, Addrs: both})
		add(Case{Name: proto.String() + "/both families, taken in the first", Proto: proto, Addrs: both, Held: []string{proto.String() + "4 0.0.0.0"}, Free: 1})
		add(Case{Name: proto.String() + "/both families, taken in the second", Proto: proto, Addrs: both, Held: []string{proto.String() + "6 ::"}, Free: 1})
	}
	add(Case{Name: "sctp4/free", Proto: types.SCTP, Addrs: []string{"0.0.0.0"}, Free: -1})
	add(Case{Name: "sctp6/free", Proto: types.SCTP, Addrs: []string{"::"}, Free: -1})
	return cases
}

// Run runs the suite. It returns an error if something around the driver fails,
// and if anything that was undone is still there.
func (d Driver) Run(ctx context.Context) ([]Result, error) {
	var results []Result
	for _, c := range Cases() {
		r, err := d.run(ctx, c)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.Name, err)
		}
		results = append(results, r)
	}
	for _, proto := range []types.Protocol{types.TCP, types.UDP} {
		r, err := d.removeTwice(ctx, proto)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", r.Case, err)
		}
		results = append(results, r)
	}
	return results, nil
}

func (d Driver) run(ctx context.Context, c Case) (_ Result, retErr error) {
	r := Result{Case: c.Name}
	first := c.First
	if first == 0 {
		var err error
		if first, err = d.Ports(c.Size); err != nil {
			return r, err
		}
	}
	for _, held := range c.Held {
		network, addr, _ := strings.Cut(held, " ")
		release, err := d.Hold(network, addr, first, c.Holds)
		if err != nil {
			return r, err
		}
		defer func() { retErr = errors.Join(retErr, release()) }()
	}
	for _, addr := range d.served(c.Proto, c.Own) {
		remove, err := d.addPort(ctx, c.Proto, addr, first)
		if err != nil {
			return r, err
		}
		defer func() { retErr = errors.Join(retErr, remove()) }()
	}

	addrs := c.Addrs
	if r.Served = d.served(c.Proto, addrs); r.Served != nil {
		addrs = r.Served
	}
	answer, err := d.ask(ctx, c.Proto, addrs, first)
	if err != nil {
		return r, err
	}
	if answer != nil {
		r.Answer = normalize(answer.Error(), first)
		if r.Verdict, err = d.verdict(answer); err != nil {
			return r, err
		}
	}
	if r.Fixed, err = d.mapPorts(ctx, c, first, first); err != nil {
		return r, err
	}
	r.Range, err = d.mapPorts(ctx, c, first, first+c.Size-1)
	return r, err
}

// served returns those of addrs where the driver serves proto.
func (d Driver) served(proto types.Protocol, addrs []string) (served []string) {
	for _, addr := range addrs {
		if d.ChildHostIP(proto.String(), netip.MustParseAddr(addr)).IsValid() {
			served = append(served, addr)
		}
	}
	return served
}

func (d Driver) addPort(ctx context.Context, proto types.Protocol, addr string, port int) (remove func() error, _ error) {
	hostIP := netip.MustParseAddr(addr)
	// As the port mapper does: an outcome that is not known could not be undone.
	return d.AddPort(context.WithoutCancel(ctx), proto.String(), hostIP, d.ChildHostIP(proto.String(), hostIP), port)
}

// ask returns the driver's first refusal to expose the port on all of addrs.
func (d Driver) ask(ctx context.Context, proto types.Protocol, addrs []string, port int) (refusal, err error) {
	for _, addr := range addrs {
		remove, refusal := d.addPort(ctx, proto, addr, port)
		if refusal != nil {
			return refusal, err
		}
		defer func() { err = errors.Join(err, remove()) }()
	}
	return nil, nil
}

// mapPorts has Berth's port mapper publish a port in [first, last], and undoes it.
func (d Driver) mapPorts(ctx context.Context, c Case, first, last int) (Outcome, error) {
	var o Outcome
	w := &witness{Client: d.Client}
	pm := d.Mapper(w)
	pbs, err := pm.MapPorts(ctx, request(c.Proto, c.Addrs, first, last))
	for _, pb := range pbs {
		o.Published = append(o.Published, pb.HostIP.String()+" "+name(int(pb.HostPort), first))
	}
	for _, port := range w.asked {
		if p := name(port, first); !slices.Contains(o.Asked, p) {
			o.Asked = append(o.Asked, p)
		}
	}
	if err != nil {
		o.Error = normalize(err.Error(), first)
	}
	return o, pm.UnmapPorts(ctx, pbs)
}

// removeTwice exposes a port, and has RootlessKit lose it before the port mapper
// removes it.
func (d Driver) removeTwice(ctx context.Context, proto types.Protocol) (Result, error) {
	r := Result{Case: proto.String() + "4/removed twice"}
	first, err := d.Ports(1)
	if err != nil {
		return r, err
	}
	w := &witness{Client: d.Client}
	pm := d.Mapper(w)
	pbs, err := pm.MapPorts(ctx, request(proto, []string{"0.0.0.0"}, first, first))
	if err != nil {
		return r, err
	}
	if err := w.remove(); err != nil {
		return r, err
	}
	if err := w.remove(); err != nil {
		r.Answer = normalize(err.Error(), first)
	}
	if err := pm.UnmapPorts(ctx, pbs); err != nil {
		r.Fixed.Error = normalize(err.Error(), first)
	}
	return r, nil
}

// verdict shows how Berth's search takes a refusal: by what it does when all
// ports of a range are refused with it. Those take a privilege, so that a
// refusal which says so is believed.
func (d Driver) verdict(refusal error) (string, error) {
	const first, size = 900, 65 // more than the 64 refusals that do not say why
	w := &witness{Client: refuser{refusal}}
	pbs, err := d.Mapper(w).MapPorts(context.Background(), request(types.TCP, []string{"127.0.0.1"}, first, first+size-1))
	if err == nil {
		return "", fmt.Errorf("refused ports were published: %v", pbs)
	}
	switch n := len(w.asked); n {
	case 1:
		return No, nil
	case 64:
		return Maybe, nil
	case size:
		return Another, nil
	default:
		return "", fmt.Errorf("%d of %d ports asked for: %w", n, size, err)
	}
}

// refuser refuses all with one error.
type refuser struct{ err error }

func (refuser) ChildHostIP(string, netip.Addr) netip.Addr { return netip.MustParseAddr("127.0.0.1") }

func (r refuser) AddPort(context.Context, string, netip.Addr, netip.Addr, int) (func() error, error) {
	return nil, r.err
}

// witness sees what a Client is asked for. A search asks for one thing at a time.
type witness struct {
	Client
	asked  []int
	remove func() error // of what was exposed last
}

func (w *witness) AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, hostPort int) (func() error, error) {
	w.asked = append(w.asked, hostPort)
	var err error
	w.remove, err = w.Client.AddPort(ctx, proto, hostIP, childIP, hostPort)
	return w.remove, err
}

func request(proto types.Protocol, addrs []string, first, last int) []portmapperapi.PortBindingReq {
	var reqs []portmapperapi.PortBindingReq
	for _, addr := range addrs {
		reqs = append(reqs, portmapperapi.PortBindingReq{PortBinding: types.PortBinding{
			Proto:       proto,
			Port:        80,
			HostIP:      netip.MustParseAddr(addr).AsSlice(),
			HostPort:    uint16(first),
			HostPortEnd: uint16(last),
		}})
	}
	return reqs
}

const maxSize = 4 // of a case's range

var (
	numbers = regexp.MustCompile(`\b[0-9]+\b`)
	ids     = regexp.MustCompile(`(?i)\b(id:? )[0-9]+`)
)

// normalize takes what differs from one run to the next out of a text: the
// ports, and RootlessKit's ids.
func normalize(text string, first int) string {
	text = ids.ReplaceAllString(strings.TrimSpace(text), "${1}N")
	return numbers.ReplaceAllStringFunc(text, func(s string) string {
		if n, _ := strconv.Atoi(s); n == first || n > LastPrivileged+1 && first < n && n < first+maxSize {
			return name(n, first)
		}
		return s
	})
}

func name(port, first int) string {
	if port == first {
		return "PORT"
	}
	return fmt.Sprintf("PORT+%d", port-first)
}
