// Package doctor says, before anything is started, whether a port can be published here, and if not why and what to do. It
// changes nothing, and needs no root.
package doctor

import (
	"fmt"
	"slices"
)

// Mark is what a finding comes to.
type Mark string

// The marks.
const (
	OK   Mark = "ok"
	Note Mark = "note" // works, but one should know
	Fail Mark = "fail" // something would fail
)

// Finding is what a check has to say of one thing.
type Finding struct {
	Check string   `json:"check"`
	About string   `json:"about"` // a port as it was asked for, or "machine"
	Mark  Mark     `json:"mark"`
	Says  string   `json:"says"`
	Do    string   `json:"do,omitempty"`   // what the user can do
	Root  []string `json:"root,omitempty"` // what root would type
}

// Report is what `berth doctor --json` prints. Version changes when the meaning of a field does.
type Report struct {
	Version  int       `json:"version"`
	Findings []Finding `json:"findings"`
}

// Failed tells whether something would fail.
func (r Report) Failed() bool {
	return slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Mark == Fail })
}

// Check is one thing that is looked at. Each has at least one of the functions.
type Check struct {
	Name, Looks string
	machine     func(*Host) []Finding
	ask         func(*Host, Ask) *Finding      // of a request as a whole
	pair        func(a, other Ask) *Finding    // of two requests
	port        func(*Host, Ask, int) *Finding // of one of its ports: a finding keeps it from being published
}

// Find returns the checks without those to be ignored.
func Find(ignore []string) ([]Check, error) {
	list := slices.Clone(Checks)
	for _, name := range ignore {
		i := slices.IndexFunc(Checks, func(c Check) bool { return c.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no check %q: see --list", name)
		}
		list = slices.DeleteFunc(list, func(c Check) bool { return c.Name == name })
	}
	return list, nil
}

// Examine runs the checks for each request; without any, those of the machine as a whole.
func Examine(h *Host, checks []Check, asks []Ask) Report {
	r := Report{Version: 1, Findings: []Finding{}}
	add := func(c Check, about string, f Finding) {
		f.Check, f.About = c.Name, about
		r.Findings = append(r.Findings, f)
	}
	if len(asks) == 0 {
		for _, c := range checks {
			if c.machine != nil {
				for _, f := range c.machine(h) {
					add(c, "machine", f)
				}
			}
		}
		return r
	}
	for i, a := range asks {
		refused := false
		say := func(c Check, f *Finding) {
			if f != nil {
				add(c, a.String(), *f)
				refused = refused || f.Mark == Fail
			}
		}
		for _, c := range checks {
			if c.ask != nil {
				say(c, c.ask(h, a))
			}
			if c.pair != nil {
				for _, other := range asks[:i] {
					say(c, c.pair(a, other))
				}
			}
		}
		if !refused {
			r.Findings = append(r.Findings, search(h, checks, a))
		}
	}
	return r
}

// twice is the same on every system.
var twice = Check{Name: "twice", Looks: "whether two of the requests want one port", pair: func(a, other Ask) *Finding {
	if !a.clashes(other) {
		return nil
	}
	return &Finding{Mark: Fail, Says: "is wanted by " + other.who() + ", too", Do: "give one of them another port, or an address of its own"}
}}

// search is the daemon's, without starting anything: the first port that no check refuses.
func search(h *Host, checks []Check, a Ask) Finding {
	var last Finding
	ports := h.portsOf(a)
	for n, port := range ports {
		refused := false
		for _, c := range checks {
			if c.port == nil {
				continue
			}
			if f := c.port(h, a, port); f != nil {
				last, refused = *f, true
				last.Check = c.Name
				break
			}
		}
		if refused {
			if limit := h.shrugs(); limit > 0 && n+1 >= limit && len(ports) > limit {
				last.Says = fmt.Sprintf("the first %d ports are refused, and this port driver does not say why: the search ends", limit)
				last.Do, last.About, last.Mark = "ask for other ports, or use the builtin port driver", a.String(), Fail
				return last
			}
			continue
		}
		says := "can be published"
		if !a.fixed() && port != 0 { // Windows chooses
			says = fmt.Sprintf("can be published at %d", port)
			if n > 0 {
				says += fmt.Sprintf(", behind %d that can't", n)
			}
		}
		return Finding{Check: "port", About: a.String(), Mark: OK, Says: says}
	}
	last.About, last.Mark = a.String(), Fail
	if len(ports) == 0 {
		last = Finding{Check: "port", About: a.String(), Mark: Fail, Says: "there is no dynamic port: all are reserved"}
	} else if len(ports) > 1 {
		last.Says = fmt.Sprintf("none of %d ports is free; the last one %s", len(ports), last.Says)
		if a.First == 0 {
			last.Do, last.Root = "`berth doctor` without a port says how full the range is, and what to do", nil
		}
	}
	return last
}
