package harness

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// able are the contenders that serve the main request.
func able(t *testing.T) []Contender {
	t.Helper()
	list, err := (&Options{Requests: []string{"tcp"}}).scenes()
	assert.NilError(t, err)
	return list[0].contenders
}

// allCells are of every contender and load, as if Berth published each start, and the others half of theirs.
func allCells(t *testing.T) *Results {
	t.Helper()
	r := &Results{Version: schema, file: filepath.Join(t.TempDir(), "stress.json")}
	for _, l := range loads {
		for _, k := range able(t) {
			c := &Cell{Contender: k.Name, Load: l.Name, Request: "tcp", Daemon: "1.2.3", Wanted: (&Options{Starts: enough}).wanted(scene{l, requests[0], nil}, k)}
			for range turns * c.Wanted / enough {
				c.Turns = append(c.Turns, Turn{0, enough / turns, 8, 8})
			}
			for i := range c.Wanted {
				s := Start{MS: float64(200 + i), Outcome: published}
				if k.berth {
					s.Attempts, s.SearchMS = 1+i%3, float64(i%3)
				} else if i%2 == 1 {
					s = Start{Outcome: inUse, Error: "address already in use"}
				}
				c.Starts = append(c.Starts, s)
			}
			c.summarize()
			r.Cells = append(r.Cells, c)
		}
	}
	return r
}

func TestPageHasAllMarks(t *testing.T) {
	r := allCells(t)
	c := *r.Cells[0]
	c.Contender, c.Starts, c.CannotRun = "file", nil, "no such <file>"
	assert.NilError(t, r.put(&c))
	assert.NilError(t, os.WriteFile(filepath.Join(filepath.Dir(r.file), FleetFile), []byte(`[{"daemon": "d", "nodes": 3, "failed_tasks": 7777}]`), 0o600))
	files, err := r.WritePage()
	assert.NilError(t, err)
	data, err := os.ReadFile(files[0])
	assert.NilError(t, err)
	page := string(data)
	figures := strings.Split(page, "<figure ")[1:]
	assert.Equal(t, len(figures), 5)
	for i, k := range able(t) {
		// A mark for each load, and the legend's; error bars beside them.
		assert.Check(t, strings.Count(figures[0], fmt.Sprintf("var(--mark-%d)", i)) > 2*len(loads), k.Name)
		assert.Check(t, is.Contains(figures[0], ">"+k.Name+"<"))
	}
	for _, l := range loads {
		assert.Check(t, is.Contains(figures[0], ">"+l.Name+"<"))
	}
	assert.Check(t, is.Contains(page, "no such &lt;file&gt;"))
	assert.Check(t, is.Contains(page, "<td>7777<"))
	assert.Check(t, is.Contains(page, "<li>tcp random-60 berth: 1.00 x the starts a second without the load"))
	for _, elsewhere := range []string{"src=", "@import", "url(", "<link"} {
		assert.Check(t, !strings.Contains(page, elsewhere), "%s: the page needs something else", elsewhere)
	}
	picture, err := os.ReadFile(files[1])
	assert.NilError(t, err)
	assert.Check(t, is.Contains(string(picture), "Failed starts"))
}

func TestClaims(t *testing.T) {
	r := allCells(t)
	var said strings.Builder
	assert.Check(t, r.PrintClaims(&said), &said)
	cell := func(contender, load string) *Cell {
		for _, c := range r.Cells {
			if c.Contender == contender && c.Load == load {
				return c
			}
		}
		t.Fatal(contender, load)
		return nil
	}
	broken := func(c *Cell, says string) {
		t.Helper()
		c.summarize()
		said.Reset()
		assert.Check(t, !r.PrintClaims(&said))
		assert.Check(t, is.Contains(said.String(), "NOT AS CLAIMED: "+says))
	}
	c := cell("berth", "random-99")
	c.Starts[7].Outcome = misdelivered
	broken(c, "tcp random-99 berth: publishes 199 of 200, misdelivers 1")
	c.Starts[7].Outcome = published
	c.summarize()

	c = cell("stock", "row-1")
	for i := range c.Starts {
		c.Starts[i].Outcome = published
	}
	broken(c, "row-1 stock: fails some: 0 of 200")
	c.Starts[0].Outcome = inUse
	c.summarize()

	c = cell("berth", "none")
	for i := range c.Turns {
		c.Turns[i].Seconds *= 1.1
	}
	broken(c, "tcp none berth: 0.91 x the starts a second of stock's, want 0.98")

	c = cell("berth", "churn-60")
	for i := range c.Turns {
		c.Turns[i].Idle = 0.9 * c.Turns[i].Seconds
	}
	broken(c, "tcp churn-60 berth: 0.90 x the starts a second of its own without the load, want 0.95")
	var table strings.Builder
	r.Print(&table)
	assert.Check(t, is.Contains(table.String(), "tcp churn-60 berth: 0.90 x the starts a second without the load\n"))
}

// Where as many ports are free as are needed, a search without a view finds them at the rate that its tries give.
func TestSpareIsHeldToItsTries(t *testing.T) {
	assert.Equal(t, expected(100, 100, 40), 1.0)
	assert.Equal(t, fmt.Sprintf("%.3f", expected(50, 100, 1)), "0.500")
	r := allCells(t)
	for _, c := range r.Cells {
		if c.Contender != "berth-no-view" || c.Load != "spare" {
			continue
		}
		for i := range c.Starts {
			if i%10 == 0 { // 5,700 of 28,232 ports find the last of 40 at a rate of 20%, and the first nearly always
				c.Starts[i] = Start{Outcome: gaveUp, Error: "on a dynamic host port (32768-60999) of 0.0.0.0, [::]: 5700 tried, none was had in 2s: in use"}
			}
		}
		c.summarize()
		tries, of := c.tries()
		assert.Equal(t, tries, 5700)
		assert.Equal(t, of, 28232)
		assert.Check(t, expected(tries, of, 40) > 0.85 && expected(tries, of, 40) < 0.95, "%v", expected(tries, of, 40))
	}
	var said strings.Builder
	assert.Check(t, r.PrintClaims(&said), &said)
}
