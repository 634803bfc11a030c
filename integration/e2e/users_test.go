//go:build integration

package e2e

import (
	"os"
	"strings"
	"sync"
	"testing"

	"gotest.tools/v3/assert"

	"berth/hack/checkout"
	"berth/hack/stack"
	"berth/integration/stacktest"
	"berth/integration/stress"
)

// Two users' daemons on one host start from the same first port, and each one's ports are
// taken for the other. What came of it, with stock and with Berth, is also written to
// build/results/users.json.
func TestTwoUsersStartAtOnce(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("running two users' stacks takes root")
	}
	stock := startAtOnce(t, "stock", "dockerd-stock", stack.Options{}, 50) // it fails from the first ones on
	berth := startAtOnce(t, "Berth", "dockerd", stack.Options{}, 100)

	var table strings.Builder
	results := append(stock, berth...)
	stress.PrintTable(&table, results...)
	t.Logf("\n%s", &table)
	stacktest.WriteResults(t, "users.json", results)

	// The one that stays a step ahead of the other finds every port free.
	published := 0
	for _, r := range stock {
		published += r.Published
	}
	assert.Assert(t, published < stock[0].Starts+stock[1].Starts, "stock failed none: nothing is shown")
	for _, r := range berth {
		assert.Equal(t, r.Answered, r.Starts, r.Name)
	}
}

// Under pasta, nobody asks for a port on the host: each daemon looks, and keeps what it finds
// from the other until its own pasta has it.
func TestTwoUsersStartAtOnceWithPasta(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("running two users' stacks takes root")
	}
	for _, r := range startAtOnce(t, "Berth", "dockerd", pasta, 50) {
		assert.Equal(t, r.Answered, r.Starts, "%+v", r)
	}
}

// startAtOnce has two users start as many containers each, at the same time.
func startAtOnce(t *testing.T, name, dockerd string, o stack.Options, starts int) (results []stress.Result) {
	t.Run(name, func(t *testing.T) {
		root, err := checkout.Root()
		assert.NilError(t, err)
		var scripts []stress.Script
		for _, user := range stacktest.Users[:2] {
			d := stacktest.StartAs(t, user, dockerd, o)
			out := new(strings.Builder)
			t.Cleanup(func() { t.Logf("%s's %s:\n%s", user, name, out) })
			scripts = append(scripts, stress.Script{
				Repository: root,
				Bin:        checkout.Bin(root),
				Host:       d.Host(),
				Starts:     starts,
				AtOnce:     4,
				Out:        out,
				Err:        out,
			})
		}
		results = make([]stress.Result, len(scripts))
		errs := make([]error, len(scripts))
		var wg sync.WaitGroup
		for i, s := range scripts {
			wg.Go(func() { results[i], errs[i] = s.Run(t.Context()) })
		}
		wg.Wait()
		for i, user := range stacktest.Users[:2] {
			assert.NilError(t, errs[i])
			results[i].Name = name + ", user " + user
		}
	})
	return results
}
