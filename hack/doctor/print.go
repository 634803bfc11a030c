package doctor

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

var colours = map[Mark]string{OK: "\x1b[32m", Note: "\x1b[33m", Fail: "\x1b[31m"}

// Print prints a line for each finding, what to do about it below, and root's part as one block at the end.
func (r Report) Print(out io.Writer, colour bool) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	var root []string
	for _, f := range r.Findings {
		mark := fmt.Sprintf("%-4s", f.Mark)
		if colour { // of one length each, so that what follows is aligned
			mark = colours[f.Mark] + mark + "\x1b[0m"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", mark, f.Check, f.About, f.Says)
		if f.Do != "" {
			fmt.Fprintf(w, "%s\t\t\t-> %s\n", pad(colour), f.Do)
		}
		for _, line := range f.Root {
			if !slices.Contains(root, line) {
				root = append(root, line)
			}
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(root) > 0 {
		fmt.Fprintf(out, "\nAs %s:\n", whoMay)
		for _, line := range root {
			fmt.Fprintln(out, "  "+line)
		}
	}
	return nil
}

// pad is a mark's column with nothing in it, of a mark's length.
func pad(colour bool) string {
	if colour {
		return "\x1b[39m    \x1b[0m"
	}
	return "    "
}
