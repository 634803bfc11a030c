//go:build integration

// Package upstream holds Berth to upstream, on the default base or on those that -bases names: the patched package has upstream's
// API, the patched dockerd is made of the same modules, and what passes of upstream's tests in the stock tree passes in the patched one.
package upstream

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"text/tabwriter"

	"gotest.tools/v3/assert"

	"berth/hack/build"
	"berth/hack/checkout"
	"berth/hack/pins"
)

var (
	bases = flag.String("bases", "", "build these bases' daemons first: `VERSION[,VERSION]`, or all of vendor.conf's; without, the default one that is built")
	table = flag.String("table", "", "write what came of it to this `FILE`, too")
)

// base is one version of upstream, with what was built of it.
type base struct {
	pins.Pin
	root         string
	bin          string
	stock, berth string // its trees
	stepsTested  bool   // the tests run after each commit of the series, too
	said         string // what the check that runs tells the table
}

// tell notes for the table what a check has shown.
func (b *base) tell(format string, args ...any) { b.said = fmt.Sprintf(format, args...) }

var checks = []struct {
	name string
	run  func(*testing.T, *base)
}{
	{"API", sameAPI},
	{"Modules", sameModules},
	{"UnitTests", unitTestsHold},
	{"Series", seriesHolds},
}

func TestBases(t *testing.T) {
	root, err := checkout.Root()
	assert.NilError(t, err)
	list, err := pins.Load(filepath.Join(root, "vendor.conf"))
	assert.NilError(t, err)
	if *table != "" {
		*table, err = filepath.Abs(*table)
		assert.NilError(t, err)
	}
	var rows [][]string
	for _, b := range chosen(t, root, list) {
		t.Run(b.Version, func(t *testing.T) {
			if *bases != "" {
				o := build.Options{}
				if b.bin != o.Bin(root) {
					o.Base = b.Version
				}
				fmt.Printf("%s: the daemon, in %s\n", b.Version, o.Bin(root))
				assert.NilError(t, o.Run(t.Context(), root, os.Stdout, []string{"dockerd", "dockerd-stock", "docker-proxy"}))
			}
			row := []string{b.Version, fmt.Sprintf("%s+berth.%d", b.Release, b.Patch)}
			for _, check := range checks {
				b.tell("not run")
				if !t.Run(check.name, func(t *testing.T) { check.run(t, b) }) {
					b.tell("fails")
				}
				row = append(row, b.said)
			}
			rows = append(rows, row)
		})
	}
	report(t, rows)
}

// chosen are the bases that are asked for, the default one first.
func chosen(t *testing.T, root string, list []pins.Pin) []*base {
	t.Helper()
	known := pins.Bases(list)
	var pick []pins.Pin
	switch *bases {
	case "all":
		pick = known
	case "":
		pick = known[:1]
	default:
		for version := range strings.SplitSeq(*bases, ",") {
			pin, err := pins.Base(list, version)
			assert.NilError(t, err)
			pick = append(pick, pin)
		}
	}
	var out []*base
	for _, pin := range pick {
		o := build.Options{Base: pin.Version}
		if pin.Version == known[0].Version {
			o.Base = ""
		}
		trees := filepath.Join(root, "build", "tree", pin.Version)
		out = append(out, &base{
			Pin: pin, root: root, bin: o.Bin(root), stock: filepath.Join(trees, "stock"), berth: filepath.Join(trees, "berth"),
			stepsTested: *bases != "" && (pin.Version == known[0].Version || pin.Version == known[len(known)-1].Version),
		})
	}
	return out
}

const intro = `# The patch on every base

Written by ` + "`make bases`" + `. For each version of upstream in vendor.conf: what of the nat package's exported API the patch
changes, whether the patched dockerd is made of the same modules as the stock one, and how many of upstream's own tests
(of ` + "`portmappers/nat`, `portmapperapi`, `portallocator`, `internal/rlkclient`, `drvregistry`, `drivers/bridge`" + ` and of libnetwork
itself) pass in both trees. The rest fail or are skipped in both; one that passes in stock alone fails ` + "`make bases`" + `. Last, the
series that ` + "`make patch`" + ` writes is applied to the base, built after each commit, and taken back; "each tested": the package's
tests run after each, too.

`

// report prints the table, as Markdown that is also read as it is.
func report(t *testing.T, rows [][]string) {
	t.Helper()
	head := []string{"base", "dockerd"}
	for _, check := range checks {
		head = append(head, check.name)
	}
	rule := make([]string, len(head))
	for i := range rule {
		rule[i] = "---"
	}
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 1, ' ', 0)
	for _, row := range append([][]string{head, rule}, rows...) {
		fmt.Fprintf(w, "| %s\t|\n", strings.Join(row, "\t| "))
	}
	assert.NilError(t, w.Flush())
	fmt.Print("\n", out.String(), "\n")
	if *table != "" && !t.Failed() {
		assert.NilError(t, os.WriteFile(*table, []byte(intro+out.String()), 0o644))
	}
}

// goEnv is as `berth build` compiles, for its cache.
func goEnv() []string {
	return append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=-mod=readonly")
}
