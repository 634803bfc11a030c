//go:build integration

// Package faults shows on a real stack that nothing is left behind by what goes wrong between
// dockerd and RootlessKit, or by the sudden end of either.
package faults

import (
	"fmt"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/moby/moby/api/types/network"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/integration/faultproxy"
	"berth/integration/stacktest"
	"berth/integration/whoami"
)

func TestMain(m *testing.M) { stacktest.Main(m) }

func name(f faultproxy.Fault) string {
	if f.Kind == faultproxy.Pass {
		return "delay"
	}
	return string(f.Kind)
}

// tooLong is more than the 10 s that a search takes at most.
const tooLong = 11 * time.Second

// TestFaults has one daemon endure all the faults, one after the other: what each of them leaves
// is still there, alone, after the last.
func TestFaults(t *testing.T) {
	r := start(t)
	t.Run("AddPort", r.addPortFails)
	t.Run("AddPort answered too late", r.addPortAnsweredTooLate)
	t.Run("RemovePort", r.removePortFails)
	t.Run("RemovePort while a start is undone", r.removePortFailsInUndo)
	t.Run("RemovePort answered too late", r.removePortAnsweredTooLate)
	t.Run("RemovePort for good", r.removePortFailsForGood)
	t.Logf("%d faults injected", r.faults)
}

// A start asks for each port twice, for IPv4 and for IPv6.
func (r *rig) addPortFails(t *testing.T) {
	port := 20400
	for _, f := range faultproxy.Faults {
		for _, c := range []struct {
			what  string
			ports int // 0 is a dynamic one
			n     int
		}{
			{"fixed port, first call", 1, 1},
			{"fixed port, second call", 1, 2},
			{"dynamic port, first call", 0, 1},
			{"dynamic port, second call", 0, 2},
			{"second of two fixed ports, second call", 2, 4},
		} {
			if f.Kind == faultproxy.Pass && c.n == 1 {
				continue // as the second
			}
			t.Run(name(f)+", "+c.what, func(t *testing.T) {
				publish := []string{"0:80"}
				if c.ports > 0 {
					publish = nil
				}
				for i := range c.ports {
					publish = append(publish, fmt.Sprintf("%d:%d", port, 80+i))
					port++
				}
				mark := r.mark(t)
				r.proxy.Inject(faultproxy.At(faultproxy.AddPort, c.n, f))
				container, err := r.run(publish...)
				calls := r.injected(t, 1)
				fault := faulty(t, calls)
				to := bindingOf(t, fault)
				var wantSaid []string
				switch {
				case fault.IsLost():
					assert.ErrorContains(t, err, "EOF")
					assert.ErrorContains(t, err, fmt.Sprintf("%d/tcp", to.port))
					assert.ErrorContains(t, err, "see whether RootlessKit is running")
					wantSaid = []string{"lost " + to.String()}
					if f.Kind != faultproxy.CutBefore {
						r.keep(to)
					}
				case f.Kind == faultproxy.Status500 && c.ports > 0:
					assert.ErrorContains(t, err, faultproxy.Message)
					assert.ErrorContains(t, err, fmt.Sprintf("%d/tcp", to.port))
				default:
					assert.NilError(t, err)
					r.answers(t, container)
				}
				assert.Check(t, is.DeepEqual(r.said(t, mark), wantSaid))
				r.remove(t, container)
				r.settled(t)
				r.reservations(t, calls)
			})
		}
	}
}

// RootlessKit answers after dockerd has given up: what it did is undone then.
func (r *rig) addPortAnsweredTooLate(t *testing.T) {
	mark := r.mark(t)
	r.proxy.Inject(faultproxy.At(faultproxy.AddPort, 2, faultproxy.Fault{Delay: tooLong}))
	container, err := r.run("20500:80")
	calls := r.injected(t, 1)
	assert.ErrorContains(t, err, "did not answer in time")
	assert.ErrorContains(t, err, "20500/tcp")
	r.remove(t, container)
	r.settled(t)
	assert.Check(t, is.DeepEqual(r.said(t, mark), []string{"undone 20500"}))
	r.reservations(t, calls)
}

// The removal of a published port fails, and the bridge driver says so. It is tried again.
func (r *rig) removePortFails(t *testing.T) {
	port := 20600
	for _, f := range faultproxy.Faults {
		for n := 1; n <= 2; n++ {
			t.Run(fmt.Sprintf("%s, call %d", name(f), n), func(t *testing.T) {
				port++
				mark := r.mark(t)
				r.proxy.Inject(faultproxy.At(faultproxy.RemovePort, n, f))
				container, err := r.run(fmt.Sprintf("%d:80", port))
				assert.NilError(t, err)
				r.remove(t, container)
				r.settled(t)
				calls := r.injected(t, 1)
				var want []string
				if f.Kind != faultproxy.Pass {
					want = []string{"failed " + bindingOf(t, calls[n-1]).String()}
				}
				assert.Check(t, is.DeepEqual(r.said(t, mark), want))
				r.reservations(t, calls)
			})
		}
	}
}

// A start fails half way, and so does undoing the first half. It is tried again, which nobody
// needs to know.
func (r *rig) removePortFailsInUndo(t *testing.T) {
	port := 20700
	for _, f := range faultproxy.Faults {
		t.Run(name(f), func(t *testing.T) {
			port++
			mark := r.mark(t)
			r.proxy.Inject(faultproxy.All(
				faultproxy.At(faultproxy.AddPort, 2, faultproxy.Fault{Kind: faultproxy.Status500}),
				faultproxy.At(faultproxy.RemovePort, 1, f)))
			container, err := r.run(fmt.Sprintf("%d:80", port))
			assert.ErrorContains(t, err, faultproxy.Message)
			r.remove(t, container)
			r.settled(t)
			calls := r.injected(t, 2)
			assert.Check(t, is.Len(r.said(t, mark), 0))
			r.reservations(t, calls)
		})
	}
}

// RootlessKit answers a removal after dockerd has given up: until then the port is nobody's.
func (r *rig) removePortAnsweredTooLate(t *testing.T) {
	mark := r.mark(t)
	r.proxy.Inject(faultproxy.At(faultproxy.RemovePort, 1, faultproxy.Fault{Delay: tooLong}))
	container, err := r.run("20650:80")
	assert.NilError(t, err)
	r.remove(t, container)
	r.settled(t)
	calls := r.injected(t, 1)
	assert.Check(t, is.DeepEqual(r.said(t, mark), []string{"unanswered " + bindingOf(t, calls[0]).String()}))
	r.reservations(t, calls)
}

// What cannot be removed in four times is named, and nothing else is left.
func (r *rig) removePortFailsForGood(t *testing.T) {
	const publish = "127.0.0.1:20800:80"
	b := binding{"tcp4", "127.0.0.1", 20800}
	mark := r.mark(t)
	r.proxy.Inject(func(c faultproxy.Call) faultproxy.Fault {
		if c.Op == faultproxy.RemovePort {
			return faultproxy.Fault{Kind: faultproxy.CutBefore}
		}
		return faultproxy.Fault{}
	})
	container, err := r.run(publish)
	assert.NilError(t, err)
	r.remove(t, container)
	r.keep(b)
	r.settled(t)
	r.injected(t, 4)
	assert.Check(t, is.DeepEqual(r.said(t, mark), []string{"failed " + b.String(), "held " + b.String()}))
	// It still forwards to its child port, and RootlessKit gives it to nobody else: 127.0.0.2 has its own.
	container, err = r.run("127.0.0.2:20800:80")
	assert.NilError(t, err)
	r.remove(t, container)
	container, err = r.run(publish)
	assert.ErrorContains(t, err, "conflict with ID")
	assert.ErrorContains(t, err, "20800")
	r.remove(t, container)
	r.settled(t)
}

// injected ends the injection, and returns the calls since it began: so many faults happened.
func (r *rig) injected(t *testing.T, want int) []faultproxy.Call {
	t.Helper()
	calls := r.proxy.Calls()
	r.proxy.Inject(nil)
	n := 0
	for _, c := range calls {
		if c.Fault != (faultproxy.Fault{}) {
			n++
		}
	}
	assert.Assert(t, n == want, "%d faults, want %d: %+v", n, want, calls)
	r.faults += n
	return calls
}

// faulty is the call that the fault happened to.
func faulty(t *testing.T, calls []faultproxy.Call) faultproxy.Call {
	t.Helper()
	for _, c := range calls {
		if c.Fault != (faultproxy.Fault{}) {
			return c
		}
	}
	t.Fatalf("no fault in %+v", calls)
	return faultproxy.Call{}
}

// reservations asks for each port of the calls, as a fixed one: those that RootlessKit was left with it
// refuses itself, and the others can be had.
func (r *rig) reservations(t *testing.T, calls []faultproxy.Call) {
	t.Helper()
	seen := map[int]bool{}
	for _, c := range calls {
		if c.Op != faultproxy.AddPort {
			continue
		}
		port := bindingOf(t, c).port
		if seen[port] {
			continue
		}
		seen[port] = true
		container, err := r.run(strconv.Itoa(port) + ":80")
		if slices.ContainsFunc(r.left, func(b binding) bool { return b.port == port }) {
			assert.Check(t, is.ErrorContains(err, "conflict with ID"))
		} else if assert.Check(t, err) {
			r.answers(t, container)
		}
		r.remove(t, container)
		r.proxy.Inject(nil)
	}
	r.settled(t)
}

// run starts a container, and returns its name, whatever became of it.
func (r *rig) run(publish ...string) (container string, _ error) {
	r.containers++
	container = fmt.Sprint("c", r.containers)
	args := []string{"run", "-d", "--name", container}
	for _, p := range publish {
		args = append(args, "-p", p)
	}
	_, err := r.d.Docker(append(args, whoami.Image)...)
	return container, err
}

func (r *rig) remove(t *testing.T, container string) {
	t.Helper()
	_, err := r.d.Docker("rm", "-f", container)
	assert.NilError(t, err)
}

// answers checks that the container answers where its port 80 is published.
func (r *rig) answers(t *testing.T, container string) {
	t.Helper()
	id, err := r.d.Docker("inspect", "-f", "{{.Id}}", container)
	assert.NilError(t, err)
	ports, err := r.d.Ports(t.Context(), id)
	assert.NilError(t, err)
	for _, at := range ports[network.MustParsePort("80/tcp")] {
		stacktest.AssertAnswers(t, "tcp", at, id)
	}
}
