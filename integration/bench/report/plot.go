package main

import (
	"errors"
	"fmt"
	"image/color"
	"math"
	"strconv"

	"berth/integration/bench"
	"berth/integration/chart"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// lines are the plot's: the same search of a real RootlessKit's host, by each
// mapper.
var lines = []struct {
	mapper, legend string
	joined         bool
	shape          draw.GlyphDrawer
	color          color.Color
}{
	{bench.Stock, "stock, published", false, draw.CircleGlyph{}, color.RGBA{213, 94, 0, 255}},
	{bench.StockFails, "stock, failed at the first taken port", false, draw.CrossGlyph{}, color.RGBA{213, 94, 0, 255}},
	{bench.Berth, "Berth without view: asks, and jumps after 8 refusals", true, draw.BoxGlyph{}, color.RGBA{0, 114, 178, 255}},
	{bench.BerthView, "Berth with view: looks, and jumps after 512 taken ports", true, draw.PyramidGlyph{}, color.RGBA{0, 130, 95, 255}},
}

// place is where a number of taken ports stands on the x axis, and its label
// there: a logarithmic axis has no place for 0.
func place(taken int) (x float64, label string) {
	switch {
	case taken == 0:
		return math.Log10(3), "0"
	case taken < 1000:
		label = strconv.Itoa(taken)
	default:
		label = fmt.Sprintf("%dk", taken/1000)
	}
	return math.Log10(float64(taken)), label
}

var errNothingToPlot = errors.New("no search was measured: nothing to plot")

// plot draws what a search costs at the highest GOMAXPROCS, on logarithmic axes.
// They are linear ones of logarithms: plot.LogScale misplaces an axis's label,
// and the plot shrinks for it.
func (r *results) plot(file string) error {
	if len(r.cpus) == 0 {
		return errNothingToPlot
	}
	cpus := r.cpus[len(r.cpus)-1]
	p := chart.New("Publishing a dynamic port, and removing it, when host ports are taken",
		"taken ports at the start of the host's dynamic range", "median time in ms")

	for _, l := range lines {
		var points plotter.XYs
		for _, taken := range bench.Taken {
			if v := median(r.values[measure{bench.Search(taken, l.mapper), cpus, perOp}]); !math.IsNaN(v) {
				x, _ := place(taken)
				points = append(points, plotter.XY{X: x, Y: math.Log10(1e3 * v)})
			}
		}
		if len(points) == 0 {
			continue // Not measured.
		}
		line, scatter, err := plotter.NewLinePoints(points)
		if err != nil {
			return err
		}
		line.Color, line.Width = l.color, 1.5
		scatter.GlyphStyle = draw.GlyphStyle{Color: l.color, Radius: 4, Shape: l.shape}
		if l.joined {
			p.Add(line, scatter)
			p.Legend.Add(l.legend, line, scatter)
		} else {
			p.Add(scatter)
			p.Legend.Add(l.legend, scatter)
		}
	}
	if p.Y.Min > p.Y.Max {
		return errNothingToPlot
	}

	var ticks plot.ConstantTicks
	for _, taken := range bench.Taken {
		x, label := place(taken)
		ticks = append(ticks, plot.Tick{Value: x, Label: label})
	}
	p.X.Tick.Marker = ticks
	p.X.Max += 0.1 // The last label is centred below its tick.
	// Whole steps of 1, 3, 10 ..., and two for the legend above.
	lowest, highest := int(math.Floor(2*p.Y.Min)), int(math.Ceil(2*p.Y.Max))+2
	ticks = nil
	for e := lowest; e <= highest; e++ {
		step := math.Pow(10, math.Floor(float64(e)/2)) * float64([]int{1, 3}[e&1])
		ticks = append(ticks, plot.Tick{Value: math.Log10(step), Label: fmt.Sprintf("%.4g", step)})
	}
	p.Y.Min, p.Y.Max = ticks[0].Value, ticks[len(ticks)-1].Value
	p.Y.Tick.Marker = ticks
	return chart.Save(file, 8*vg.Inch, 5*vg.Inch, p)
}
