//go:build integration

package e2e

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
)

// kit is a port driver, with a network driver that serves it, and whether
// dockerd's process is where it can look at the host.
type kit struct {
	Driver  string `json:"port_driver"`
	Network string `json:"network_driver"`
	Detach  bool   `json:"detach_netns"`
}

func (k kit) String() string {
	if k.Detach {
		return k.Driver + ", detach-netns on"
	}
	return k.Driver + ", detach-netns off"
}

// saysWhy tells whether it is known why a port is refused: from the port
// driver, or from a look at the host.
func (k kit) saysWhy() bool { return k.Detach || k.Driver != "slirp4netns" }

// servesIPv6 tells whether the port driver listens on IPv6 addresses.
func (k kit) servesIPv6() bool { return k.Driver == "builtin" }

// outcome is what came of a start, as it is in build/results.
type outcome struct {
	kit
	Case         string   `json:"case"`
	Publish      string   `json:"publish"`
	Held         string   `json:"held_on_host,omitempty"` // by another process
	Published    []string `json:"published,omitempty"`
	Error        string   `json:"error,omitempty"`
	Milliseconds int64    `json:"ms"`
}

func (o outcome) String() string {
	if o.Error != "" {
		return fmt.Sprintf("refused, %d ms", o.Milliseconds)
	}
	at := o.Published[0]
	return fmt.Sprintf("published at %s, %d ms", at[strings.LastIndexByte(at, ':')+1:], o.Milliseconds)
}

// heldInARow is how many host ports another process has, from the next dynamic
// one on.
const heldInARow = 300

// heldFrom is hold of a matrixCase for ports that the user names.
func heldFrom(network string, first, count int) func(int) hostload.Load {
	return func(int) hostload.Load {
		return hostload.Load{Network: network, Ports: hostload.Range(first, first+count-1)}
	}
}

func heldFromNext(network string) func(int) hostload.Load {
	return func(next int) hostload.Load {
		return hostload.Load{Network: network, Ports: hostload.Range(next, next+heldInARow-1)}
	}
}

// matrixCase is a start that each kit is to do the same with, but for what it
// cannot know or serve.
type matrixCase struct {
	name, publish string
	hold          func(next int) hostload.Load // nil: nothing is held
	ports         []int                        // those that will do; nil: the dynamic ones that are not held
	refused       func(kit) []string           // what the error says, nil if it is published
}

var matrixCases = []matrixCase{
	{name: "dynamic", publish: "0:80", hold: heldFromNext("tcp4")},
	{name: "dynamic, UDP", publish: "0:80/udp", hold: heldFromNext("udp4")},
	{name: "dynamic, one address", publish: "127.0.0.1:0:80", hold: heldFromNext("tcp4")},
	{name: "dynamic, IPv6", publish: "[::1]:0:80", hold: heldFromNext("tcp6"), refused: func(k kit) []string {
		if k.servesIPv6() {
			return nil
		}
		return []string{"[::1]", "RootlessKit's port driver does not support tcp6"}
	}},
	{
		name: "range, last free", publish: "20000-20040:80",
		hold: heldFrom("tcp4", 20000, 40), ports: []int{20040},
	},
	{
		// Refusals that do not say why are put up with 64 times.
		name: "long range, last free", publish: "20500-20800:80",
		hold: heldFrom("tcp4", 20500, 300), ports: []int{20800},
		refused: func(k kit) []string {
			if k.saysWhy() {
				return nil
			}
			return []string{"20500-20800", "64 refusals do not say why"}
		},
	},
	{
		name: "range, none free", publish: "20900-20909:80",
		hold: heldFrom("tcp4", 20900, 10),
		refused: func(k kit) []string {
			return append(whyTaken(k), "20900-20909")
		},
	},
	{name: "fixed", publish: "21000:80", ports: []int{21000}},
	{name: "fixed, UDP", publish: "21000:80/udp", ports: []int{21000}},
	{
		name: "fixed, taken", publish: "21100:80", hold: heldFrom("tcp4", 21100, 1),
		refused: func(k kit) []string { return append(whyTaken(k), "21100") },
	},
}

// whyTaken is what the error for taken ports says.
func whyTaken(k kit) []string {
	if k.saysWhy() {
		return []string{"address already in use"}
	}
	return []string{"slirp_add_hostfwd failed"}
}

// Every port driver, with and without a view of the host. What came of it is
// also written to build/results/matrix.json.
func TestPortDriverMatrix(t *testing.T) {
	needsNamespace(t)
	var all []outcome
	for _, driver := range []struct{ name, network string }{
		{"builtin", "gvisor-tap-vsock"},
		{"gvisor-tap-vsock", "gvisor-tap-vsock"},
		{"slirp4netns", "slirp4netns"},
	} {
		for _, detach := range []bool{true, false} {
			k := kit{driver.name, driver.network, detach}
			t.Run(k.String(), func(t *testing.T) { all = append(all, runMatrix(t, k)...) })
		}
	}
	var table strings.Builder
	printMatrix(&table, all)
	t.Logf("\n%s", &table)
	if len(all) != 6*len(matrixCases) {
		return // -run chose some, or one has failed
	}
	stacktest.WriteResults(t, "matrix.json", all)
}

// runMatrix runs all cases on one stack, each with doctor asked before. The containers stay until its end, so
// that each must answer beside all others.
func runMatrix(t *testing.T, k kit) []outcome {
	d := stacktest.Start(t, "dockerd", stack.Options{Net: k.Network, PortDriver: k.Driver, NoDetachNetns: !k.Detach})
	var (
		outcomes []outcome
		answers  []func(*testing.T)
		own      = map[int]bool{} // host ports of the containers so far
	)
	whole := t // what is run for it stays to its end
	for _, c := range matrixCases {
		t.Run(c.name, func(t *testing.T) {
			o := outcome{kit: k, Case: c.name, Publish: c.publish}
			ports := c.ports
			if c.hold != nil {
				o.Held, ports = c.prepare(t, d, k, own)
			}
			says := examine(t, d, c.publish)
			begin := time.Now()
			id, err := d.Run(whole, c.publish)
			o.Milliseconds = time.Since(begin).Milliseconds()
			assertDoctorsWord(t, says, err)
			var published []netip.AddrPort
			if err != nil {
				// The CLI's own words stand around the daemon's.
				_, says, _ := strings.Cut(err.Error(), "Error response from daemon: ")
				o.Error, _, _ = strings.Cut(says, "\n")
				assert.Check(t, !strings.Contains(o.Error, "map["), "Go syntax: %s", o.Error)
			} else {
				published = d.Published(t, id)
			}
			for _, a := range published {
				o.Published = append(o.Published, a.String())
				own[int(a.Port())] = true
			}
			outcomes = append(outcomes, o)

			if want := c.wantError(k); want != nil {
				assert.Assert(t, err != nil, "published at %v", published)
				for _, text := range want {
					assert.Assert(t, is.Contains(o.Error, text))
				}
				return
			}
			assert.NilError(t, err)
			assert.Assert(t, len(published) > 0)
			network := networkOf(c.publish)
			for _, a := range published {
				assert.Assert(t, slices.Contains(ports, int(a.Port())), "published at %v", a)
				answer := func(t *testing.T) {
					t.Helper()
					stacktest.AssertAnswers(t, network, askAt(k, network, a), id)
				}
				answer(t)
				answers = append(answers, answer)
			}
		})
	}
	t.Run("all answer", func(t *testing.T) {
		for _, answer := range answers {
			answer(t)
		}
	})
	for _, c := range doctorCases {
		t.Run("doctor, "+c.name, func(t *testing.T) {
			if c.hold != nil {
				c.prepare(t, d, k, own)
			}
			says := examine(t, d, c.publish)
			_, err := d.Run(whole, c.publish)
			assertDoctorsWord(t, says, err)
		})
	}
	return outcomes
}

func (c matrixCase) wantError(k kit) []string {
	if c.refused == nil {
		return nil
	}
	return c.refused(k)
}

// prepare has another process hold what c wants held until the end of the test,
// and returns what that is, and the ports that will do. Without a view a container
// may have come out, at random, among those: own ports are taken already.
func (c matrixCase) prepare(t *testing.T, d *stacktest.Daemon, k kit, own map[int]bool) (held string, ports []int) {
	t.Helper()
	next := 0
	if strings.Contains(c.name, "dynamic") {
		next = nextPort(t, d, networkOf(c.publish))
	}
	l := c.hold(next)
	first, last := l.Ports[0], l.Ports[len(l.Ports)-1]
	l.Ports = slices.DeleteFunc(l.Ports, func(port int) bool { return own[port] })
	stacktest.Hold(t, l)
	held = fmt.Sprintf("%s %d-%d", l.Network, first, last)
	switch {
	case c.ports != nil:
		return held, c.ports
	case k.Detach:
		return held, []int{last + 1}
	}
	// Without a view the search jumps, and may come out anywhere.
	return held, slices.Concat(hostload.Range(firstDefault, first-1), hostload.Range(last+1, lastDefault))
}

// askAt is where to ask what is published at a. What a container answers to a
// datagram from the host's loopback, slirp4netns does not bring back.
func askAt(k kit, network string, a netip.AddrPort) netip.AddrPort {
	if k.Driver == "slirp4netns" && network == "udp" && a.Addr() == netip.IPv4Unspecified() {
		return netip.AddrPortFrom(netip.MustParseAddr(stacktest.Addresses[0]), a.Port())
	}
	return a
}

// printMatrix prints a line for each case, a column for each kit, and what the
// errors are.
func printMatrix(out io.Writer, all []outcome) {
	var kits []kit
	for _, o := range all {
		if !slices.Contains(kits, o.kit) {
			kits = append(kits, o.kit)
		}
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "case")
	for _, k := range kits {
		fmt.Fprintf(w, "\t%s", k)
	}
	for _, c := range matrixCases {
		fmt.Fprintf(w, "\n%s", c.name)
		for _, k := range kits {
			i := slices.IndexFunc(all, func(o outcome) bool { return o.kit == k && o.Case == c.name })
			if i < 0 {
				fmt.Fprint(w, "\t?")
				continue
			}
			fmt.Fprintf(w, "\t%s", all[i])
		}
	}
	fmt.Fprintln(w)
	w.Flush()
}
