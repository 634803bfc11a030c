//go:build integration

package e2e

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
	"berth/integration/whoami"
)

var lockRounds = flag.Int("lock-rounds", 2, "how often TestStopsWaitForASearch measures each case")

const (
	// Stops are spread over a start: some of them come while the search holds the lock.
	victims   = 4
	victimGap = 50 * time.Millisecond
)

var port80 = network.MustParsePort("80/tcp")

// takenPorts are how many host ports are taken, in a row, from the one on that a start takes first.
var takenPorts = []int{0, 100, 1000, 10000}

// lockRow is what other containers felt of one that was started.
type lockRow struct {
	Daemon string `json:"daemon"`
	Taken  int    `json:"taken"`
	Starts int    `json:"starts"`
	Failed int    `json:"failed"`

	StartMedian float64 `json:"start_median_ms"`
	StopMedian  float64 `json:"stop_median_ms"`
	StopWorst   float64 `json:"stop_worst_ms"`
	// SearchMedian is how long the search itself took, of those that the daemon's log tells: those
	// that were refused a port. A view passes taken ports without asking for them.
	SearchMedian float64 `json:"search_median_ms,omitempty"`
	// More is the median of how much longer a stop took than one in the same round with no port taken.
	More float64 `json:"stop_more_median_ms"`

	starts, stops, searches []time.Duration
}

// While a start searches, under the bridge driver's one lock, `docker stop` of another container
// waits. How long is also written to build/results, as lock.txt and lock.json.
func TestStopsWaitForASearch(t *testing.T) {
	needsNamespace(t)
	var rows []lockRow
	for _, tt := range []struct {
		name, dockerd string
		options       stack.Options
	}{
		{"stock", "dockerd-stock", stack.Options{}},
		{"Berth without a view", "dockerd", stack.Options{NoDetachNetns: true}},
		{"Berth with a view", "dockerd", stack.Options{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := stacktest.Start(t, tt.dockerd, tt.options)
			rows = append(rows, measureLock(t, d, tt.name)...)
		})
	}

	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\ttaken\tstarts\tfailed\tsearch, median ms\tstart, median ms\tother's stop, median ms\tworst ms\tmore than with none taken, median ms\t")
	for _, r := range rows {
		search := "-"
		if r.SearchMedian > 0 {
			search = fmt.Sprintf("%.1f", r.SearchMedian)
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%s\t%.0f\t%.0f\t%.0f\t%.0f\t\n", r.Daemon, r.Taken, r.Starts, r.Failed, search, r.StartMedian, r.StopMedian, r.StopWorst, r.More)
	}
	w.Flush()
	t.Logf("\n%s", &table)
	stacktest.WriteResults(t, "lock.json", rows)
	stacktest.WriteText(t, "lock.txt", table.String())

	stock := 0.0 // its slowest case
	for _, r := range rows {
		if r.Daemon == "stock" {
			stock = max(stock, r.StopMedian)
		}
	}
	for _, r := range rows {
		switch {
		case r.Daemon != "stock":
			assert.Check(t, is.Equal(r.Failed, 0), "%+v", r)
			// They are the same but for the machine's moods. A search that takes its two seconds makes it four times as much.
			assert.Check(t, r.StopMedian < 3*stock, "stock's slowest median is %.0f ms, in the same run: %+v", stock, r)
		case r.Taken > 0:
			assert.Equal(t, r.Failed, r.Starts, "the load proved nothing: %+v", r)
		}
	}
}

func measureLock(t *testing.T, d *stacktest.Daemon, name string) []lockRow {
	var others []string
	for i := range victims {
		id, err := d.Create(t.Context(), network.PortMap{port80: {{HostPort: fmt.Sprint(20400 + i)}}})
		assert.NilError(t, err)
		others = append(others, id)
	}
	rows := make([]lockRow, len(takenPorts))
	// Each case once a round: what else the machine does is then the same for all.
	for range *lockRounds {
		for i, taken := range takenPorts {
			r := &rows[i]
			r.Daemon, r.Taken = name, taken
			r.Starts++
			told := len(searches(t, d))
			if err := r.measure(t, d, others); err != nil {
				r.Failed++
			}
			r.searches = append(r.searches, searches(t, d)[told:]...)
		}
	}
	for i := range rows {
		r := &rows[i]
		var more []time.Duration
		for j, s := range r.stops {
			more = append(more, s-rows[0].stops[j])
		}
		r.More = ms(median(more))
	}
	for i := range rows {
		r := &rows[i]
		r.StartMedian, r.StopMedian, r.StopWorst = ms(median(r.starts)), ms(median(r.stops)), ms(slices.Max(r.stops))
		if len(r.searches) > 0 {
			r.SearchMedian = ms(median(r.searches))
		}
	}
	return rows
}

// measure starts a container with r.Taken ports in its way, stops the others meanwhile, and
// returns what the start failed with.
func (r *lockRow) measure(t *testing.T, d *stacktest.Daemon, others []string) error {
	t.Helper()
	ctx := t.Context()
	var begun sync.WaitGroup
	errs := make([]error, len(others))
	for i, id := range others {
		begun.Go(func() { _, errs[i] = d.API.ContainerStart(ctx, id, client.ContainerStartOptions{}) })
	}
	begun.Wait()
	assert.NilError(t, errors.Join(errs...))
	for i, id := range others {
		// It heeds no signal before it serves.
		at := netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(20400+i))
		assert.NilError(t, whoami.Await("tcp", at, id, time.Minute))
	}

	create := func() string {
		id, err := d.Create(ctx, network.PortMap{port80: {{}}})
		assert.NilError(t, err)
		return id
	}
	last := create()
	_, err := d.API.ContainerStart(ctx, last, client.ContainerStartOptions{})
	assert.NilError(t, err)
	published := d.Published(t, last)
	assert.Assert(t, len(published) > 0)
	next := int(published[0].Port()) + 1
	remove := func(id string) {
		_, err := d.API.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true})
		assert.NilError(t, err)
	}
	remove(last)
	if r.Taken > 0 {
		var ports []int
		for i := range r.Taken {
			ports = append(ports, firstDefault+(next-firstDefault+i)%(lastDefault-firstDefault+1))
		}
		load, err := hostload.Start(hostload.Load{Network: "tcp4", Ports: ports})
		assert.NilError(t, err)
		defer func() {
			_, err := load.Stop()
			assert.NilError(t, err)
		}()
	}

	searcher := create()
	stops := make([]time.Duration, len(others))
	var stopped sync.WaitGroup
	for i, id := range others {
		stopped.Go(func() {
			time.Sleep(time.Duration(i) * victimGap)
			begin := time.Now()
			_, errs[i] = d.API.ContainerStop(ctx, id, client.ContainerStopOptions{})
			stops[i] = time.Since(begin)
		})
	}
	begin := time.Now()
	_, failure := d.API.ContainerStart(ctx, searcher, client.ContainerStartOptions{})
	r.starts = append(r.starts, time.Since(begin))
	stopped.Wait()
	assert.NilError(t, errors.Join(errs...))
	r.stops = append(r.stops, stops...)
	remove(searcher)
	return failure
}

// searches returns how long those searches took that the daemon's log tells of.
func searches(t *testing.T, d *stacktest.Daemon) (took []time.Duration) {
	t.Helper()
	for _, l := range d.ReadLog(t, 0) {
		if l.Message == "Published a host port after refusals of others" {
			took = append(took, l.Duration)
		}
	}
	return took
}

func median(list []time.Duration) time.Duration {
	slices.Sort(list)
	return list[len(list)/2]
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
