package harness

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"html/template"
	"os"
	"path/filepath"
	"strings"
)

//go:embed page.html
var pageText string

var pageTemplate = template.Must(template.New("page").Parse(pageText))

// WritePage writes what was measured as one page that needs nothing else, and its main picture by itself, beside the results.
func (r *Results) WritePage() (files []string, _ error) {
	if len(r.Cells) == 0 {
		return nil, errors.New("nothing was measured")
	}
	type drawn struct {
		figure
		SVG template.HTML
	}
	page := struct {
		*Results
		Marks            []template.CSS
		Figures          []drawn
		Names, CannotRun []string
		Starts           int
		First, Last      string
		Machine          Machine
		Claims           []Claim
		Fleets           []Fleet
	}{Results: r, Machine: r.Cells[0].Machine, Claims: r.Claims()}
	for _, m := range marks {
		page.Marks = append(page.Marks, template.CSS(fmt.Sprintf("#%02x%02x%02x", m.color.R, m.color.G, m.color.B)))
	}
	for _, c := range r.Cells {
		page.Starts += len(c.Starts)
		day := c.Date.Format("2006-01-02")
		if page.First == "" || day < page.First {
			page.First = day
		}
		page.Last = max(page.Last, day)
		if c.CannotRun != "" {
			page.CannotRun = append(page.CannotRun, c.key()+": "+c.CannotRun)
		}
	}
	for _, c := range contenders {
		page.Names = append(page.Names, c.Name+": "+c.About)
	}
	for _, l := range loads {
		page.Names = append(page.Names, l.Name+": "+l.About)
	}
	for _, q := range requests {
		page.Names = append(page.Names, q.Name+": "+q.About)
	}
	var err error
	if page.Fleets, err = r.fleets(); err != nil {
		return nil, err
	}
	figures, err := r.figures()
	if err != nil {
		return nil, err
	}
	main, err := figures[0].svg()
	if err != nil {
		return nil, err
	}
	for _, f := range figures {
		svg, err := f.inPage()
		if err != nil {
			return nil, err
		}
		page.Figures = append(page.Figures, drawn{f, template.HTML(svg)})
	}
	var html bytes.Buffer
	if err := pageTemplate.Execute(&html, page); err != nil {
		return nil, err
	}
	base := strings.TrimSuffix(r.file, filepath.Ext(r.file))
	return []string{base + ".html", base + ".svg"}, errors.Join(os.WriteFile(base+".html", html.Bytes(), 0o644), os.WriteFile(base+".svg", main, 0o644))
}
