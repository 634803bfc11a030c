package doctor

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

var colours = map[Mark]string{OK: "\x1b[32m", Note: "\x1b[33m", Fail: "\x1b[31m"}

// Print prints a line for each finding, what to do about it below, and root's part as one block at the end.
func (r Report) Print(out io.Writer, colour bool) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, f := range r.Findings {
		mark := fmt.Sprintf("%-4s", f.Mark)
		if colour { // of one length each, so that what follows is aligned
			mark = colours[f.Mark] + mark + "\x1b[0m"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", mark, f.Check, f.About, f.Says)
		if f.Do != "" {
			fmt.Fprintf(w, "%s\t\t\t-> %s\n", pad(colour), f.Do)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if root := r.block(); len(root) > 0 {
		fmt.Fprintf(out, "\nAs %s:\n", whoMay)
		for _, line := range root {
			fmt.Fprintln(out, "  "+line)
		}
	}
	return nil
}

// block is what root would type for all findings, in one go: each remedy once and whole, and a setting that more than one of them
// sets with what all of them want.
func (r Report) block() (block []string) {
	var seen []string
	set := map[string]int{} // the line that sets it
	for _, f := range r.Findings {
		remedy := strings.Join(f.Root, "\n")
		if slices.Contains(seen, remedy) {
			continue
		}
		seen = append(seen, remedy)
		for _, line := range f.Root {
			name, value, isSetting := strings.Cut(line, "=")
			i, again := set[name]
			switch {
			case !isSetting || !strings.HasPrefix(name, "sysctl -w "):
				block = append(block, line)
			case !again:
				set[name] = len(block)
				block = append(block, line)
			case strings.HasSuffix(name, "ip_local_reserved_ports"):
				_, before, _ := strings.Cut(block[i], "=")
				spans := strings.Split(before, ",")
				for span := range strings.SplitSeq(value, ",") {
					if !slices.Contains(spans, span) {
						spans = append(spans, span)
					}
				}
				block[i] = name + "=" + strings.Join(spans, ",")
			case strings.HasSuffix(name, "ip_unprivileged_port_start"):
				_, before, _ := strings.Cut(block[i], "=")
				if low, err := strconv.Atoi(before); err == nil {
					if port, err := strconv.Atoi(value); err == nil && port < low {
						block[i] = line
					}
				}
			}
		}
	}
	for _, i := range set { // as sysctl prints it, it is what sysctl.d(5) reads at the next boot
		block[i] += " | tee -a /etc/sysctl.d/99-rootless.conf"
	}
	return block
}

// pad is a mark's column with nothing in it, of a mark's length.
func pad(colour bool) string {
	if colour {
		return "\x1b[39m    \x1b[0m"
	}
	return "    "
}
