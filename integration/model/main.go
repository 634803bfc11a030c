// Model draws what the simulated hosts of the nat package's TestOdds came to, and prints it:
//
//	model MODEL.json
//
// The plots are written beside the file: docs/measuring.md says what they show.
package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
)

// schema is the version of the file that this program reads.
const schema = 1

// results is what TestOdds writes, as far as it is shown.
type results struct {
	Schema  int     `json:"schema"`
	Seconds float64 `json:"seconds"`
	Machine string  `json:"machine"`
	Cells   []cell  `json:"cells"`
}

// cell is what came of a way to search for a port, on hosts of one kind.
type cell struct {
	Way       string   `json:"way"`
	Taken     float64  `json:"taken"` // the share of the host's dynamic ports that others hold
	Block     int      `json:"block"` // in blocks of so many
	Starts    int      `json:"starts"`
	Failed    int      `json:"failed"`
	Low       float64  `json:"low"` // the 95% interval of the share that fails
	High      float64  `json:"high"`
	Formula   *float64 `json:"formula"`
	CallsMean float64  `json:"callsMean"`
	CallsP99  float64  `json:"callsP99"`
	LockMean  float64  `json:"lockMeanMs"`
	LockP99   float64  `json:"lockP99Ms"`
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: model MODEL.json")
		os.Exit(2)
	}
	if err := run(os.Stdout, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "model:", err)
		os.Exit(1)
	}
}

func run(out io.Writer, file string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var r results
	if err := json.Unmarshal(data, &r); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if r.Schema != schema || len(r.Cells) == 0 {
		return fmt.Errorf("%s has %d cells of schema %d: want some of schema %d", file, len(r.Cells), r.Schema, schema)
	}
	if err := r.print(out); err != nil {
		return err
	}
	for _, f := range figures {
		name := strings.TrimSuffix(file, filepath.Ext(file)) + "-" + f.name + ".svg"
		if err := r.draw(f, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Fprintln(out, name)
	}
	return nil
}

// print prints a line for each cell, those of one kind of host together.
func (r *results) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "taken\tin blocks of\tsearch\tstarts\tfail\t95% interval\tformula\tcalls\tp99\tlock ms\tp99\t")
	cells := slices.Clone(r.Cells)
	slices.SortStableFunc(cells, func(a, b cell) int {
		return cmp.Or(cmp.Compare(a.Taken, b.Taken), cmp.Compare(a.Block, b.Block))
	})
	starts := 0
	for _, c := range cells {
		formula := ""
		if c.Formula != nil {
			formula = share(*c.Formula)
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%d\t%s\t%s to %s\t%s\t%.2f\t%.0f\t%.2f\t%.2f\t\n", share(c.Taken), c.Block, c.Way, c.Starts,
			share(c.rate()), share(c.Low), share(c.High), formula, c.CallsMean, c.CallsP99, c.LockMean, c.LockP99)
		starts += c.Starts
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(out, "%d starts in %.0f s (%s). \"calls\" are AddPort's of a start that published, \"lock\" is what any start had of the daemon's.\n",
		starts, r.Seconds, r.Machine)
	return err
}

func (c cell) rate() float64 { return float64(c.Failed) / float64(c.Starts) }

func share(v float64) string { return fmt.Sprintf("%.3g%%", 100*v) }
