// Package chart has what the plots of measurements share: how they look, and how they are written.
package chart

import (
	"bytes"
	"image/color"
	"os"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// New returns a plot with a grid, and a place for a legend at the upper left.
func New(title, x, y string) *plot.Plot {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	for _, style := range []*text.Style{&p.Title.TextStyle, &p.X.Label.TextStyle, &p.Y.Label.TextStyle,
		&p.X.Tick.Label, &p.Y.Tick.Label, &p.Legend.TextStyle} {
		style.Font.Variant, style.Font.Size = "Sans", 12
	}
	p.Title.Padding, p.X.Label.Padding, p.Y.Label.Padding, p.Legend.Padding = 10, 6, 6, 3
	p.Legend.Top, p.Legend.Left, p.Legend.XOffs, p.Legend.YOffs = true, true, 8, -4
	grid := plotter.NewGrid()
	grid.Vertical.Color, grid.Horizontal.Color = color.Gray{225}, color.Gray{225}
	p.Add(grid)
	return p
}

// Save writes plots as [SVG] to a file.
func Save(file string, width, height vg.Length, plots ...*plot.Plot) error {
	svg, err := SVG(width, height, plots...)
	if err != nil {
		return err
	}
	return os.WriteFile(file, svg, 0o644)
}

// SVG draws plots, side by side. What shows it may have another font of the same widths.
func SVG(width, height vg.Length, plots ...*plot.Plot) ([]byte, error) {
	canvas := vgsvg.New(width, height)
	rows := [][]*plot.Plot{plots}
	for i, part := range plot.Align(rows, draw.Tiles{Rows: 1, Cols: len(plots), PadX: 12}, draw.New(canvas))[0] {
		plots[i].Draw(part)
	}
	var svg bytes.Buffer
	if _, err := canvas.WriteTo(&svg); err != nil {
		return nil, err
	}
	const font = "font-family:Liberation Sans"
	return bytes.ReplaceAll(svg.Bytes(), []byte(font), []byte(font+",Arial,Helvetica,sans-serif")), nil
}
