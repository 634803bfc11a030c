package main

import (
	"fmt"
	"slices"

	"berth/integration/bench"
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
type getter func(name bench.Name, unit string) float64

type unit string

const (
	times        unit = "x"
	objects      unit = "objects"
	microseconds unit = "us"
	milliseconds unit = "ms"
)

// number formats v without the unit: differences have a sign.
func (u unit) number(v float64) string {
	switch u {
	case times:
		return fmt.Sprintf("%.2f", v)
	case milliseconds:
		return fmt.Sprintf("%+.1f", v)
	}
	return fmt.Sprintf("%+.0f", v)
}

const perOp = "sec/op"

// figures are those of the benchmarks in the folder above.
var figures = slices.Concat(
	each(func(n int) []figure {
		return []figure{
			more("rootful, %s: more than stock", 5, microseconds, n, bench.Rootful(n), "sec/berth", bench.Rootful(n), "sec/stock"),
			more("rootful, %s: more than stock", 10, objects, n, bench.Rootful(n), "objects/berth", bench.Rootful(n), "objects/stock"),
		}
	}),
	each(func(n int) []figure { return inChild("fake driver, %s", n, bench.Child(n), 80) }),
	each(func(n int) []figure {
		name := bench.NoRefusal(n)
		return append([]figure{
			ratio("real RootlessKit, %s: to stock", 1.02, n, name, "berth", ""),
			ratio("real RootlessKit, %s: with its removal, to stock", 1.02, n, name, "berth", "-removal"),
			ratio("view, real RootlessKit, %s: to stock", 1.10, n, name, "view", ""),
		}, inChild("real RootlessKit, %s", n, name, 0)...)
	}),
	[]figure{
		{"a refused port: to a bare refused AddPort", 1.45, times, func(get getter) float64 {
			return get(bench.Refusal, "sec/search") / get(bench.Refusal, "sec/bare")
		}},
		{"view, a taken port: to a bare socket/bind/listen/close", 0.2, times, func(get getter) float64 {
			return (get(bench.Passed(1), perOp) - get(bench.Free(1), perOp)) / bench.ManyTaken / get(bench.Listen, perOp)
		}},
	},
	each(func(n int) []figure {
		return []figure{
			more("view, 17,000 taken ports in a row, %s: more than with none", 4, milliseconds, n, bench.Jumped(n), perOp, bench.Free(n), perOp),
			more("view, the next publish, %s: more than with none taken", 1, milliseconds, n, bench.Next(n), perOp, bench.Free(n), perOp),
		}
	}),
	[]figure{
		{"100 ports, start and stop: to stock", 1.05, times, func(get getter) float64 {
			return (get(bench.Hundred, "sec/berth-start") + get(bench.Hundred, "sec/berth-stop")) /
				(get(bench.Hundred, "sec/stock-start") + get(bench.Hundred, "sec/stock-stop"))
		}},
	},
)

func each(of func(addresses int) []figure) []figure {
	var list []figure
	for _, n := range bench.Addresses {
		list = append(list, of(n)...)
	}
	return list
}

// inChild has what a publish costs more than stock's, without a view and with
// one: objects and, if there is a limit, time.
func inChild(what string, n int, name bench.Name, limit float64) []figure {
	var list []figure
	for _, m := range []struct{ prefix, mapper string }{{"", "berth"}, {"view, ", "view"}} {
		what := m.prefix + what + ": more than stock"
		if limit > 0 {
			list = append(list, more(what, limit, microseconds, n, name, "sec/"+m.mapper, name, "sec/stock"))
		}
		list = append(list, more(what, 10, objects, n, name, "objects/"+m.mapper, name, "objects/stock"))
	}
	return list
}

func addresses(n int) string {
	if n == 1 {
		return "1 address"
	}
	return fmt.Sprintf("%d addresses", n)
}

// ratio is that of a mapper's time to stock's, of a publish and, if that is in
// also, of what is measured with it.
func ratio(what string, limit float64, n int, name bench.Name, mapper, also string) figure {
	return figure{fmt.Sprintf(what, addresses(n)), limit, times, func(get getter) float64 {
		sum := func(mapper string) float64 {
			v := get(name, "sec/"+mapper)
			if also != "" {
				v += get(name, "sec/"+mapper+also)
			}
			return v
		}
		return sum(mapper) / sum("stock")
	}}
}

// more is a difference, in time or in objects.
func more(what string, limit float64, u unit, n int, name bench.Name, unit string, than bench.Name, thanUnit string) figure {
	scale := 1.0
	switch u {
	case microseconds:
		scale = 1e6
	case milliseconds:
		scale = 1e3
	}
	return figure{fmt.Sprintf(what, addresses(n)), limit, u, func(get getter) float64 {
		return scale * (get(name, unit) - get(than, thanUnit))
	}}
}
