// Package harness measures what becomes of container starts that publish a port, while a host's ports are taken: the same
// load for every contender, in turns, each start checked, and the results kept with their intervals. docs/measuring.md says
// how, and what the numbers cannot tell.
package harness

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"

	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/whoami"
)

// Contender is a daemon that is measured.
type Contender struct {
	Name, About string
	program     string        // in build/bin, or a path
	options     stack.Options // of a rootless stack
	up          func(place) (*daemon, error)
	beside      func(place) (*daemon, error) // of a second user, if that is another one
	berth       bool                         // it claims that each start is published, and its log has how many attempts that took
	paced       bool                         // what a load costs it is claimed
	request     string                       // the one that it serves, if only one
}

// contenders are all but the one of --dockerd.
var contenders = []Contender{
	{Name: "berth", About: "Berth, rootless, with a view of the host's ports", program: "dockerd", up: rootless, berth: true, paced: true},
	{Name: "berth-no-view", About: "Berth, rootless, with --detach-netns=false, as dind-rootless has it", program: "dockerd", up: rootless, berth: true, options: stack.Options{NoDetachNetns: true}},
	{Name: "stock", About: "upstream's daemon of the base, rootless", program: "dockerd-stock", up: rootless},
	{Name: "docker28", About: "Docker 28.5.2, rootless, with --detach-netns=false (`berth build docker28`)", program: "docker28", up: rootless, options: stack.Options{NoDetachNetns: true}},
	{Name: "podman", About: "the machine's podman, rootless", program: "runc", up: podman},
	{Name: "berth-rootful", About: "Berth, as root", program: "dockerd", up: rootful, beside: rootless, berth: true},
	{Name: "stock-rootful", About: "upstream's daemon of the base, as root", program: "dockerd-stock", up: rootful, beside: rootless},
	{Name: "berth-pasta", About: "Berth under pasta and its implicit port driver", program: "dockerd", up: rootless, options: pasta, request: "tcp4"},
	{Name: "stock-pasta", About: "upstream's daemon under the same", program: "dockerd-stock", up: rootless, options: pasta, request: "tcp4"},
}

// pasta's implicit port driver forwards what the daemon's own namespace listens on. It serves IPv4.
var pasta = stack.Options{Net: "pasta", PortDriver: "implicit"}

// Load is what the host does meanwhile.
type Load struct {
	Name, About string
	row         int     // so many of the first dynamic ports are held
	share       float64 // so many of all dynamic ports are held, chosen at random
	churn       bool    // a held one is released, and another taken, 1,000 times a second
	second      bool    // a second user's daemon starts half of what is started
	connect     int     // so many outgoing connections are open
	spare       bool    // as many dynamic ports are left free, at random, as a turn needs
	paced       bool    // what it costs is claimed
}

var loads = []Load{
	{Name: "none", About: "nothing"},
	{Name: "row-1", About: "the first dynamic port is held", row: 1},
	{Name: "row-10", About: "the first 10 dynamic ports are held", row: 10},
	{Name: "row-100", About: "the first 100 dynamic ports are held", row: 100},
	{Name: "row-1000", About: "the first 1,000 dynamic ports are held", row: 1000},
	{Name: "row-17000", About: "the first 17,000 dynamic ports are held", row: 17000},
	{Name: "random-30", About: "30% of the dynamic ports are held, at random", share: 0.3},
	{Name: "random-60", About: "60% of them", share: 0.6, paced: true},
	{Name: "random-90", About: "90% of them", share: 0.9},
	{Name: "random-99", About: "99% of them", share: 0.99},
	{Name: "churn-30", About: "as random-30, and 1,000 times a second one is released and another taken", share: 0.3, churn: true},
	{Name: "churn-60", About: "the same, of random-60", share: 0.6, churn: true, paced: true},
	{Name: "churn-90", About: "the same, of random-90", share: 0.9, churn: true},
	{Name: "churn-99", About: "the same, of random-99", share: 0.99, churn: true},
	{Name: "user", About: "a second user's daemon starts half of the containers", second: true},
	{Name: "outgoing", About: "1,000 outgoing connections are open", connect: 1000},
	{Name: "spare", About: "as many dynamic ports are left free, at random, as are needed", spare: true},
}

// Request is what a start asks for.
type Request struct {
	Name, About string
	network     string     // that its host ports are of, as of [hostload.Load]
	hostIP      netip.Addr // none is all of both families
	hostPort    string     // "" is from a range of the start's own
	ports       []string
	all         bool // the ports are exposed, and all that are exposed are published
	share       int  // a start is as much work as so many others: there are fewer of them
}

// width is how many ports a range has.
const width = 16

var requests = []Request{
	{Name: "tcp", About: "-p 0:80, on both families", network: "tcp4", hostPort: "0", ports: []string{"80/tcp"}, share: 1},
	{Name: "tcp4", About: "-p 0.0.0.0:0:80", network: "tcp4", hostIP: netip.IPv4Unspecified(), hostPort: "0", ports: []string{"80/tcp"}, share: 1},
	{Name: "udp", About: "-p 0:80/udp, on both families", network: "udp4", hostPort: "0", ports: []string{"80/udp"}, share: 1},
	{Name: "range", About: "-p RANGE:80, of 16 dynamic ports of which one is free at least", network: "tcp4", ports: []string{"80/tcp"}, share: 1},
	{Name: "all", About: "-P, with 4 exposed ports", network: "tcp4", ports: []string{"80/tcp", "80/udp", "81/tcp", "82/tcp"}, all: true, share: 1},
	{Name: "fifty", About: "50 dynamic ports (a tenth of the starts)", network: "tcp4", hostPort: "0", ports: fifty(), share: 10},
}

func fifty() (ports []string) {
	for p := range 50 {
		ports = append(ports, fmt.Sprintf("%d/tcp", 80+p))
	}
	return ports
}

// container is what is started, with the range from that port if it is of one.
func (r Request) container(from int) client.ContainerCreateOptions {
	config, host := &container.Config{Image: whoami.Image}, &container.HostConfig{PublishAllPorts: r.all}
	exposed, bindings := network.PortSet{}, network.PortMap{}
	var more []string // than whoami's own port
	for _, p := range r.ports {
		port := network.MustParsePort(p)
		exposed[port] = struct{}{}
		b := network.PortBinding{HostIP: r.hostIP, HostPort: r.hostPort}
		if r.hostPort == "" {
			b.HostPort = fmt.Sprintf("%d-%d", from, from+width-1)
		}
		bindings[port] = []network.PortBinding{b}
		if n := fmt.Sprint(port.Num()); port.Proto() == network.TCP && n != "80" {
			more = append(more, n)
		}
	}
	config.Env = []string{"PORTS=" + strings.Join(more, " ")}
	if config.ExposedPorts = exposed; !r.all {
		host.PortBindings = bindings
	}
	return client.ContainerCreateOptions{Config: config, HostConfig: host}
}

// ranges are the starts of those of the host that we are on that have a port that is not held.
func ranges(held []int) (from []int, _ error) {
	ports, err := hostload.DynamicPorts(hostload.All)
	if err != nil {
		return nil, err
	}
	taken := map[int]bool{}
	for _, p := range held {
		taken[p] = true
	}
	for r := range slices.Chunk(ports, width) {
		if len(r) == width && slices.ContainsFunc(r, func(p int) bool { return !taken[p] }) {
			from = append(from, r[0])
		}
	}
	return from, nil
}

// scene is a load and a request, for those who take turns at it.
type scene struct {
	Load
	Request
	contenders []Contender
}

const (
	turns = 5 // of a contender in a cell
	// often is how many times as many there are where a load's cost is claimed: one turn's pace is told no closer than a tenth.
	often = 5
)

// turns are those that the contender takes.
func (s scene) turns(c Contender) int {
	if s.costs(c) {
		return often * turns
	}
	return turns
}

// costs is whether it is claimed what the load costs the contender.
func (s scene) costs(c Contender) bool {
	return s.paced && c.paced && s.Request.Name == requests[0].Name
}

// shares are what a turn consists of: the scene, and the same without the load where its cost is claimed.
func (s scene) shares(c Contender) []scene {
	if !s.costs(c) {
		return []scene{s}
	}
	idle := s
	idle.Load = Load{}
	return []scene{s, idle}
}

// scenes are those that the options choose.
func (o *Options) scenes() (list []scene, _ error) {
	if o.Full {
		// Every contender and load once, and with some and with many ports held each other request of Berth and stock, and those
		// that serve one request only.
		for _, some := range []Options{
			{Requests: []string{"tcp"}},
			{Requests: []string{"udp", "range", "all", "fifty"}, Contenders: []string{"berth", "stock"}, Loads: []string{"row-100", "random-60"}},
			{Requests: []string{"tcp4"}, Contenders: []string{"berth-pasta", "stock-pasta"}, Loads: []string{"row-100", "random-60"}},
		} {
			scenes, err := some.scenes()
			if err != nil {
				return nil, err
			}
			list = append(list, scenes...)
		}
		return list, nil
	}
	known := slices.Clone(contenders)
	if o.Dockerd != "" {
		known = append(known, Contender{Name: "file", About: o.Dockerd, program: o.Dockerd, up: rootless})
	}
	chosen, err := choose("contender", known, o.Contenders, func(c Contender) string { return c.Name })
	if err != nil {
		return nil, err
	}
	under, err := choose("load", loads, o.Loads, func(l Load) string { return l.Name })
	if err != nil {
		return nil, err
	}
	asked, err := choose("request", requests, o.Requests, func(r Request) string { return r.Name })
	for _, r := range asked {
		able := slices.DeleteFunc(slices.Clone(chosen), func(c Contender) bool { return c.request != "" && c.request != r.Name })
		for _, l := range under {
			list = append(list, scene{l, r, able})
		}
	}
	return list, err
}

// ErrUnknown is of a name that the tables do not have.
var ErrUnknown = errors.New("there is no")

// choose returns those of the names, or all.
func choose[T any](what string, all []T, names []string, name func(T) string) (chosen []T, _ error) {
	if len(names) == 0 {
		return all, nil
	}
	for _, n := range names {
		i := slices.IndexFunc(all, func(v T) bool { return name(v) == n })
		if i < 0 {
			return nil, fmt.Errorf("%w %s %q: --list has them", ErrUnknown, what, n)
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}

// List prints what there is to choose from.
func List(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, c := range contenders {
		fmt.Fprintf(w, "contender\t%s\t%s\n", c.Name, c.About)
	}
	for _, l := range loads {
		fmt.Fprintf(w, "load\t%s\t%s\n", l.Name, l.About)
	}
	for _, r := range requests {
		fmt.Fprintf(w, "request\t%s\t%s\n", r.Name, r.About)
	}
	w.Flush()
}
