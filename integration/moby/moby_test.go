//go:build integration

// Package moby runs upstream's own integration tests, rootless and rootful, with a stock and with a patched dockerd: what passes
// with stock passes with Berth.
package moby

import (
	"context"
	"flag"
	"fmt"
	"iter"
	"os"
	"os/signal"
	"slices"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"berth/integration/hostload"
)

var (
	all   = flag.Bool("all", false, "run all of upstream's tests that start containers, rootless and rootful, and write the results; else a handful, rootless")
	times = flag.Int("times", 1, "how often to run the tests that fail by chance, with ports of the host held")
)

// packages are those that -all runs.
var packages = []string{"integration/networking", "integration/container", "integration/network/bridge"}

// beyondChance is how much less often in six a test must pass to be called worse: as much would come of chance in one of 25 cases at
// the most (Fisher's exact test). One that never passes is found.
const beyondChance = 4

// flaky fail now and then in upstream's CI, where others have ports on the host.
var flaky = []string{"TestMixAnyWithSpecificHostAddrs", "TestPublishAllWithNilPortBindings"}

// handful are those that publish ports with a rootless daemon, too.
var handful = append([]string{"TestDisableNAT", "TestPortMappingOnDistinctLoopbackAddrs"}, flaky...)

// interrupted ends when somebody presses Ctrl-C: then every host ends, and what it has left on the machine is removed.
var interrupted context.Context

func TestMain(m *testing.M) {
	interrupted, _ = signal.NotifyContext(context.Background(), os.Interrupt)
	os.Exit(m.Run())
}

func TestPassWithBerthWhatPassesWithStock(t *testing.T) {
	b := prepare(t)
	modes := []string{rootless}
	tests := suite{Packages: packages[:1], Run: handful, Times: 1}
	if *all {
		modes = []string{rootless, rootful}
		tests = suite{Packages: packages, Times: 1}
	}
	for _, mode := range modes {
		t.Run(mode, func(t *testing.T) {
			tests.Mode = mode
			stock, berth := b.both(t, tests)
			differ := append(worse(stock, berth), worse(berth, stock)...)
			if len(differ) == 0 {
				return
			}
			// Some of upstream's tests look at the clock, and fail now and then with either.
			t.Logf("once more, since they passed with one only: %s", differ)
			again := tests
			again.Run = topLevel(slices.Values(differ))
			again.Times = 5
			stockAgain, berthAgain := b.both(t, again)
			for name := range stockAgain {
				s, w := add(stock[name], stockAgain[name]), add(berth[name], berthAgain[name])
				if s.Pass >= w.Pass+beyondChance {
					t.Errorf("%s: with stock %v, with Berth %v", name, s, w)
				}
			}
		})
	}
}

func TestHeldPorts(t *testing.T) {
	b := prepare(t)
	holds := [][]string{{"tcp", "udp"}}
	if *all {
		holds = append(holds, []string{"tcp"})
	}
	for _, hold := range holds {
		t.Run(strings.Join(hold, " and "), func(t *testing.T) {
			tests := suite{Mode: rootless, Packages: packages[:1], Run: flaky, Times: *times, Hold: hold}
			stock, berth := b.both(t, tests)
			assert.Check(t, total(stock).Fail > 0, "stock publishes, too: this is not what upstream's CI has seen")
			for name, result := range berth {
				assert.Check(t, result == tally{Pass: *times}, "%s: %v", name, result)
			}
		})
	}
}

// held are the first 300 dynamic ports of the host.
func held(networks []string) []hostload.Load {
	var loads []hostload.Load
	for _, network := range networks {
		l := hostload.Load{Network: network + "4"}
		for port := 32768; port <= 33067; port++ {
			l.Ports = append(l.Ports, port)
		}
		loads = append(loads, l)
	}
	return loads
}

// tally is what became of a test's runs.
type tally struct {
	Pass, Fail, Skip int
}

func (r tally) String() string {
	var parts []string
	for _, part := range []struct {
		n    int
		what string
	}{{r.Pass, "pass"}, {r.Fail, "fail"}, {r.Skip, "skip"}} {
		if part.n > 0 {
			parts = append(parts, fmt.Sprint(part.n, " ", part.what))
		}
	}
	if len(parts) == 0 {
		return "did not run"
	}
	return strings.Join(parts, ", ")
}

func add(a, b tally) tally { return tally{a.Pass + b.Pass, a.Fail + b.Fail, a.Skip + b.Skip} }

// worse names the tests that pass less often with Berth than with stock, in order.
func worse(stock, berth map[string]tally) []string {
	var names []string
	for name, s := range stock {
		if berth[name].Pass < s.Pass {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// topLevel are the names of the test functions that these tests are in, each once.
func topLevel(names iter.Seq[string]) []string {
	var list []string
	for name := range names {
		_, test, _ := strings.Cut(name, ".")
		function, _, _ := strings.Cut(test, "/")
		list = append(list, function)
	}
	slices.Sort(list)
	return slices.Compact(list)
}

func needRoot(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("root makes a host of namespaces, and a user on it")
	}
}
