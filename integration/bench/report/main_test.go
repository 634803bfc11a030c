package main

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"berth/integration/bench"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// twoRounds has a refusal's cost at two GOMAXPROCS: 1.1 and 1.5 x at one, 1.2 x at two.
const twoRounds = `goos: linux
BenchmarkRootlessKit/Refusal        	   2	 640000 ns/op	 200000 ns/bare	 220000 ns/search
BenchmarkRootlessKit/Refusal-2      	   2	 340000 ns/op	 100000 ns/bare	 120000 ns/search
PASS
BenchmarkRootlessKit/Refusal        	   2	 800000 ns/op	 200000 ns/bare	 300000 ns/search
`

func resultsOf(t *testing.T, bench string) *results {
	t.Helper()
	r, err := read(strings.NewReader(bench), "bench.txt")
	assert.NilError(t, err)
	return r
}

func printed(t *testing.T, bench string) (string, error) {
	t.Helper()
	var out strings.Builder
	err := resultsOf(t, bench).print(&out)
	return out.String(), err
}

// everything is what a round of all benchmarks prints, with one value for all, after its configuration.
func everything(config string, but func(bench.Name) bool) string {
	out := strings.Builder{}
	fmt.Fprintln(&out, config)
	for _, name := range bench.All() {
		if but(name) {
			continue
		}
		fmt.Fprintf(&out, "Benchmark%s 1 2 ns/op 2 ns/bare 2 ns/search", name)
		for _, mapper := range []string{"stock", "berth", "view"} {
			fmt.Fprintf(&out, " 2 ns/%s 2 ns/%[1]s-removal 2 objects/%[1]s 2 ns/%[1]s-start 2 ns/%[1]s-stop", mapper)
		}
		fmt.Fprintln(&out)
	}
	return out.String()
}

func none(bench.Name) bool { return false }

// line returns what follows the figure's name, with single spaces.
func line(t *testing.T, report, figure string) string {
	t.Helper()
	for l := range strings.Lines(report) {
		if rest, ok := strings.CutPrefix(l, figure); ok {
			return strings.Join(strings.Fields(rest), " ")
		}
	}
	t.Fatalf("no line %q in:\n%s", figure, report)
	return ""
}

func TestComparesWhatEachRoundMeasured(t *testing.T) {
	report, _ := printed(t, twoRounds)
	got := line(t, report, "a refused port: to a bare refused AddPort")
	assert.Check(t, is.Equal(got, "1.45 x 1.30 (1.10 to 1.50) met 1.20 (1.20 to 1.20) met"))
}

func TestMissIsPrinted(t *testing.T) {
	report, _ := printed(t, strings.ReplaceAll(twoRounds, "120000 ns/search", "146000 ns/search"))
	assert.Check(t, is.Contains(line(t, report, "a refused port"), "1.46 (1.46 to 1.46) NOT MET"))
	assert.Check(t, is.Contains(report, fmt.Sprintf("%d figures, 1 not met, %d not measured", 2*len(figures), 2*len(figures)-2)))
}

func TestAllMeasuredIsNoError(t *testing.T) {
	report, err := printed(t, everything("", none))
	assert.NilError(t, err)
	assert.Check(t, is.Contains(report, ", 0 not measured"))
}

func TestNotMeasuredIsAnError(t *testing.T) {
	listen := func(name bench.Name) bool { return name == bench.Listen }
	report, err := printed(t, everything("", listen))
	assert.Check(t, is.Equal(line(t, report, "view, a taken port: to a bare socket/bind/listen/close"), "0.20 x not measured"))
	assert.Check(t, is.Error(err, "1 figures were not measured\nnot measured: BenchmarkListen"))

	// So is what only the plot uses, and what was measured at one GOMAXPROCS of two.
	point := func(name bench.Name) bool { return name == bench.Search(1000, bench.BerthView) }
	_, err = printed(t, everything("", point))
	assert.Check(t, is.Error(err, "not measured: BenchmarkRootlessKit/Search/taken=1000/mapper=berth+view"))
	_, err = printed(t, everything("", none)+"BenchmarkListen-2 1 2 ns/op\n")
	assert.Check(t, is.Error(err, fmt.Sprintf("%d figures were not measured", len(figures))))
	_, err = printed(t, "")
	assert.Check(t, is.ErrorContains(err, "nothing was measured"))
}

func TestUnusedBenchmarkIsAnError(t *testing.T) {
	_, err := printed(t, everything("", none)+"BenchmarkListen/other 1 2 ns/op\n")
	assert.Check(t, is.Error(err, "measured, but used by nothing: BenchmarkListen/other"))
}

// An ordinary user's benchmarks do without a stack, and are no failure.
func TestWhatTakesAStackMayBeLeftOut(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "bench.txt")
	assert.NilError(t, os.WriteFile(file, []byte(everything("without-stack: no sub-ids", bench.Name.TakesStack)), 0o644))
	var out strings.Builder
	assert.NilError(t, run(&out, file, filepath.Join(dir, "plot.svg")))
	assert.Check(t, is.Equal(line(t, out.String(), "100 ports, start and stop: to stock"), "1.05 x left out"))
	assert.Check(t, is.Contains(out.String(), "left out, and the plot, which take a stack: no sub-ids\n"))

	_, err := printed(t, everything("without-stack: no sub-ids", func(name bench.Name) bool {
		return name.TakesStack() || name == bench.Listen
	}))
	assert.Check(t, is.ErrorContains(err, "not measured: BenchmarkListen"))
}

// The list of names is that of the figures and the plot.
func TestEveryBenchmarkIsUsed(t *testing.T) {
	used := map[bench.Name]bool{}
	for _, f := range figures {
		for _, name := range f.names() {
			used[name] = true
		}
	}
	for _, taken := range bench.Taken {
		for _, l := range lines {
			if slices.Contains(bench.Mappers(taken), l.mapper) {
				used[bench.Search(taken, l.mapper)] = true
			}
		}
	}
	assert.Check(t, is.DeepEqual(slices.Sorted(maps.Keys(used)), slices.Sorted(slices.Values(bench.All()))))
}

func TestPlots(t *testing.T) {
	var measured strings.Builder
	for _, n := range bench.Taken {
		fmt.Fprintf(&measured, "Benchmark%s-2 100 %d ns/op\n", bench.Search(n, bench.Berth), 500000+1000*n)
	}
	r := resultsOf(t, measured.String())
	file := filepath.Join(t.TempDir(), "plot.svg")
	assert.NilError(t, r.plot(file))
	svg, err := os.ReadFile(file)
	assert.NilError(t, err)
	for _, want := range []string{"<svg", "taken ports", "time in ms", "Berth without view", ">17k<"} {
		assert.Check(t, is.Contains(string(svg), want))
	}
	assert.Check(t, !strings.Contains(string(svg), "stock"), "it was not measured")
}

func TestNothingToPlotIsAnError(t *testing.T) {
	for _, bench := range []string{"", twoRounds} {
		assert.Check(t, is.ErrorIs(resultsOf(t, bench).plot(filepath.Join(t.TempDir(), "plot.svg")), errNothingToPlot))
	}
}

func TestMalformedInputIsAnError(t *testing.T) {
	_, err := read(strings.NewReader("BenchmarkX 1 2\n"), "bench.txt")
	assert.Check(t, is.ErrorContains(err, "bench.txt"))
}
