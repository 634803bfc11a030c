package main

import (
	"fmt"
	"slices"
)

// figure is something that has a limit.
type figure struct {
	what  string
	limit float64
	unit  unit
	// of computes it from the values that get returns.
	of func(get getter) float64
}

// getter returns what a benchmark measured in a unit.
type getter func(name, unit string) float64

type unit string

const (
	times        unit = "x"
	objects      unit = "objects"
	microseconds unit = "us"
	milliseconds unit = "ms"
	bytesEach    unit = "B"
)

// number formats v without the unit: differences have a sign.
func (u unit) number(v float64) string {
	switch u {
	case times:
		return fmt.Sprintf("%.2f", v)
	case milliseconds:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%+.0f", v)
}

const (
	perOp      = "sec/op"
	perRefusal = "sec/refusal"
	allocated  = "B/op"

	manyTaken = 17000
)

// figures are those of the benchmarks in the folder above.
var figures = slices.Concat(
	noRefusal("no refusal, fake driver", "Fake"),
	noRefusal("no refusal, fake driver, child thread", "Child"),
	noRefusal("no refusal, real RootlessKit", "RootlessKit/NoRefusal"),
	[]figure{
		ratio("a refused port: to a bare refused AddPort", 1.3, "RootlessKit/Refusal/search", perRefusal, "RootlessKit/Refusal/bare", perRefusal),
		{"view, a taken port: to a bare socket/bind/listen/close", 0.3, times, func(get getter) float64 {
			return (get(passing(1, "all"), perOp) - get(withView(1), perOp)) / manyTaken / get("Listen", perOp)
		}},
		{"view, a taken port: memory allocated", 1, bytesEach, func(get getter) float64 {
			return (get(passing(1, "all"), allocated) - get(withView(1), allocated)) / manyTaken
		}},
	},
	view(1), view(2),
)

// noRefusal compares a publish with stock's.
func noRefusal(what, benchmark string) []figure {
	var list []figure
	for n := 1; n <= 2; n++ {
		name := fmt.Sprintf("%s/addresses=%d", benchmark, n)
		list = append(list,
			ratio(fmt.Sprintf("%s, %s: to stock", what, addresses(n)), 1.05, name, "sec/berth", name, "sec/stock"),
			figure{fmt.Sprintf("%s, %s: with its removal, to stock", what, addresses(n)), 1.05, times, func(get getter) float64 {
				return (get(name, "sec/berth") + get(name, "sec/berth-removal")) / (get(name, "sec/stock") + get(name, "sec/stock-removal"))
			}},
			more(fmt.Sprintf("%s, %s: more than stock", what, addresses(n)), 10, objects, name, "objects/berth", name, "objects/stock"))
	}
	return list
}

// view has the figures of a publish with a view, on n addresses.
func view(n int) []figure {
	return []figure{
		viewNoRefusal("fake driver", "Child", n),
		viewNoRefusal("real RootlessKit", "RootlessKit/NoRefusal", n),
		{fmt.Sprintf("view, publish past 17,000 taken ports, %s", addresses(n)), 60, milliseconds, func(get getter) float64 {
			return 1e3 * get(passing(n, "all"), perOp)
		}},
		more(fmt.Sprintf("view, the next publish, %s: more than with none taken", addresses(n)), 1000, microseconds, passing(n, "none"), perOp, withView(n), perOp),
	}
}

func viewNoRefusal(what, benchmark string, n int) figure {
	name := fmt.Sprintf("%s/addresses=%d", benchmark, n)
	return more(fmt.Sprintf("view, no refusal, %s, %s: more than stock", what, addresses(n)), 40, microseconds, name, "sec/view", name, "sec/stock")
}

func addresses(n int) string {
	if n == 1 {
		return "1 address"
	}
	return fmt.Sprintf("%d addresses", n)
}

// withView names the benchmark of a publish with a view and no port taken.
func withView(addresses int) string {
	return fmt.Sprintf("Child/addresses=%d/mapper=berth+view/taken=0", addresses)
}

// passing names those with manyTaken ports taken, of which all or none are passed.
func passing(addresses int, passed string) string {
	return fmt.Sprintf("Child/addresses=%d/mapper=berth+view/taken=%d/passed=%s", addresses, manyTaken, passed)
}

func ratio(what string, limit float64, name, unit, to, toUnit string) figure {
	return figure{what, limit, times, func(get getter) float64 { return get(name, unit) / get(to, toUnit) }}
}

// more is a difference, in seconds or in objects.
func more(what string, limit float64, u unit, name, unit, than, thanUnit string) figure {
	scale := 1.0
	if u == microseconds {
		scale = 1e6
	}
	return figure{what, limit, u, func(get getter) float64 { return scale * (get(name, unit) - get(than, thanUnit)) }}
}
