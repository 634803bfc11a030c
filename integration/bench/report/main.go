// Report reads what Berth's benchmarks printed, and prints how it compares with
// the limits that Berth sets itself.
//
//	report [-plot FILE.svg] BENCH.txt
//
// A miss is printed, and no error: machines are noisy. What was not measured is
// one, and so is a benchmark that nothing here uses.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"berth/integration/bench"

	"golang.org/x/perf/benchfmt"
)

func main() {
	plotFile := flag.String("plot", "", "write the cost against the number of taken ports to this `file`, as SVG")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: report [-plot FILE.svg] BENCH.txt")
		os.Exit(2)
	}
	if err := run(os.Stdout, flag.Arg(0), *plotFile); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

func run(out io.Writer, benchFile, plotFile string) error {
	f, err := os.Open(benchFile)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := read(f, benchFile)
	if err != nil {
		return err
	}
	notMeasured := r.print(out)
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		fmt.Fprintf(out, "Load average over 1, 5 and 15 minutes: %s\n", strings.Join(strings.Fields(string(load))[:3], ", "))
	}
	fmt.Fprintf(out, "Each of them: go tool benchstat %s\n", benchFile)
	if plotFile != "" && r.withoutStack == "" {
		if err := r.plot(plotFile); err != nil {
			return errors.Join(notMeasured, err)
		}
		fmt.Fprintf(out, "Cost against taken ports: %s\n", plotFile)
	}
	return notMeasured
}

// results has what was measured: a value for each round.
type results struct {
	values map[measure][]float64
	cpus   []int // cpus has each GOMAXPROCS that was measured, in order.
	// withoutStack is why nothing was measured that takes a stack, if so.
	withoutStack string
}

// measure is one benchmark, without the name's prefix and suffix, at one
// GOMAXPROCS, in a unit that benchunit has tidied.
type measure struct {
	name bench.Name
	cpus int
	unit string
}

func read(in io.Reader, name string) (*results, error) {
	r := &results{values: map[measure][]float64{}}
	reader := benchfmt.NewReader(in, name)
	for reader.Scan() {
		switch rec := reader.Result().(type) {
		case *benchfmt.SyntaxError:
			return nil, rec
		case *benchfmt.Result:
			name, cpus := rec.Name.String(), 1
			if _, parts := rec.Name.Parts(); len(parts) > 0 {
				if suffix := string(parts[len(parts)-1]); suffix[0] == '-' {
					n, err := strconv.Atoi(suffix[1:])
					if err != nil {
						return nil, fmt.Errorf("%s: GOMAXPROCS: %w", name, err)
					}
					name, cpus = strings.TrimSuffix(name, suffix), n
				}
			}
			if !slices.Contains(r.cpus, cpus) {
				r.cpus = append(r.cpus, cpus)
			}
			r.withoutStack = rec.GetConfig(bench.WithoutStack)
			for _, v := range rec.Values {
				m := measure{bench.Name(name), cpus, v.Unit}
				r.values[m] = append(r.values[m], v.Value)
			}
		}
	}
	slices.Sort(r.cpus)
	return r, reader.Err()
}

// median returns NaN if there are no values.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	values = slices.Sorted(slices.Values(values))
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}

// print prints a line for each figure: in each round, what was measured one
// after the other is compared. The median of the rounds is what counts. It
// returns an error if something is missing, or too much.
func (r *results) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "median (lowest to highest round)\tlimit\t")
	for _, cpus := range r.cpus {
		fmt.Fprintf(w, "\tGOMAXPROCS=%d\t", cpus)
	}
	fmt.Fprintln(w)
	missed, leftOut, missing := 0, 0, 0
	for _, f := range figures {
		fmt.Fprintf(w, "%s\t%s\t%s", f.what, f.unit.number(f.limit), f.unit)
		for _, cpus := range r.cpus {
			rounds := r.rounds(f, cpus)
			switch {
			case len(rounds) > 0:
				verdict := "met"
				if median(rounds) > f.limit {
					missed++
					verdict = "NOT MET"
				}
				number := f.unit.number
				fmt.Fprintf(w, "\t%s (%s to %s)\t%s", number(median(rounds)), number(slices.Min(rounds)), number(slices.Max(rounds)), verdict)
			case r.withoutStack != "" && slices.ContainsFunc(f.names(), bench.Name.TakesStack):
				leftOut++
				fmt.Fprint(w, "\tleft out\t")
			default:
				missing++
				fmt.Fprint(w, "\tnot measured\t")
			}
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	fmt.Fprintf(out, "%d figures, %d not met, %d not measured. A miss is no failure here: machines are noisy.\n",
		len(figures)*len(r.cpus), missed, missing)
	if r.withoutStack != "" {
		fmt.Fprintf(out, "%d left out, and the plot, which take a stack: %s\n", leftOut, r.withoutStack)
	}

	var errs []error
	if len(r.cpus) == 0 {
		errs = append(errs, errors.New("nothing was measured"))
	}
	if missing > 0 {
		errs = append(errs, fmt.Errorf("%d figures were not measured", missing))
	}
	measured := map[bench.Name]bool{}
	for m := range r.values {
		measured[m.name] = true
	}
	for _, name := range bench.All() {
		if !measured[name] && !(r.withoutStack != "" && name.TakesStack()) {
			errs = append(errs, fmt.Errorf("not measured: Benchmark%s", name))
		}
		delete(measured, name)
	}
	for _, name := range slices.Sorted(maps.Keys(measured)) {
		errs = append(errs, fmt.Errorf("measured, but used by nothing: Benchmark%s", name))
	}
	return errors.Join(errs...)
}

// names are those of the benchmarks that the figure is made of.
func (f figure) names() []bench.Name {
	var names []bench.Name
	f.of(func(name bench.Name, _ string) float64 {
		names = append(names, name)
		return math.NaN()
	})
	return names
}

// rounds returns the figure of each round.
func (r *results) rounds(f figure, cpus int) []float64 {
	var list []float64
	for round := 0; ; round++ {
		complete := true
		v := f.of(func(name bench.Name, unit string) float64 {
			values := r.values[measure{name, cpus, unit}]
			if round >= len(values) {
				complete = false
				return math.NaN()
			}
			return values[round]
		})
		if !complete {
			return list
		}
		list = append(list, v)
	}
}
