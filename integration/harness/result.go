package harness

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
	"gonum.org/v1/gonum/stat"
)

// schema is the version of what is in a file of results. docs/measuring.md has what each field means.
const schema = 1

// Results are what is in a file of them.
type Results struct {
	Version int     `json:"version"`
	Cells   []*Cell `json:"cells"`

	file string
}

// Cell is what came of a contender's starts of a request under a load.
type Cell struct {
	Contender string    `json:"contender"`
	Load      string    `json:"load"`
	Request   string    `json:"request"`
	Daemon    string    `json:"daemon"`        // its version
	SHA256    string    `json:"daemon_sha256"` // of its program
	Machine   Machine   `json:"machine"`
	Date      time.Time `json:"date"` // of the first start
	Seed      uint64    `json:"seed"`
	Parallel  int       `json:"parallel"`
	Wanted    int       `json:"wanted_starts"`
	CannotRun string    `json:"cannot_run,omitempty"` // why there are none, or not all

	Summary Summary `json:"summary"` // computed from the rest
	Turns   []Turn  `json:"turns"`
	Starts  []Start `json:"starts"`
}

// Machine is where a cell was measured.
type Machine struct {
	Kernel    string `json:"kernel"`
	Processor string `json:"processor"`
	CPUs      int    `json:"cpus"`
	MemoryMB  uint64 `json:"memory_mb"`
}

// Turn is one of a contender's turns.
type Turn struct {
	Held    int     `json:"held_ports"` // by the load
	Starts  int     `json:"starts"`
	Seconds float64 `json:"seconds"`                // from the first one's beginning to the last one's check
	Idle    float64 `json:"idle_seconds,omitempty"` // of as many just before or after, without the load
}

func (t Turn) perSecond() float64 { return float64(t.Starts) / t.Seconds }

// Start is one start of a container.
type Start struct {
	Turn     int     `json:"turn"`
	MS       float64 `json:"ms"`      // what creating and starting took
	Outcome  string  `json:"outcome"` // published, misdelivered, or why it was refused: in use, gave up, other
	Error    string  `json:"error,omitempty"`
	Attempts int     `json:"attempts,omitempty"`  // of all its ports, where the daemon tells
	SearchMS float64 `json:"search_ms,omitempty"` // what the attempts took, with the daemon's lock held, if there were several

	id    string
	ports []string // of the host, such as "32768/tcp"
}

const (
	published    = "published"
	misdelivered = "misdelivered"
	inUse        = "in use"
	gaveUp       = "gave up"
	other        = "other"
)

// Summary is computed of the starts.
type Summary struct {
	Starts       int            `json:"starts"`
	Published    int            `json:"published"`
	Misdelivered int            `json:"misdelivered"`
	Refused      map[string]int `json:"refused,omitempty"` // by cause
	FailureRate  Interval       `json:"failure_rate"`
	P50          float64        `json:"p50_ms"` // of those that were published
	P95          float64        `json:"p95_ms"`
	P99          float64        `json:"p99_ms"`
	PerSecond    float64        `json:"starts_per_second"` // the median turn's
	OfIdle       float64        `json:"of_idle,omitempty"` // starts a second, by those without the load: the median turn's
	Attempts     float64        `json:"attempts_per_publish,omitempty"`
}

// Interval is a rate with its 95% Wilson interval.
type Interval struct {
	Rate float64 `json:"rate"`
	Low  float64 `json:"low"`
	High float64 `json:"high"`
}

// wilson is of k in n.
func wilson(k, n int) Interval {
	if n == 0 {
		return Interval{High: 1}
	}
	const z = 1.959964 // the normal distribution's, for 95%
	p, m := float64(k)/float64(n), float64(n)
	centre, half := p+z*z/(2*m), z*math.Sqrt(p*(1-p)/m+z*z/(4*m*m))
	scale := 1 + z*z/m
	return Interval{p, max(0, (centre-half)/scale), min(1, (centre+half)/scale)}
}

func (c *Cell) summarize() {
	s := Summary{Starts: len(c.Starts), Refused: map[string]int{}}
	var took []float64
	attempts := 0
	for _, start := range c.Starts {
		switch start.Outcome {
		case published:
			s.Published++
			took = append(took, start.MS)
			attempts += start.Attempts
		case misdelivered:
			s.Misdelivered++
		default:
			s.Refused[start.Outcome]++
		}
	}
	s.FailureRate = wilson(s.Starts-s.Published, s.Starts)
	if slices.Sort(took); len(took) > 0 {
		s.P50, s.P95, s.P99 = quantile(0.5, took), quantile(0.95, took), quantile(0.99, took)
		s.Attempts = float64(attempts) / float64(len(took))
	}
	var rates []float64
	for _, t := range c.Turns {
		if t.Starts > 0 {
			rates = append(rates, t.perSecond())
		}
	}
	if slices.Sort(rates); len(rates) > 0 {
		s.PerSecond = quantile(0.5, rates)
	}
	s.OfIdle = c.pace(func(_ int, t Turn) Turn { return Turn{Starts: t.Starts, Seconds: t.Idle} })
	c.Summary = s
}

// pace is the median of the ratios of the turns' starts a second to those of what is beside them, or 0 if nothing is.
func (c *Cell) pace(beside func(turn int, t Turn) Turn) float64 {
	var ratios []float64
	for i, t := range c.Turns {
		if b := beside(i, t); b.Starts > 0 && b.Seconds > 0 {
			ratios = append(ratios, t.perSecond()/b.perSecond())
		}
	}
	if slices.Sort(ratios); len(ratios) == 0 {
		return 0
	}
	return quantile(0.5, ratios)
}

func quantile(p float64, sorted []float64) float64 {
	return stat.Quantile(p, stat.Empirical, sorted, nil)
}

func (c *Cell) key() string { return strings.Join([]string{c.Request, c.Load, c.Contender}, " ") }

// done tells whether have is the whole of what c is to be.
func (c *Cell) done(have *Cell) bool {
	return have.key() == c.key() && have.SHA256 == c.SHA256 && have.Seed == c.Seed && have.Parallel == c.Parallel &&
		have.Wanted == c.Wanted && len(have.Starts) == c.Wanted && have.CannotRun == ""
}

// LoadResults reads the file, if there is one.
func LoadResults(file string) (*Results, error) {
	r := &Results{Version: schema, file: file}
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if r.Version != schema {
		return nil, fmt.Errorf("%s has results of version %d, not %d: move it away", file, r.Version, schema)
	}
	return r, nil
}

// put keeps the cell, in place of the one that there was of the same.
func (r *Results) put(c *Cell) error {
	c.summarize()
	r.Cells = slices.DeleteFunc(r.Cells, func(have *Cell) bool { return have.key() == c.key() })
	r.Cells = append(r.Cells, c)
	order := func(c *Cell) int {
		return 10000*slices.IndexFunc(requests, func(r Request) bool { return r.Name == c.Request }) +
			100*slices.IndexFunc(loads, func(l Load) bool { return l.Name == c.Load }) +
			slices.IndexFunc(contenders, func(k Contender) bool { return k.Name == c.Contender })
	}
	slices.SortStableFunc(r.Cells, func(a, b *Cell) int { return cmp.Compare(order(a), order(b)) })
	data, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(r.file), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(r.file+".tmp", data, 0o644); err != nil {
		return err
	}
	return os.Rename(r.file+".tmp", r.file)
}

// Print prints the cells, a line each.
func (r *Results) Print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "request\tload\tcontender\tstarts\tpublished\tin use\tgave up\tother\tmisdelivered\tfailed % (95%)\tp50 ms\tp95\tp99\tstarts/s\tattempts\t")
	for _, c := range r.Cells {
		if len(c.Starts) == 0 {
			continue
		}
		s := c.Summary
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%s\t%.0f\t%.0f\t%.0f\t%.1f\t", c.Request, c.Load, c.Contender, s.Starts, s.Published,
			s.Refused[inUse], s.Refused[gaveUp], s.Refused[other], s.Misdelivered, s.FailureRate, s.P50, s.P95, s.P99, s.PerSecond)
		if s.Attempts > 0 {
			fmt.Fprintf(w, "%.1f", s.Attempts)
		}
		fmt.Fprintln(w, "\t")
	}
	w.Flush()
	for _, c := range r.Cells {
		if says := c.Beside(); says != "" {
			fmt.Fprintln(out, says)
		}
		if c.CannotRun != "" {
			fmt.Fprintf(out, "%s: cannot run here: %s\n", c.key(), c.CannotRun)
		}
	}
}

// Beside is how the pace compares to those beside it, or "".
func (c *Cell) Beside() (says string) {
	if c.Summary.OfIdle > 0 {
		says = fmt.Sprintf("%s: %.2f x the starts a second without the load", c.key(), c.Summary.OfIdle)
	}
	return says
}

// String is in percent.
func (i Interval) String() string {
	return fmt.Sprintf("%.1f (%.1f-%.1f)", 100*i.Rate, 100*i.Low, 100*i.High)
}

func thisMachine() (m Machine, err error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return m, err
	}
	m.Kernel, m.CPUs = unix.ByteSliceToString(u.Release[:]), runtime.NumCPU()
	fs, err := procfs.NewDefaultFS()
	if err != nil {
		return m, err
	}
	memory, err := fs.Meminfo()
	if err != nil {
		return m, err
	}
	m.MemoryMB = *memory.MemTotal / 1024
	cpus, err := fs.CPUInfo()
	if err == nil && len(cpus) > 0 {
		m.Processor = cpus[0].ModelName
	}
	return m, err
}
