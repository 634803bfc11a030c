// Package bench measures Berth's port mapper against stock's and against the
// bare system calls and requests that it is made of. What it prints is for
// benchstat, and for the program in the report folder, which knows the limits.
//
// One operation is a MapPorts and the UnmapPorts that undoes it, where nothing
// else is said.
package bench

import (
	"fmt"
	"strings"
)

// ManyTaken is as many host ports as one process can hold here (20,000 descriptors).
const ManyTaken = 17000

// Name is a benchmark's full name, without "Benchmark".
type Name string

const (
	Listen  Name = "Listen"
	Refusal Name = "RootlessKit/Refusal"
	Hundred Name = "Hundred"
)

// Addresses are the numbers of host addresses that a publish is measured on.
var Addresses = []int{1, 2}

// A publish where no port is taken: by stock and by Berth, in turn.
func Rootful(addresses int) Name { return on("Rootful", addresses) }
func Child(addresses int) Name   { return on("Child", addresses) }
func NoRefusal(addresses int) Name {
	return on("RootlessKit/NoRefusal", addresses)
}

// With a view, and ManyTaken taken ports in a row but for Free.
func Free(addresses int) Name { return on("View/taken=0", addresses) }

// Passed passes all of them, in order.
func Passed(addresses int) Name { return on("View/passed=all", addresses) }

// Jumped is a mapper's first publish, which would begin with the first of them.
func Jumped(addresses int) Name { return on("View/passed=jump", addresses) }

// Next is a later one, which begins behind them.
func Next(addresses int) Name { return on("View/passed=none", addresses) }

func on(what string, addresses int) Name {
	return Name(fmt.Sprintf("%s/addresses=%d", what, addresses))
}

// Taken are the numbers of taken ports, in a row, that Search has.
var Taken = []int{0, 10, 100, 1000, 10000, ManyTaken}

// Mappers of a Search, and what they do.
const (
	Stock      = "stock"       // publishes, where no port is taken
	StockFails = "stock-fails" // fails, where one is
	Berth      = "berth"
	BerthView  = "berth+view"
)

// Search is a mapper's first publish through a real RootlessKit.
func Search(taken int, mapper string) Name {
	return Name(fmt.Sprintf("RootlessKit/Search/taken=%d/mapper=%s", taken, mapper))
}

// Mappers returns those that are measured.
func Mappers(taken int) []string {
	if taken == 0 {
		return []string{Stock, Berth, BerthView}
	}
	return []string{StockFails, Berth, BerthView}
}

// All returns the names of all benchmarks.
func All() []Name {
	all := []Name{Listen, Refusal, Hundred, Passed(1)}
	for _, n := range Addresses {
		all = append(all, Rootful(n), Child(n), NoRefusal(n), Free(n), Jumped(n), Next(n))
	}
	for _, n := range Taken {
		for _, m := range Mappers(n) {
			all = append(all, Search(n, m))
		}
	}
	return all
}

// WithoutStack is the configuration that results have, as benchfmt means it,
// where nothing was measured that takes a stack.
const WithoutStack = "without-stack"

// TakesStack tells whether the benchmark starts a stack.
func (n Name) TakesStack() bool {
	return n == Hundred || strings.HasPrefix(string(n), "RootlessKit/")
}
