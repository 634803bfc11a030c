// Report reads what Berth's benchmarks printed, and prints how it compares with
// the limits that Berth sets itself.
//
//	report [-plot FILE.svg] BENCH.txt
//
// A miss is printed, and no error: machines are noisy.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

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
	if err := r.print(out); err != nil {
		return err
	}
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		fmt.Fprintf(out, "Load average over 1, 5 and 15 minutes: %s\n", strings.Join(strings.Fields(string(load))[:3], ", "))
	}
	fmt.Fprintf(out, "Each of them: go tool benchstat %s\n", benchFile)
	if plotFile == "" {
		return nil
	}
	err = r.plot(plotFile)
	switch {
	case errors.Is(err, errNothingToPlot):
		fmt.Fprintln(out, "No plot:", err)
		return nil
	case err == nil:
		fmt.Fprintf(out, "Cost against taken ports: %s\n", plotFile)
	}
	return err
}

// results has what was measured: a value for each round.
type results struct {
	values map[measure][]float64
	cpus   []int // cpus has each GOMAXPROCS that was measured, in order.
}

// measure is one benchmark, without the name's prefix and suffix, at one
// GOMAXPROCS, in a unit that benchunit has tidied.
type measure struct {
	name string
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
			for _, v := range rec.Values {
				m := measure{name, cpus, v.Unit}
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
// after the other is compared. The median of the rounds is what counts.
func (r *results) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "median (lowest to highest round)\tlimit\t")
	for _, cpus := range r.cpus {
		fmt.Fprintf(w, "\tGOMAXPROCS=%d\t", cpus)
	}
	fmt.Fprintln(w)
	missed, missing := 0, 0
	for _, f := range figures {
		fmt.Fprintf(w, "%s\t%s\t%s", f.what, f.unit.number(f.limit), f.unit)
		for _, cpus := range r.cpus {
			rounds := r.rounds(f, cpus)
			if len(rounds) == 0 {
				missing++
				fmt.Fprint(w, "\tnot measured\t")
				continue
			}
			verdict := "met"
			if median(rounds) > f.limit {
				missed++
				verdict = "NOT MET"
			}
			number := f.unit.number
			fmt.Fprintf(w, "\t%s (%s to %s)\t%s", number(median(rounds)), number(slices.Min(rounds)), number(slices.Max(rounds)), verdict)
		}
		fmt.Fprintln(w)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(out, "%d figures, %d not met, %d not measured. A miss is no failure here: machines are noisy.\n",
		len(figures)*len(r.cpus), missed, missing)
	return err
}

// rounds returns the figure of each round.
func (r *results) rounds(f figure, cpus int) []float64 {
	var list []float64
	for round := 0; ; round++ {
		complete := true
		v := f.of(func(name, unit string) float64 {
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
