package main

import (
	"errors"
	"fmt"
	"image/color"
	"math"
	"slices"

	"berth/integration/chart"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// ways are drawn in this order, each at a place of its own beside the others.
var ways = []struct {
	name  string
	shape draw.GlyphDrawer
	color color.Color
}{
	{"give up at once", draw.CrossGlyph{}, color.RGBA{213, 94, 0, 255}},
	{"ten in a row", draw.CircleGlyph{}, color.RGBA{204, 121, 167, 255}},
	{"ten at random", draw.PlusGlyph{}, color.RGBA{130, 100, 0, 255}},
	{"Berth without a view", draw.BoxGlyph{}, color.RGBA{0, 114, 178, 255}},
	{"Berth with a view", draw.PyramidGlyph{}, color.RGBA{0, 130, 95, 255}},
}

// blocks are those that are drawn, side by side.
var blocks = []int{1, 1000}

// figure is what is drawn of each cell, on a logarithmic axis.
type figure struct {
	name, title, axis string
	lowest, highest   float64 // what is below isn't drawn
	room              float64 // for the legend, in tenfolds
	number            func(float64) string
	// of returns the value, and the bar through it; not ok where there is none.
	of func(cell) (low, value, high float64, ok bool)
	// formula is drawn as a line, if there is one.
	formula func(cell) *float64
}

func plain(v float64) string { return fmt.Sprintf("%g", v) }

var figures = []figure{
	{
		name: "failures", title: "Starts that fail", axis: "share of the starts", lowest: 1e-6, highest: 1, room: 3.4, number: share,
		of: func(c cell) (low, value, high float64, ok bool) {
			if c.Failed == 0 {
				return 0, c.High, c.High, true
			}
			return c.Low, c.rate(), c.High, true
		},
		formula: func(c cell) *float64 { return c.Formula },
	},
	{
		name: "calls", title: "AddPort calls of a start that published", axis: "calls: mean, up to the 99th of 100", lowest: 1, highest: 1e4, room: 2, number: plain,
		of: func(c cell) (low, value, high float64, ok bool) {
			return c.CallsMean, c.CallsMean, max(c.CallsMean, c.CallsP99), c.Failed < c.Starts
		},
	},
	{
		name: "lock", title: "How long a start has the daemon's lock", axis: "ms: mean, up to the 99th of 100", lowest: 0.1, highest: 1e4, room: 2, number: plain,
		of: func(c cell) (low, value, high float64, ok bool) {
			return c.LockMean, c.LockMean, max(c.LockMean, c.LockP99), true
		},
	},
}

// dashes are those of a formula.
var dashes = []vg.Length{4, 3}

// bars are points with a bar through each.
type bars struct {
	plotter.XYs
	plotter.YErrors
}

func (r *results) draw(f figure, file string) error {
	shares := r.shares()
	var plots []*plot.Plot
	for _, block := range blocks {
		p := chart.New(fmt.Sprintf("%s: ports taken in blocks of %d", f.title, block), "share of the host's dynamic ports that others hold", f.axis)
		for i, way := range ways {
			if err := r.add(p, f, block, i, shares); err != nil {
				return fmt.Errorf("%s: %w", way.name, err)
			}
		}
		if f.formula != nil {
			p.Legend.Add("none failed: the 95% interval's end", &plotter.Scatter{GlyphStyle: glyph(draw.RingGlyph{}, color.Black)})
			p.Legend.Add("as the formula says", &plotter.Line{LineStyle: draw.LineStyle{Color: color.Black, Width: 1, Dashes: dashes}})
		}
		var ticks plot.ConstantTicks
		for x, taken := range shares {
			ticks = append(ticks, plot.Tick{Value: float64(x), Label: share(taken)})
		}
		p.X.Tick.Marker, p.X.Min, p.X.Max = ticks, -0.5, float64(len(shares))-0.5
		ticks = nil
		for e := math.Log10(f.lowest); e <= math.Log10(f.highest); e++ {
			ticks = append(ticks, plot.Tick{Value: e, Label: f.number(math.Pow(10, e))})
		}
		p.Y.Tick.Marker, p.Y.Min, p.Y.Max = ticks, math.Log10(f.lowest), math.Log10(f.highest)+f.room
		plots = append(plots, p)
	}
	return chart.Save(file, vg.Length(len(plots))*6*vg.Inch, 5*vg.Inch, plots...)
}

var errNoCell = errors.New("there is no cell to draw")

// add draws a way to search into a plot.
func (r *results) add(p *plot.Plot, f figure, block, way int, shares []float64) error {
	style := ways[way]
	place := func(x int) float64 { return float64(x) + 0.12*float64(way-len(ways)/2) }
	var seen, none bars
	var line plotter.XYs
	for x, taken := range shares {
		i := slices.IndexFunc(r.Cells, func(c cell) bool {
			return c.Way == style.name && c.Taken == taken && (c.Block == block || taken == 0) // of no block
		})
		if i < 0 {
			return errNoCell
		}
		c := r.Cells[i]
		if f.formula != nil {
			if v := f.formula(c); v != nil && *v >= f.lowest {
				line = append(line, plotter.XY{X: place(x), Y: math.Log10(*v)})
			}
		}
		low, value, high, ok := f.of(c)
		if !ok {
			continue
		}
		to := &seen
		if f.formula != nil && c.Failed == 0 {
			to = &none
		}
		at := func(v float64) float64 { return math.Log10(max(v, f.lowest)) }
		to.XYs = append(to.XYs, plotter.XY{X: place(x), Y: at(value)})
		to.YErrors = append(to.YErrors, struct{ Low, High float64 }{at(value) - at(low), at(high) - at(value)})
	}
	var legend []plot.Thumbnailer
	if len(line) > 1 {
		l, err := plotter.NewLine(line)
		if err != nil {
			return err
		}
		l.Color, l.Dashes = style.color, dashes
		p.Add(l)
		legend = append(legend, l)
	}
	for of, shape := range map[*bars]draw.GlyphDrawer{&seen: style.shape, &none: draw.RingGlyph{}} {
		if len(of.XYs) == 0 {
			continue
		}
		b, err := plotter.NewYErrorBars(of)
		if err != nil {
			return err
		}
		b.Color = style.color
		s, err := plotter.NewScatter(of)
		if err != nil {
			return err
		}
		s.GlyphStyle = glyph(shape, style.color)
		p.Add(b, s)
	}
	p.Legend.Add(style.name, append(legend, &plotter.Scatter{GlyphStyle: glyph(style.shape, style.color)})...)
	return nil
}

func glyph(shape draw.GlyphDrawer, c color.Color) draw.GlyphStyle {
	return draw.GlyphStyle{Color: c, Radius: 4, Shape: shape}
}

// shares are those of the ports that were taken, each once, in order.
func (r *results) shares() []float64 {
	var shares []float64
	for _, c := range r.Cells {
		shares = append(shares, c.Taken)
	}
	slices.Sort(shares)
	return slices.Compact(shares)
}
