package main

import (
	"bytes"
	"errors"
	"fmt"
	"image/color"
	"math"
	"os"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
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
	{"stock", "stock, published", false, draw.CircleGlyph{}, color.RGBA{213, 94, 0, 255}},
	{"stock-fails", "stock, failed at the first taken port", false, draw.CrossGlyph{}, color.RGBA{213, 94, 0, 255}},
	{"berth", "Berth without view: jumps after 8 refusals", true, draw.BoxGlyph{}, color.RGBA{0, 114, 178, 255}},
	{"berth+view", "Berth with view: in order, past all of them", true, draw.PyramidGlyph{}, color.RGBA{0, 130, 95, 255}},
}

// taken has the numbers of taken ports, and where each stands on the x axis:
// a logarithmic one has no place for 0.
var taken = []struct {
	ports int
	label string
	x     float64
}{{0, "0", 3}, {10, "10", 10}, {100, "100", 100}, {1000, "1k", 1000}, {10000, "10k", 10000}, {manyTaken, "17k", manyTaken}}

var errNothingToPlot = errors.New("no search was measured (only root's benchmarks do that)")

// plot draws what a search costs at the highest GOMAXPROCS, on logarithmic axes.
// They are linear ones of logarithms: plot.LogScale misplaces an axis's label,
// and the plot shrinks for it.
func (r *results) plot(file string) error {
	if len(r.cpus) == 0 {
		return errNothingToPlot
	}
	cpus := r.cpus[len(r.cpus)-1]
	p := plot.New()
	p.Title.Text = "Publishing a dynamic port, and removing it, when host ports are taken"
	p.X.Label.Text = "taken ports at the start of the host's dynamic range"
	p.Y.Label.Text = "median time in ms"
	for _, style := range []*text.Style{&p.Title.TextStyle, &p.X.Label.TextStyle, &p.Y.Label.TextStyle,
		&p.X.Tick.Label, &p.Y.Tick.Label, &p.Legend.TextStyle} {
		style.Font.Variant, style.Font.Size = "Sans", 12
	}
	p.Title.Padding, p.X.Label.Padding, p.Y.Label.Padding, p.Legend.Padding = 10, 6, 6, 3
	p.Legend.Top, p.Legend.Left, p.Legend.XOffs, p.Legend.YOffs = true, true, 8, -4
	grid := plotter.NewGrid()
	grid.Vertical.Color, grid.Horizontal.Color = color.Gray{225}, color.Gray{225}
	p.Add(grid)

	for _, l := range lines {
		var points plotter.XYs
		for _, t := range taken {
			name := fmt.Sprintf("RootlessKit/Search/taken=%d/mapper=%s", t.ports, l.mapper)
			if v := median(r.values[measure{name, cpus, perOp}]); !math.IsNaN(v) {
				points = append(points, plotter.XY{X: math.Log10(t.x), Y: math.Log10(1e3 * v)})
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
	for _, t := range taken {
		ticks = append(ticks, plot.Tick{Value: math.Log10(t.x), Label: t.label})
	}
	p.X.Tick.Marker = ticks
	// Whole steps of 1, 3, 10 ..., and two for the legend above.
	lowest, highest := int(math.Floor(2*p.Y.Min)), int(math.Ceil(2*p.Y.Max))+2
	ticks = nil
	for e := lowest; e <= highest; e++ {
		step := math.Pow(10, math.Floor(float64(e)/2)) * float64([]int{1, 3}[e&1])
		ticks = append(ticks, plot.Tick{Value: math.Log10(step), Label: fmt.Sprintf("%.4g", step)})
	}
	p.Y.Min, p.Y.Max = ticks[0].Value, ticks[len(ticks)-1].Value
	p.Y.Tick.Marker = ticks
	return save(p, file)
}

// save writes p as SVG. What shows it may have another font of the same widths.
func save(p *plot.Plot, file string) error {
	w, err := p.WriterTo(8*vg.Inch, 5*vg.Inch, "svg")
	if err != nil {
		return err
	}
	var svg bytes.Buffer
	if _, err := w.WriteTo(&svg); err != nil {
		return err
	}
	const font = "font-family:Liberation Sans"
	return os.WriteFile(file, bytes.ReplaceAll(svg.Bytes(), []byte(font), []byte(font+",Arial,Helvetica,sans-serif")), 0o644)
}
