package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/moby/moby/client"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/checkout"
	"berth/integration/hostload"
)

// The intervals are those that others compute, too: Newcombe, Statistics in Medicine 17 (1998), page 861, method 3.
func TestWilson(t *testing.T) {
	for _, tt := range []struct {
		k, n      int
		low, high float64
	}{{81, 263, 0.2553, 0.3662}, {15, 148, 0.0624, 0.1605}, {0, 20, 0, 0.1611}, {1, 29, 0.0061, 0.1718}} {
		i := wilson(tt.k, tt.n)
		assert.Equal(t, fmt.Sprintf("%.4f %.4f", i.Low, i.High), fmt.Sprintf("%.4f %.4f", tt.low, tt.high))
	}
	assert.Equal(t, wilson(0, 0), Interval{0, 0, 1})
}

func TestCauses(t *testing.T) {
	for text, want := range map[string]string{
		"failed to bind host port 0.0.0.0:32768/tcp: address already in use":                                              inUse,
		"Bind for 0.0.0.0:32768 failed: port is already allocated":                                                        inUse,
		"on a dynamic host port (1-9) of [::]: 5700 tried, none was had in 2s: listen tcp4: bind: address already in use": gaveUp,
		"no space left on device": other,
	} {
		assert.Equal(t, cause(errors.New(text)), want, text)
	}
}

func TestUnknownNamesAreErrors(t *testing.T) {
	for _, o := range []Options{{Contenders: []string{"x"}}, {Loads: []string{"none", "x"}}, {Requests: []string{"x"}}} {
		_, err := o.scenes()
		assert.ErrorContains(t, err, `"x": --list has them`)
	}
	o := Options{Contenders: []string{"stock"}, Loads: []string{"none", "row-100"}, Requests: []string{"tcp"}}
	list, err := o.scenes()
	assert.NilError(t, err)
	assert.Equal(t, len(list), 2)
}

// fake is a daemon whose n-th start is what becomes says: published, misdelivered, or an error.
type fake struct {
	becomes func(n int) string
	stays   int // a container that cannot be removed
	started atomic.Int32
	has     atomic.Int32 // containers
}

func (f *fake) up(t *testing.T) func(place) (*daemon, error) {
	mux := http.NewServeMux()
	write := func(w http.ResponseWriter, v any) { json.NewEncoder(w).Encode(v) }
	id := func(n int) string { return fmt.Sprintf("%012x%052d", n, 0) }
	at := map[int]netip.AddrPort{} // on the host, of who answers with that id
	mux.HandleFunc("GET /{v}/version", func(w http.ResponseWriter, _ *http.Request) { write(w, map[string]string{"Version": "1"}) })
	mux.HandleFunc("POST /{v}/images/create", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("POST /{v}/containers/create", func(w http.ResponseWriter, _ *http.Request) {
		f.has.Add(1)
		w.WriteHeader(http.StatusCreated)
		write(w, map[string]string{"Id": id(int(f.started.Add(1)))})
	})
	n := func(r *http.Request) (n int) {
		fmt.Sscanf(r.PathValue("id"), "%12x", &n)
		return n
	}
	mux.HandleFunc("DELETE /{v}/containers/{id}", func(w http.ResponseWriter, r *http.Request) {
		if n(r) == f.stays {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		f.has.Add(-1)
	})
	mux.HandleFunc("POST /{v}/containers/{id}/start", func(w http.ResponseWriter, r *http.Request) {
		if says := f.becomes(n(r)); says != published && says != misdelivered {
			w.WriteHeader(http.StatusInternalServerError)
			write(w, map[string]string{"message": says})
		}
	})
	mux.HandleFunc("GET /{v}/containers/{id}/json", func(w http.ResponseWriter, r *http.Request) {
		who := n(r)
		if f.becomes(who) == misdelivered {
			who = 0
		}
		ports := map[string][]map[string]string{"80/tcp": {{"HostIp": at[who].Addr().String(), "HostPort": fmt.Sprint(at[who].Port())}}}
		write(w, map[string]any{"Id": r.PathValue("id"), "NetworkSettings": map[string]any{"Ports": ports}})
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return func(place) (*daemon, error) {
		for n := range 110 {
			says := id(n) // the 0-th is a stranger
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, says[:12]) }))
			t.Cleanup(s.Close)
			at[n] = netip.MustParseAddrPort(s.Listener.Addr().String())
		}
		c, err := client.New(client.WithHost("tcp://"+server.Listener.Addr().String()), client.WithAPIVersion("1.50"))
		return &daemon{Client: c, log: os.DevNull, down: c.Close}, err
	}
}

// measure is of a scene with no load in which the fakes take turns; the program of all of them is a file that there is.
func measure(t *testing.T, ctx context.Context, file string, contenders ...Contender) (*Results, string, error) {
	t.Helper()
	return measureUnder(t, ctx, loads[0], file, contenders...)
}

func measureUnder(t *testing.T, ctx context.Context, load Load, file string, contenders ...Contender) (*Results, string, error) {
	t.Helper()
	root, err := checkout.Root()
	assert.NilError(t, err)
	results, err := LoadResults(file)
	assert.NilError(t, err)
	var said strings.Builder
	r := run{Options: Options{Root: root, Starts: 10, Parallel: 2, Progress: NewProgress(&said)}, results: results, sums: map[string]string{}}
	for i := range contenders {
		contenders[i].program = filepath.Join(root, "go.mod")
	}
	err = r.scene(ctx, scene{load, requests[0], contenders})
	return results, said.String(), err
}

func TestEachStartIsChecked(t *testing.T) {
	f := &fake{becomes: func(n int) string {
		switch n {
		case 3:
			return misdelivered
		case 4:
			return "bind: address already in use"
		case 5:
			return "out of luck"
		}
		return published
	}}
	file := filepath.Join(t.TempDir(), "results", "stress.json")
	results, _, err := measure(t, t.Context(), file,
		Contender{Name: "fake", up: f.up(t)},
		Contender{Name: "none", up: func(place) (*daemon, error) { return nil, errors.New("not on this machine") }})
	assert.NilError(t, err)
	assert.Equal(t, f.has.Load(), int32(0))
	assert.Equal(t, len(results.Cells), 2)
	s := results.Cells[0].Summary
	if results.Cells[0].CannotRun != "" {
		s = results.Cells[1].Summary
	}
	assert.Check(t, is.Equal(s.Starts, 10))
	assert.Check(t, is.Equal(s.Published, 7))
	assert.Check(t, is.Equal(s.Misdelivered, 1))
	assert.Check(t, is.DeepEqual(s.Refused, map[string]int{inUse: 1, other: 1}))
	assert.Check(t, is.Equal(s.FailureRate, wilson(3, 10)))
	assert.Check(t, s.P50 > 0 && s.P99 >= s.P95 && s.P95 >= s.P50 && s.PerSecond > 0, "%+v", s)
	var table strings.Builder
	results.Print(&table)
	assert.Check(t, is.Contains(table.String(), "tcp none none: cannot run here: not on this machine\n"))

	again, said, err := measure(t, t.Context(), file, Contender{Name: "fake", up: f.up(t)})
	assert.NilError(t, err)
	assert.Check(t, is.Contains(said, "tcp none fake: measured before\n"))
	assert.Equal(t, f.started.Load(), int32(10), "it was measured again")
	assert.Equal(t, len(again.Cells), 2)
}

// Where a load's cost is claimed there are more turns, each beside one without the load, of which only the time is kept.
func TestPacedTurnsHaveOneWithoutTheLoad(t *testing.T) {
	f := &fake{becomes: func(int) string { return published }}
	results, _, err := measureUnder(t, t.Context(), Load{Name: "none", paced: true}, filepath.Join(t.TempDir(), "stress.json"),
		Contender{Name: "berth", up: f.up(t), berth: true, paced: true})
	assert.NilError(t, err)
	c := results.Cells[0]
	assert.Check(t, is.Equal(len(c.Starts), 10*often))
	assert.Check(t, is.Equal(len(c.Turns), turns*often))
	for _, turn := range c.Turns {
		assert.Check(t, turn.Idle > 0, "%v", turn)
	}
	assert.Equal(t, f.started.Load(), int32(2*10*often))

	s := scene{Load{row: 1, paced: true}, requests[0], nil}
	assert.Equal(t, len(s.shares(Contender{Name: "stock"})), 1)
	shares := s.shares(Contender{Name: "berth", paced: true})
	assert.Equal(t, len(shares), 2)
	assert.Equal(t, shares[0].Load, s.Load)
	assert.Equal(t, shares[1].Load, Load{})
}

// A turn that breaks ends its cell, which says so, and no other one.
func TestBrokenTurnIsTold(t *testing.T) {
	all := func(int) string { return published }
	broken, well := &fake{becomes: all, stays: 3}, &fake{becomes: all}
	file := filepath.Join(t.TempDir(), "stress.json")
	results, _, err := measure(t, t.Context(), file, Contender{Name: "broken", up: broken.up(t)}, Contender{Name: "well", up: well.up(t)})
	assert.NilError(t, err)
	for _, c := range results.Cells {
		if c.Contender == "broken" {
			assert.Check(t, is.Contains(c.CannotRun, "turn 1: "))
			assert.Check(t, is.Equal(len(c.Starts), 4))
		} else {
			assert.Check(t, is.Equal(c.Summary.Published, 10))
		}
	}
}

func TestInterruptedRunKeepsWhatItHas(t *testing.T) {
	ctx, interrupt := context.WithCancelCause(t.Context())
	f := &fake{}
	f.becomes = func(n int) string {
		if n == 5 {
			interrupt(errors.New("interrupted"))
		}
		return published
	}
	file := filepath.Join(t.TempDir(), "stress.json")
	_, _, err := measure(t, ctx, file, Contender{Name: "fake", up: f.up(t)})
	assert.ErrorContains(t, err, "interrupted")
	assert.Equal(t, f.has.Load(), int32(0))
	results, err := LoadResults(file)
	assert.NilError(t, err)
	had := results.Cells[0].Summary
	assert.Check(t, had.Starts >= 4 && had.Starts < 10 && had.Published == had.Starts, "%+v", had)

	results, _, err = measure(t, t.Context(), file, Contender{Name: "fake", up: f.up(t)})
	assert.NilError(t, err)
	assert.Equal(t, len(results.Cells), 1)
	assert.Equal(t, results.Cells[0].Summary.Published, 10)
}

// A load holds as many dynamic ports of the host as it says, the same ones each time, and lets go of them.
func TestLoadsHoldWhatTheySay(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("a host of its own takes root")
	}
	h, err := newHost()
	assert.NilError(t, err)
	defer h.close()
	taken := func() (ports []int) {
		sockets, err := netlink.SocketDiagTCP(unix.AF_INET)
		assert.NilError(t, err)
		for _, s := range sockets {
			const established, listen = 1, 10 // include/net/tcp_states.h
			if s.State == established || s.State == listen {
				ports = append(ports, int(s.ID.SourcePort))
			}
		}
		slices.Sort(ports)
		return slices.Compact(ports)
	}
	const need = 7
	assert.NilError(t, h.do(func() error {
		all, err := hostload.DynamicPorts(hostload.All)
		assert.NilError(t, err)
		some, err := choose("load", loads, []string{"row-100", "random-60", "churn-30", "outgoing", "spare"}, func(l Load) string { return l.Name })
		assert.NilError(t, err)
		for _, l := range some {
			want := l.row + int(l.share*float64(len(all))) + l.connect
			if l.spare {
				want = len(all) - need
			}
			var was []int
			rounds := 1
			if l.Name == "random-60" {
				rounds = 2
			}
			for range rounds {
				held, stop, err := l.start("tcp4", need, 1)
				assert.NilError(t, err, l.Name)
				assert.Check(t, is.Equal(len(held), want), l.Name)
				slices.Sort(held)
				switch now := taken(); {
				case l.churn:
				case l.connect > 0:
					assert.Check(t, is.Equal(len(now), want+1), l.Name) // and who serves
				default:
					assert.Check(t, slices.Equal(now, held), l.Name)
					assert.Check(t, was == nil || slices.Equal(was, held), l.Name)
				}
				if l.row > 0 {
					assert.Check(t, is.Equal(held[l.row-1], all[l.row-1]), l.Name)
				}
				was = held
				assert.NilError(t, stop(), l.Name)
			}
			assert.Check(t, is.Equal(len(taken()), 0), l.Name)
		}
		return nil
	}))
}

func TestRangesHaveAFreePort(t *testing.T) {
	ports, err := hostload.DynamicPorts(hostload.All)
	assert.NilError(t, err)
	from, err := ranges(ports[:2*width+1])
	assert.NilError(t, err)
	assert.Equal(t, from[0], ports[2*width])
}
