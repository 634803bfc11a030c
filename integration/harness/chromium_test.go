//go:build chromium

package harness

import (
	"encoding/json"
	"fmt"
	"html"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
)

// look has the page say in its title what a person would see of it.
const look = `<script>
const seen = e => { const b = e.getBoundingClientRect(); return b.width > 0 || b.height > 0 };
const marks = f => [...f.querySelectorAll('path')].filter(e => seen(e) && /var\(--mark/.test(e.getAttribute('style')));
document.title = JSON.stringify({
	Figures: [...document.querySelectorAll('figure')].map(f => ({
		Marks: marks(f).length,
		Colors: new Set(marks(f).map(e => getComputedStyle(e).stroke + getComputedStyle(e).fill)).size,
		Texts: [...f.querySelectorAll('text')].filter(seen).map(e => e.textContent),
	})),
	Page: document.documentElement.scrollWidth,
	Window: innerWidth,
	Focus: [...document.querySelectorAll('a, .wide')].filter(e => (e.focus(), document.activeElement == e)).length,
	Scrolling: [...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth && e.tabIndex != 0).length,
	Back: getComputedStyle(document.body).backgroundColor,
	Text: getComputedStyle(document.querySelector('svg text')).fill,
})</script>`

var title = regexp.MustCompile(`<title>(\{.*?\})</title>`)

// A browser shows each contender's marks, on a desk and on a phone, in light and in dark, and all of it by keyboard.
func TestPageInChromium(t *testing.T) {
	files, err := allCells(t).WritePage()
	assert.NilError(t, err)
	page, err := os.ReadFile(files[0])
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(files[0], []byte(strings.Replace(string(page), "</main>", "</main>"+look, 1)), 0o644))
	for _, width := range []int{1280, 390} {
		for scheme, want := range map[int][2]string{0: {"rgb(22, 22, 22)", "rgb(232, 232, 232)"}, 1: {"rgb(255, 255, 255)", "rgb(27, 27, 27)"}} {
			cmd := exec.Command("chromium-headless-shell", "--no-sandbox", "--disable-gpu", "--user-data-dir="+t.TempDir(),
				fmt.Sprintf("--blink-settings=preferredColorScheme=%d", scheme), fmt.Sprintf("--window-size=%d,900", width), "--dump-dom", "file://"+files[0])
			out, err := cmd.Output()
			assert.NilError(t, err)
			m := title.FindSubmatch(out)
			assert.Assert(t, m != nil, "%.2000s", out)
			var saw struct {
				Figures []struct {
					Marks, Colors int
					Texts         []string
				}
				Page, Window, Focus, Scrolling int
				Back, Text                     string
			}
			assert.NilError(t, json.Unmarshal([]byte(html.UnescapeString(string(m[1]))), &saw))
			assert.Equal(t, saw.Window, width)
			assert.Check(t, saw.Page <= width, "the page is %d wide", saw.Page)
			assert.Equal(t, len(saw.Figures), 5)
			main := saw.Figures[0]
			// Each contender's under each load, with its error bar's line and two caps, and those of the legend.
			assert.Check(t, main.Marks >= 4*len(able(t))*len(loads), "%d marks", main.Marks)
			texts := strings.Join(main.Texts, "\n")
			for _, k := range able(t) {
				assert.Check(t, strings.Contains(texts, k.Name), k.Name)
			}
			for _, l := range loads {
				assert.Check(t, strings.Contains(texts, l.Name), l.Name)
			}
			assert.Check(t, saw.Focus >= 2*len(saw.Figures)+3, "%d can be reached by keyboard", saw.Focus)
			assert.Check(t, saw.Scrolling == 0)
			assert.Equal(t, [2]string{saw.Back, saw.Text}, want)
		}
	}
}
