package nat

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

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
