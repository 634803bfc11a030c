package nat

import (
	"github.com/docker/go-metrics"
	"github.com/prometheus/client_golang/prometheus"
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
	metrics.Register(meters)
}
