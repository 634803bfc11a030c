package nat

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/docker/go-metrics"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// meters are what the daemon's --metrics-addr has of this package. A label has all its values from the start:
// so a first failure is seen as an increase, and a call makes no objects.
var (
	meters         = metrics.NewNamespace("engine", "portmapper", nil)
	meterPublishes = map[[2]string]metrics.Counter{}
	meterRefusals  = map[verdict]metrics.Counter{}
	meterLooks     = meters.NewCounter("looks", "The number of the host's ports that were looked at")
	meterSilences  = meters.NewCounter("silences", "The number of requests to RootlessKit that were given up, or not sent, since it does not answer")
	meterLateUndos = meters.NewCounter("late_undos", "The number of port requests that were given up, and served and undone since")
	meterSearch    = meters.NewTimer("search", "The number of seconds it takes to publish a port, or to fail")
	meterAttempts  = prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: "engine", Subsystem: "portmapper", Name: "attempts", Help: "The number of attempts it takes to publish a port, or to fail",
		Buckets: []float64{1, 2, 4, 8, 16, 32, 64, 256, 1024},
	})
)

func init() {
	publishes := meters.NewLabeledCounter("publishes", "The number of requests to publish a port, by how they ended and which host port was asked for", "outcome", "asked")
	for _, outcome := range []string{"published", "no_port", "failed", "canceled"} {
		for _, asked := range []string{"dynamic", "range", "fixed"} {
			meterPublishes[[2]string{outcome, asked}] = publishes.WithValues(outcome, asked)
		}
	}
	refusals := meters.NewLabeledCounter("refusals", "The number of host ports that the port driver refused, by whether another one would help", "verdict")
	for v, name := range map[verdict]string{another: "another", maybe: "maybe", no: "no"} {
		meterRefusals[v] = refusals.WithValues(name)
	}
	meters.Add(meterAttempts)
	meters.Add(portsLeft{meters.NewDesc("ports_left", "The number of the host's dynamic ports that no socket has", "", "protocol")})
	metrics.Register(meters)
}

// meterCall takes note of a call of MapPorts, as it ends.
func meterCall(ctx context.Context, cfg []portmapperapi.PortBindingReq, s *search, start time.Time, pbs *[]portmapperapi.PortBinding, err *error) {
	outcome, asked := meterOutcome(ctx, s, *err), "dynamic"
	if cfg[0].HostPort != cfg[0].HostPortEnd {
		asked = "range"
	} else if cfg[0].HostPort != 0 {
		asked = "fixed"
	}
	meterPublishes[[2]string{outcome, asked}].Inc()
	meterSearch.UpdateSince(start)
	if s.tries > 0 {
		meterAttempts.Observe(float64(s.tries))
	}
	meterPass(s.ports)
	if !trace.SpanFromContext(ctx).IsRecording() {
		return
	}
	_, span := otel.Tracer("").Start(ctx, "libnetwork.portmappers.nat.MapPorts", trace.WithTimestamp(start), trace.WithAttributes(
		attribute.String("outcome", outcome), attribute.String("asked", asked), attribute.Int("attempts", s.tries)))
	defer span.End()
	if *err != nil {
		span.RecordError(*err)
		span.SetStatus(codes.Error, (*err).Error())
	} else {
		span.SetAttributes(attribute.Int("port", int((*pbs)[0].HostPort)))
	}
}

func meterOutcome(ctx context.Context, s *search, err error) string {
	if err == nil {
		return "published"
	}
	searched := (*failure)(nil)
	switch {
	case ctx.Err() != nil:
		return "canceled"
	case s.tries == 0 && !errors.As(err, &searched), causeOf(err, s.limit()).verdict() == no:
		return "failed"
	}
	return "no_port"
}

// meterPass takes note of a pass over ports that is over.
func meterPass(ports source) {
	if h, ok := ports.(*hostPorts); ok && h.tried > 1 { // The first one is given without a look.
		meterLooks.Inc(float64(h.tried - 1))
	}
}

// meter is a driver round another, which takes note of what is refused.
type meter struct{ PortDriverClient }

func (d meter) AddPort(ctx context.Context, proto string, hostIP, childIP netip.Addr, hostPort int) (func() error, error) {
	remove, err := d.PortDriverClient.AddPort(ctx, proto, hostIP, childIP, hostPort)
	if err != nil && !errors.Is(err, errNoAnswer) {
		meterRefusals[causeOf(&hostRefusal{host: hostIP, port: hostPort, err: err}, 0).verdict()].Inc()
	}
	return remove, err
}
