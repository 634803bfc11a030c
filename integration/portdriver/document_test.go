//go:build integration

package portdriver

import (
	_ "embed"
	"fmt"
	"slices"
	"strings"
)

//go:embed testdata/intro.md
var intro string

// document is docs/port-drivers.md.
func document(all []Seen) string {
	var b strings.Builder
	b.WriteString(intro)
	var drivers []string
	for _, s := range all {
		if !slices.Contains(drivers, s.Driver) {
			drivers = append(drivers, s.Driver)
		}
	}
	for _, driver := range drivers {
		var seen []Seen
		for _, s := range all {
			if s.Driver == driver {
				seen = append(seen, s)
			}
		}
		fmt.Fprintf(&b, "\n## %s\n\n", driver)
		for _, s := range seen {
			fmt.Fprintf(&b, "- RootlessKit %s, network driver %s: %d cases\n", s.RootlessKit, s.Network, len(s.Results))
		}
		b.WriteString("\n| case | protocol | RootlessKit | the driver says | verdict | a fixed port | a range |\n| --- | --- | --- | --- | --- | --- | --- |\n")
		for _, r := range rows(seen) {
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", r.name, strings.Join(r.protocols, ", "), strings.Join(r.versions, ", "), r.text)
		}
	}
	return b.String()
}

// row is what came of a case, for all protocols and versions where it is the same.
type row struct {
	name, text          string
	protocols, versions []string
}

func rows(seen []Seen) []*row {
	var rows []*row
	for _, s := range seen {
		for _, r := range s.Results {
			protocol, name, _ := strings.Cut(r.Case, "/")
			if r.Served == nil && !removal(r) && name != "free" {
				continue // one row says it
			}
			text := describe(s.Driver, protocol, r)
			i := slices.IndexFunc(rows, func(o *row) bool { return o.name == name && o.text == text })
			if i < 0 {
				i = len(rows)
				rows = append(rows, &row{name: name, text: text})
			}
			for list, item := range map[*[]string]string{&rows[i].protocols: protocol, &rows[i].versions: s.RootlessKit} {
				if !slices.Contains(*list, item) {
					*list = append(*list, item)
				}
			}
		}
	}
	// The protocols of a case stand together.
	var names []string
	for _, r := range rows {
		if !slices.Contains(names, r.name) {
			names = append(names, r.name)
		}
	}
	slices.SortStableFunc(rows, func(a, b *row) int { return slices.Index(names, a.name) - slices.Index(names, b.name) })
	return rows
}

// describe is the part of a row that comes from the result.
func describe(driver, protocol string, r Result) string {
	says := strings.TrimPrefix(strings.TrimPrefix(r.Answer, addPortFailed), removePortFailed)
	says = strings.Join(strings.Fields(says), " ") // it may have lines
	says = strings.ReplaceAll(says, strings.ToUpper(protocol[:3])+" [", "NET [")
	for _, p := range []string{protocol, protocol[:3] + "4", protocol[:3] + "6", protocol[:3]} {
		says = strings.ReplaceAll(says, p+" ", "NET ")
		says = strings.ReplaceAll(says, `"`+p+`"`, `"NET"`)
	}
	for _, addr := range append(r.Served, "10.1.2.3") {
		if isIPv6(addr) {
			addr = "[" + addr + "]"
		}
		says = strings.ReplaceAll(says, addr+":PORT", "HOST:PORT")
		says = strings.ReplaceAll(says, "["+addr+"]:PORT", "HOST:PORT") // pesto's
	}
	verdict := r.Verdict
	switch {
	case removal(r):
		outcome := "removed"
		if r.Fixed.Error != "" {
			outcome = "removal fails"
		}
		return fmt.Sprintf("`%s` |  | %s | %s", says, outcome, outcome)
	case says == "":
		says, verdict = "exposes it", ""
		if driver == "pesto" {
			says = "says that it exposes it"
		}
	default:
		says = "`" + says + "`"
	}
	return fmt.Sprintf("%s | %s | %s | %s", says, verdict, outcome(protocol, r.Fixed), outcome(protocol, r.Range))
}

func removal(r Result) bool { return strings.HasPrefix(r.Answer, removePortFailed) }

func outcome(protocol string, o Outcome) string {
	if o.Published == nil {
		return "fails"
	}
	_, port, _ := strings.Cut(o.Published[0], " ")
	switch {
	case len(o.Published) == 2:
		return port + " published on both"
	case len(protocol) == len("tcp"):
		return port + " published on IPv4 only"
	}
	return port + " published"
}
