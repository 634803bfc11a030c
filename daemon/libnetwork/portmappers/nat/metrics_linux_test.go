package nat

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// gathered is what the daemon would export of this package, by name and labels' values.
func gathered(t *testing.T) map[string]float64 {
	t.Helper()
	families, err := prometheus.DefaultGatherer.Gather()
	assert.NilError(t, err)
	values := map[string]float64{}
	for _, f := range families {
		name, ours := strings.CutPrefix(f.GetName(), "engine_portmapper_")
		if !ours {
			continue
		}
		for _, m := range f.GetMetric() {
			name := name
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			switch {
			case m.GetHistogram() != nil:
				values[name+" count"] = float64(m.GetHistogram().GetSampleCount())
				values[name+" sum"] = m.GetHistogram().GetSampleSum()
			case m.GetGauge() != nil:
				values[name] = m.GetGauge().GetValue()
			default:
				values[name] = m.GetCounter().GetValue()
			}
		}
	}
	return values
}

// counted is what f has added to the counters and the histogram of attempts.
func counted(t *testing.T, f func()) map[string]float64 {
	t.Helper()
	before := gathered(t)
	f()
	added := gathered(t)
	for name, v := range before {
		if added[name] -= v; added[name] == 0 || strings.HasPrefix(name, "ports_left") || name == "search_seconds sum" {
			delete(added, name)
		}
	}
	return added
}

// A rootful daemon's error for a fixed port is the allocator's: no search tells what it is about.
func TestMetricsOfATakenRootfulPort(t *testing.T) {
	holdHere(t, "127.0.0.12", 20000, 20000)
	got := counted(t, func() {
		_, err := PortMapper{}.MapPorts(context.Background(), ask(types.UDP, 20000, 20000, "127.0.0.12"))
		assert.Check(t, is.ErrorContains(err, "address already in use"))
	})
	want := map[string]float64{"publishes_total fixed no_port": 1, "attempts sum": 1}
	for name, n := range want {
		assert.Check(t, is.Equal(got[name], n), "%s of %v", name, got)
	}
}

func TestMetricsOfACall(t *testing.T) {
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	inUse := errors.New("listen tcp4 0.0.0.0:1: bind: address already in use")
	for name, tt := range map[string]struct {
		proto       types.Protocol
		first, last int
		ctx         context.Context
		answers     []error // of the first calls
		want        map[string]float64
	}{
		"published": {want: map[string]float64{"publishes_total dynamic published": 1, "attempts sum": 1}},
		"published after refusals": {
			answers: []error{inUse, inUse, errors.New(slirpShrug)},
			want:    map[string]float64{"publishes_total dynamic published": 1, "attempts sum": 4, "refusals_total another": 2, "refusals_total maybe": 1},
		},
		"a range without a port": {
			first: 20000, last: 20001, answers: []error{inUse, inUse},
			want: map[string]float64{"publishes_total range no_port": 1, "attempts sum": 2, "refusals_total another": 2},
		},
		"a fixed port that is taken": {
			first: 20000, last: 20000, answers: []error{inUse},
			want: map[string]float64{"publishes_total fixed no_port": 1, "attempts sum": 1, "refusals_total another": 1},
		},
		"an address that isn't there": {
			answers: []error{errors.New("bind: cannot assign requested address")},
			want:    map[string]float64{"publishes_total dynamic failed": 1, "attempts sum": 1, "refusals_total no": 1},
		},
		"a protocol that isn't served": {
			proto: types.SCTP,
			want:  map[string]float64{"publishes_total dynamic failed": 1},
		},
		"a caller that has gone": {
			ctx:  gone,
			want: map[string]float64{"publishes_total dynamic canceled": 1, "attempts sum": 1},
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.answer = func(call int, _ mapping) error {
				if call <= len(tt.answers) {
					return tt.answers[call-1]
				}
				return nil
			}
			if tt.proto == 0 {
				tt.proto = types.TCP
			}
			if tt.ctx == nil {
				tt.ctx = context.Background()
			}
			tt.want["search_seconds count"] = 1
			if tt.want["attempts sum"] > 0 {
				tt.want["attempts count"] = 1
			}
			pm := NewPortMapper(Config{RlkClient: f})
			assert.Check(t, is.DeepEqual(counted(t, func() {
				pbs, _ := pm.MapPorts(tt.ctx, ask(tt.proto, tt.first, tt.last, "0.0.0.0"))
				assert.Check(t, pm.UnmapPorts(context.Background(), pbs))
			}), tt.want))
		})
	}
}

func TestMetricsOfALook(t *testing.T) {
	f := newHostFake(t)
	inChild(t)
	occupy(t, "tcp", "0.0.0.0", 40000, 40009)
	pm := NewPortMapper(Config{RlkClient: f})
	pm.rooms.cursors[types.TCP].Store(39999)
	assert.Check(t, is.DeepEqual(counted(t, func() {
		unmap(t, pm, mapped(t, pm, ask(types.TCP, 0, 0, "0.0.0.0")))
	}), map[string]float64{
		"publishes_total dynamic published": 1, "attempts count": 1, "attempts sum": 2, "search_seconds count": 1,
		"looks_total": 10, "refusals_total another": 1, // The first one is asked for without a look.
	}))
}

func TestMetricsOfPasta(t *testing.T) {
	newHostFake(t) // For its check that nothing is left.
	inChild(t)
	occupy(t, "tcp", "0.0.0.0", 20000, 20001)
	pm := pastaMapper()
	assert.Check(t, is.DeepEqual(counted(t, func() {
		_, err := pm.MapPorts(context.Background(), ask(types.TCP, 20000, 20001, "0.0.0.0"))
		assert.Check(t, is.ErrorContains(err, "address already in use"))
	}), map[string]float64{
		"publishes_total range no_port": 1, "attempts count": 1, "attempts sum": 3, "search_seconds count": 1,
		"looks_total": 1, "refusals_total another": 3, // One without a look, and then both, insisted on.
	}))
}

// A request and a removal are given up. What the request did is undone when its answer comes.
func TestMetricsOfASilence(t *testing.T) {
	fake := newFake(t)
	assert.Check(t, is.DeepEqual(counted(t, func() {
		synctest.Test(t, func(t *testing.T) {
			h := &hanging{fakeDriver: fake}
			pm := NewPortMapper(Config{RlkClient: h})
			ctx, _ := logged()
			pbs := mapped(t, pm, ask(types.TCP, 8080, 8080, "0.0.0.0"))
			h.hang()
			_, err := pm.MapPorts(ctx, ask(types.TCP, 8081, 8081, "0.0.0.0"))
			assert.Check(t, is.ErrorIs(err, errNoAnswer))
			unmapAll(t, pm, pbs)
			h.resume()
			assert.Check(t, is.Equal(h.onHost(), 0))
		})
	}), map[string]float64{
		"publishes_total fixed published": 1, "publishes_total fixed failed": 1, "attempts count": 2, "attempts sum": 2, "search_seconds count": 2,
		"silences_total": 2, "late_undos_total": 1,
	}))
}

// A refusal that comes late leaves nothing to undo; a removal that an attempt's undo gives up is one that isn't answered.
func TestMetricsOfALateRefusalAndAnUndo(t *testing.T) {
	inUse := errors.New(answerPrefix + "listen tcp 8081: bind: address already in use")
	for name, tt := range map[string]struct {
		addrs []string
		hang  string // RootlessKit hangs before it is asked for this one, or after it has refused it.
		want  map[string]float64
	}{
		"late refusal": {[]string{"0.0.0.0"}, "before", map[string]float64{
			"publishes_total fixed failed": 1, "attempts count": 1, "attempts sum": 1, "search_seconds count": 1, "silences_total": 1,
		}},
		"undo": {[]string{"0.0.0.0", "::"}, "after", map[string]float64{
			"publishes_total fixed no_port": 1, "attempts count": 1, "attempts sum": 1, "search_seconds count": 1,
			"refusals_total another": 1, "silences_total": 1,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			fake := newFake(t)
			assert.Check(t, is.DeepEqual(counted(t, func() {
				synctest.Test(t, func(t *testing.T) {
					h := &hanging{fakeDriver: fake}
					fake.answer = func(_ int, m mapping) error {
						if m.ip.Is4() && tt.hang == "after" {
							return nil
						}
						if tt.hang == "after" {
							h.hang()
						}
						return inUse
					}
					pm := NewPortMapper(Config{RlkClient: h})
					ctx, _ := logged()
					if tt.hang == "before" {
						h.hang()
					}
					_, err := pm.MapPorts(ctx, ask(types.TCP, 8081, 8081, tt.addrs...))
					assert.Check(t, err != nil && !strings.Contains(err.Error(), "none was had"), err)
					h.resume()
					synctest.Wait()
					assert.Check(t, is.Equal(h.onHost(), 0))
				})
			}), tt.want))
		})
	}
}

// Two addresses that can't have one port on any host: no host is full.
func TestMetricsOfAnOverlap(t *testing.T) {
	f := newFake(t)
	assert.Check(t, is.DeepEqual(counted(t, func() {
		_, err := NewPortMapper(Config{RlkClient: f}).MapPorts(context.Background(), ask(types.TCP, 0, 0, "0.0.0.0", "127.0.0.1"))
		assert.Check(t, err != nil)
	}), map[string]float64{"publishes_total dynamic failed": 1, "search_seconds count": 1}))
}

func TestPortsLeft(t *testing.T) {
	newFake(t) // For its check that nothing is left.
	setSysctl(t, "ip_local_port_range", "40000 40009")
	setSysctl(t, "ip_local_reserved_ports", "40001,40003-40004")
	occupy(t, "tcp", "127.0.0.1", 40000, 40002-1)
	occupy(t, "udp", "::1", 40008, 40009)
	left := func() string {
		v := gathered(t)
		tcp, seen := v["ports_left tcp"]
		return fmt.Sprint(seen, " ", tcp, " ", v["ports_left udp"])
	}
	assert.Check(t, is.Equal(left(), "true 6 5"), "the host's own daemon")

	var limit unix.Rlimit
	assert.NilError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	assert.NilError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: limit.Max}))
	blind := left()
	assert.NilError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
	assert.Check(t, is.Equal(blind, "false 0 0"), "what can't be counted is not told")

	inChild(t)
	assert.Check(t, is.Equal(left(), "true 6 5"), "with a view")

	dir := t.TempDir()
	t.Setenv("ROOTLESSKIT_STATE_DIR", dir)
	assert.Check(t, is.Equal(left(), "false 0 0"), "without a view")
	assert.NilError(t, os.Symlink(fmt.Sprintf("/proc/%d/ns/net", os.Getpid()), filepath.Join(dir, "netns")))
	assert.Check(t, is.Equal(left(), "false 0 0"), "in the child as a whole")
}

func TestSpan(t *testing.T) {
	f := newFake(t)
	f.taken = func(port int) bool { return port == 20000 }
	pm := NewPortMapper(Config{RlkClient: f})
	spans := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
	otel.SetTracerProvider(provider)
	t.Cleanup(func() { otel.SetTracerProvider(noop.NewTracerProvider()) })
	ctx, parent := provider.Tracer("").Start(context.Background(), "parent")

	pbs, err := pm.MapPorts(ctx, ask(types.TCP, 20000, 20002, "0.0.0.0"))
	assert.NilError(t, err)
	assert.NilError(t, pm.UnmapPorts(ctx, pbs))
	_, err = pm.MapPorts(ctx, ask(types.TCP, 20000, 20000, "0.0.0.0"))
	assert.ErrorContains(t, err, "address already in use")
	_, quiet := pm.MapPorts(context.Background(), ask(types.TCP, 20000, 20000, "0.0.0.0")) // Whose caller's is not recorded.
	assert.ErrorContains(t, quiet, "address already in use")

	ended := spans.Ended()
	assert.Assert(t, is.Len(ended, 2))
	for i, want := range []string{
		"{published range 2 20001}", "{no_port fixed 1 <nil>}",
	} {
		span, attrs := ended[i], map[string]any{}
		for _, a := range span.Attributes() {
			attrs[string(a.Key)] = a.Value.AsInterface()
		}
		assert.Check(t, is.Equal(span.Name(), "libnetwork.portmappers.nat.MapPorts"))
		assert.Check(t, is.Equal(span.Parent().SpanID(), parent.SpanContext().SpanID()))
		assert.Check(t, is.Equal(fmt.Sprint(struct{ outcome, asked, attempts, port any }{attrs["outcome"], attrs["asked"], attrs["attempts"], attrs["port"]}), want))
	}
	assert.Check(t, is.Equal(ended[0].Status().Code, codes.Unset))
	assert.Check(t, is.Equal(ended[1].Status().Code, codes.Error))
	assert.Check(t, is.Equal(ended[1].Status().Description, err.Error()))
	assert.Check(t, is.Len(ended[1].Events(), 1))
}

// atOnce is a driver that says yes.
type atOnce struct{ PortDriverClient }

func (atOnce) AddPort(context.Context, string, netip.Addr, netip.Addr, int) (func() error, error) {
	return nil, nil
}

func TestMetersMakeNoObjects(t *testing.T) {
	ctx, cfg, start, d := context.Background(), ask(types.TCP, 0, 0, "0.0.0.0"), time.Now(), PortDriverClient(meter{atOnce{}})
	s, pbs, err := search{req: &request{}, tries: 1}, []portmapperapi.PortBinding(nil), error(nil)
	assert.Check(t, is.Equal(testing.AllocsPerRun(100, func() {
		_, _ = d.AddPort(ctx, "tcp", netip.IPv4Unspecified(), netip.IPv4Unspecified(), 1)
		meterCall(ctx, cfg, &s, start, &pbs, &err)
	}), 0.0))
}
