package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// twoRounds has a refusal's cost at two GOMAXPROCS: 1.1 and 1.5 x at one, 1.2 x at two.
const twoRounds = `goos: linux
BenchmarkRootlessKit/Refusal/bare        	 500	 200000 ns/op	 200000 ns/refusal
BenchmarkRootlessKit/Refusal/bare-2      	 500	 100000 ns/op	 100000 ns/refusal
BenchmarkRootlessKit/Refusal/search      	   2	 440000 ns/op	 220000 ns/refusal
BenchmarkRootlessKit/Refusal/search-2    	   2	 240000 ns/op	 120000 ns/refusal
PASS
BenchmarkRootlessKit/Refusal/bare        	 500	 200000 ns/op	 200000 ns/refusal
BenchmarkRootlessKit/Refusal/search      	   2	 600000 ns/op	 300000 ns/refusal
`

func printed(t *testing.T, bench string) string {
	t.Helper()
	r, err := read(strings.NewReader(bench), "bench.txt")
	assert.NilError(t, err)
	var out strings.Builder
	assert.NilError(t, r.print(&out))
	return out.String()
}

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
	got := line(t, printed(t, twoRounds), "a refused port: to a bare refused AddPort")
	assert.Check(t, is.Equal(got, "1.30 x 1.30 (1.10 to 1.50) met 1.20 (1.20 to 1.20) met"))
}

func TestMissIsPrinted(t *testing.T) {
	report := printed(t, strings.ReplaceAll(twoRounds, "120000 ns/refusal", "131000 ns/refusal"))
	assert.Check(t, is.Contains(line(t, report, "a refused port"), "1.31 (1.31 to 1.31) NOT MET"))
	assert.Check(t, is.Contains(report, fmt.Sprintf("%d figures, 1 not met, %d not measured", 2*len(figures), 2*len(figures)-2)))
}

func TestWhatIsNotMeasuredIsSaid(t *testing.T) {
	assert.Check(t, is.Equal(line(t, printed(t, twoRounds), "no refusal, fake driver, 1 address: to stock"), "1.05 x not measured not measured"))
}

// Every figure must find its benchmarks: a name that is not measured is a mistake here or there.
func TestFiguresAreOfTheBenchmarksThatWeHave(t *testing.T) {
	source, err := os.ReadFile("../bench_test.go")
	assert.NilError(t, err)
	for _, f := range figures {
		f.of(func(name, _ string) float64 {
			top, _, _ := strings.Cut(name, "/")
			assert.Check(t, is.Contains(string(source), "func Benchmark"+top+"(b *testing.B)"), f.what)
			return math.NaN()
		})
	}
}

func TestPlots(t *testing.T) {
	var bench strings.Builder
	for _, n := range taken {
		fmt.Fprintf(&bench, "BenchmarkRootlessKit/Search/taken=%d/mapper=berth-2 100 %d ns/op\n", n.ports, 500000+1000*n.ports)
	}
	r, err := read(strings.NewReader(bench.String()), "bench.txt")
	assert.NilError(t, err)
	file := filepath.Join(t.TempDir(), "plot.svg")
	assert.NilError(t, r.plot(file))
	svg, err := os.ReadFile(file)
	assert.NilError(t, err)
	for _, want := range []string{"<svg", "taken ports", "time in ms", "Berth without view", ">17k<"} {
		assert.Check(t, is.Contains(string(svg), want))
	}
	assert.Check(t, !strings.Contains(string(svg), "stock"), "it was not measured")
}

// An ordinary user's benchmarks do without a stack, and are no failure.
func TestNothingToPlotIsSaid(t *testing.T) {
	for _, bench := range []string{"", twoRounds} {
		dir := t.TempDir()
		assert.NilError(t, os.WriteFile(filepath.Join(dir, "bench.txt"), []byte(bench), 0o644))
		var out strings.Builder
		assert.NilError(t, run(&out, filepath.Join(dir, "bench.txt"), filepath.Join(dir, "plot.svg")))
		assert.Check(t, is.Contains(out.String(), "No plot: no search was measured"))
	}
}

func TestMalformedInputIsAnError(t *testing.T) {
	_, err := read(strings.NewReader("BenchmarkX 1 2\n"), "bench.txt")
	assert.Check(t, is.ErrorContains(err, "bench.txt"))
}
