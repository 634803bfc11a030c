package harness

import (
	"bytes"
	"fmt"
	"image/color"
	"math"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"berth/integration/chart"
)

// marks are the contenders', in their order: each has a shape of its own, so that none is told by its colour alone. The page
// has the colours again, for light and dark.
var marks = []struct {
	shape draw.GlyphDrawer
	color color.RGBA
}{
	{draw.PyramidGlyph{}, color.RGBA{0, 110, 80, 255}},
	{draw.BoxGlyph{}, color.RGBA{0, 95, 160, 255}},
	{draw.CircleGlyph{}, color.RGBA{200, 80, 0, 255}},
	{draw.CrossGlyph{}, color.RGBA{150, 60, 120, 255}},
	{draw.PlusGlyph{}, color.RGBA{110, 90, 0, 255}},
	{draw.TriangleGlyph{}, color.RGBA{0, 111, 81, 255}},
	{draw.RingGlyph{}, color.RGBA{201, 80, 0, 255}},
	{draw.SquareGlyph{}, color.RGBA{90, 90, 91, 255}}, // of --dockerd
}

func mark(contender int) (m draw.GlyphStyle) {
	k := marks[min(contender, len(marks)-1)]
	return draw.GlyphStyle{Shape: k.shape, Color: k.color, Radius: 4}
}

// figure is a plot of the page.
type figure struct {
	Title, About string
	plot         *plot.Plot
	wide         vg.Length
}

func newFigure(title, about, x, y string, wide vg.Length) figure {
	return figure{title, about, chart.New(title, x, y), wide}
}

// nominal has names at 0, 1, 2 ... of the x axis.
func (f figure) nominal(names []string) {
	var ticks plot.ConstantTicks
	for i, name := range names {
		ticks = append(ticks, plot.Tick{Value: float64(i), Label: name})
	}
	f.plot.X.Tick.Marker, f.plot.X.Min, f.plot.X.Max = ticks, -0.6, float64(len(names))-0.4
	if len(names) > 8 {
		f.plot.X.Tick.Label.Rotation, f.plot.X.Tick.Label.XAlign, f.plot.X.Tick.Label.YAlign = math.Pi/4, draw.XRight, draw.YCenter
	}
}

// bars are points with what lies around them.
type bars struct {
	plotter.XYs
	plotter.YErrors
}

func (f figure) bars(b bars, contender int, name string) error {
	scatter, err := plotter.NewScatter(b.XYs)
	if err != nil {
		return err
	}
	scatter.GlyphStyle = mark(contender)
	around, err := plotter.NewYErrorBars(b)
	if err != nil {
		return err
	}
	around.Color, around.Width = scatter.Color, 1.2
	f.plot.Add(around, scatter)
	f.plot.Legend.Add(name, scatter)
	return nil
}

// by adds a point for each load and contender that has one, with what lies below and above it, beside each other, to a new figure.
func (r *Results) by(title, about, y string, of func(c *Cell) (at, low, high float64, ok bool)) (f figure, any bool, _ error) {
	f = newFigure(title, about, "what the host does", y, 12*vg.Inch)
	var under []string
	for _, l := range loads {
		if slices.ContainsFunc(r.Cells, func(c *Cell) bool { return c.Load == l.Name && c.Request == requests[0].Name }) {
			under = append(under, l.Name)
		}
	}
	for i, name := range r.contenders() {
		var b bars
		for _, c := range r.Cells {
			at, low, high, ok := of(c)
			if c.Contender != name || c.Request != requests[0].Name || len(c.Starts) == 0 || !ok {
				continue
			}
			x := float64(slices.Index(under, c.Load)) + 0.1*(float64(i)-3)
			b.XYs = append(b.XYs, plotter.XY{X: x, Y: at})
			b.YErrors = append(b.YErrors, struct{ Low, High float64 }{at - low, high - at})
		}
		if len(b.XYs) > 0 {
			any = true
			if err := f.bars(b, r.index(name), name); err != nil {
				return f, any, err
			}
		}
	}
	f.nominal(under)
	f.plot.Y.Min = 0
	f.plot.Y.Max *= 1.65 // for the legend
	return f, any, nil
}

// contenders are those that there are cells of.
func (r *Results) contenders() (names []string) {
	for _, c := range r.Cells {
		if !slices.Contains(names, c.Contender) {
			names = append(names, c.Contender)
		}
	}
	slices.SortFunc(names, func(a, b string) int { return r.index(a) - r.index(b) })
	return names
}

func (r *Results) index(contender string) int {
	if i := slices.IndexFunc(contenders, func(c Contender) bool { return c.Name == contender }); i >= 0 {
		return i
	}
	return len(contenders)
}

// figures are those of the page that there are cells for; the first one is the main one.
func (r *Results) figures() (list []figure, _ error) {
	failed, _, err := r.by("Failed starts of `-p 0:80`, with 95% intervals", "Each start was refused a port, or its port did not answer with its own container's id within 5 seconds.",
		"failed starts in %", func(c *Cell) (float64, float64, float64, bool) {
			i := c.Summary.FailureRate
			return 100 * i.Rate, 100 * i.Low, 100 * i.High, true
		})
	if err != nil {
		return nil, err
	}
	var percent plot.ConstantTicks
	for p := 0; p <= 100; p += 20 {
		percent = append(percent, plot.Tick{Value: float64(p), Label: fmt.Sprint(p)})
	}
	failed.plot.Y.Tick.Marker = percent
	list = append(list, failed)
	for _, load := range []string{"none", "random-60"} {
		f, any, err := r.latency(load)
		if err != nil {
			return nil, err
		}
		if any {
			list = append(list, f)
		}
	}
	cost, any, err := r.cost()
	if err != nil {
		return nil, err
	}
	if any {
		list = append(list, cost)
	}
	lock, any, err := r.by("How long a search held the daemon's lock", "Of the starts that took several attempts: the median, the shortest and the longest. Meanwhile no other container of the daemon starts or stops.",
		"ms", func(c *Cell) (float64, float64, float64, bool) {
			var took []float64
			for _, s := range c.Starts {
				if s.SearchMS > 0 {
					took = append(took, s.SearchMS)
				}
			}
			if slices.Sort(took); len(took) == 0 {
				return 0, 0, 0, false
			}
			return quantile(0.5, took), took[0], took[len(took)-1], true
		})
	if any {
		list = append(list, lock)
	}
	return list, err
}

// latency has the distribution of what the starts took that were published.
func (r *Results) latency(load string) (f figure, any bool, _ error) {
	f = newFigure("What a start took, load "+load, "Of those that were published: the median, the quartiles, and what lies far out.", "", "ms", 9*vg.Inch)
	var names []string
	for _, c := range r.Cells {
		if c.Load != load || c.Request != requests[0].Name || c.Summary.Published == 0 {
			continue
		}
		var took plotter.Values
		for _, s := range c.Starts {
			if s.Outcome == published {
				took = append(took, s.MS)
			}
		}
		box, err := plotter.NewBoxPlot(24, float64(len(names)), took)
		if err != nil {
			return f, false, err
		}
		box.GlyphStyle = mark(r.index(c.Contender))
		box.GlyphStyle.Radius = 2.5
		f.plot.Add(box)
		names = append(names, c.Contender)
	}
	if len(names) > 0 {
		f.nominal(names)
		f.plot.Y.Min = 0
	}
	return f, len(names) > 0, nil
}

// cost has how many attempts a publish took, by the part of the dynamic ports that was held.
func (r *Results) cost() (f figure, any bool, _ error) {
	f = newFigure("Attempts a publish, by what is held at random", "An attempt asks for one port, of each address. Ports that Berth looks at cost none. As root, it is a step of up to ten ports. Stock makes one attempt.",
		"held dynamic ports in %", "attempts a publish", 9*vg.Inch)
	for i, k := range contenders {
		var points plotter.XYs
		for _, c := range r.Cells {
			l := slices.IndexFunc(loads, func(l Load) bool {
				return l.Name == c.Load && !l.churn && l.row == 0 && !l.spare && !l.second && l.connect == 0
			})
			if c.Contender == k.Name && c.Request == requests[0].Name && c.Summary.Attempts > 0 && l >= 0 {
				points = append(points, plotter.XY{X: 100 * loads[l].share, Y: c.Summary.Attempts})
			}
		}
		if len(points) == 0 {
			continue
		}
		line, scatter, err := plotter.NewLinePoints(points)
		if err != nil {
			return f, false, err
		}
		scatter.GlyphStyle = mark(i)
		line.Color, line.Width = scatter.Color, 1.5
		f.plot.Add(line, scatter)
		f.plot.Legend.Add(k.Name, line, scatter)
		any = true
	}
	f.plot.Y.Min, f.plot.Y.Max = 0, 1.25*f.plot.Y.Max
	return f, any, nil
}

func (f figure) svg() ([]byte, error) {
	return chart.SVG(f.wide, 5*vg.Inch, f.plot)
}

// inPage is svg for a page, whose colours it takes, and which has the title.
func (f figure) inPage() (string, error) {
	f.plot.BackgroundColor, f.plot.Title.Text = nil, ""
	svg, err := f.svg()
	if err != nil {
		return "", err
	}
	svg = svg[bytes.Index(svg, []byte("<svg")):]
	for i, m := range marks {
		svg = bytes.ReplaceAll(svg, fmt.Appendf(nil, "#%02X%02X%02X", m.color.R, m.color.G, m.color.B), fmt.Appendf(nil, "var(--mark-%d)", i))
	}
	svg = bytes.ReplaceAll(svg, []byte("#000000"), []byte("currentColor"))
	return string(bytes.ReplaceAll(svg, []byte("#E1E1E1"), []byte("var(--grid)"))), nil
}
