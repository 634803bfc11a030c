package harness

import (
	"fmt"
	"io"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Claim is one that the results hold up, or not.
type Claim struct {
	Text  string
	Shown bool // the cells that it is about are there
	Holds bool
}

// fails says where a contender is known to fail.
var fails = map[string]string{
	"stock":         "row-1 row-10 row-100 row-1000 row-17000 random-30 random-60 random-90 random-99 churn-30 churn-60 churn-90 churn-99 spare",
	"docker28":      "row-100 row-1000 row-17000 random-90 random-99 churn-90 churn-99 spare",
	"podman":        "churn-60",
	"stock-rootful": "row-100 row-1000 row-17000 random-90 random-99 churn-90 churn-99 spare",
}

const (
	enough   = 200  // starts of a cell for its speed to say something
	noSlower = 0.98 // Berth's starts a second to stock's, with no load
	loaded   = 0.95 // with 60% held, still and churning, to Berth's own without
)

// Claims are those that docs/measuring.md makes, of what was measured.
func (r *Results) Claims() (list []Claim) {
	cell := func(contender, load string) *Cell {
		i := slices.IndexFunc(r.Cells, func(c *Cell) bool {
			return c.Contender == contender && c.Load == load && c.Request == requests[0].Name && len(c.Starts) > 0 && len(c.Starts) == c.Wanted
		})
		if i < 0 {
			return nil
		}
		return r.Cells[i]
	}
	for _, c := range r.Cells {
		i := slices.IndexFunc(contenders, func(k Contender) bool { return k.Name == c.Contender })
		if i < 0 || !contenders[i].berth || len(c.Starts) == 0 {
			continue
		}
		s := c.Summary
		text, want := fmt.Sprintf("%s: publishes %d of %d, misdelivers %d", c.key(), s.Published, c.Wanted, s.Misdelivered), 1.0
		holds := s.Published == c.Wanted
		if tries, of := c.tries(); c.Load == "spare" && tries > 0 && c.Contender == "berth-no-view" {
			want = expected(tries, of, c.Wanted/turns)
			text = fmt.Sprintf("%s; %d tries of %d ports each publish %.1f%%", text, tries, of, 100*want)
			i := wilson(s.Published, s.Starts)
			holds = s.Misdelivered == 0 && i.Low <= want && want <= i.High
		}
		// Of a cell that was interrupted nothing is said yet.
		list = append(list, Claim{text, len(c.Starts) == c.Wanted || c.CannotRun != "", holds})
	}
	for _, c := range contenders {
		for _, load := range strings.Fields(fails[c.Name]) {
			claim := Claim{Text: fmt.Sprintf("%s %s: fails some", load, c.Name)}
			if c := cell(c.Name, load); c != nil {
				claim.Shown, claim.Holds = true, c.Summary.Published < c.Wanted
				claim.Text += fmt.Sprintf(": %d of %d", c.Wanted-c.Summary.Published, c.Wanted)
			}
			list = append(list, claim)
		}
	}
	// Machines drift: what is compared ran one after the other.
	pace := func(load, than string, limit float64, starts int, ratio func(*Cell) float64) {
		claim := Claim{Text: load + ": starts a second to " + than}
		if c := cell("berth", load); c != nil {
			if ratio := ratio(c); ratio > 0 {
				claim = Claim{fmt.Sprintf("%s: %.2f x the starts a second of %s, want %.2f", c.key(), ratio, than, limit), c.Wanted >= starts, ratio >= limit}
			}
		}
		list = append(list, claim)
	}
	pace("none", "stock's", noSlower, enough, func(c *Cell) float64 {
		stock := cell("stock", "none")
		return c.pace(func(turn int, _ Turn) (t Turn) {
			if stock != nil && turn < len(stock.Turns) {
				t = stock.Turns[turn]
			}
			return t
		})
	})
	for _, load := range []string{"random-60", "churn-60"} {
		pace(load, "its own without the load", loaded, often*enough, func(c *Cell) float64 { return c.Summary.OfIdle })
	}
	return list
}

var tried = regexp.MustCompile(`\((\d+)-(\d+)\) of .*: (\d+) tried, `)

// tries is how many ports those asked for that gave up, in the median, and of how many. There are none if nobody did.
func (c *Cell) tries() (tries, of int) {
	var counts []int
	for _, s := range c.Starts {
		if m := tried.FindStringSubmatch(s.Error); m != nil {
			first, _ := strconv.Atoi(m[1])
			last, _ := strconv.Atoi(m[2])
			n, _ := strconv.Atoi(m[3])
			counts, of = append(counts, n), last-first+1
		}
	}
	if slices.Sort(counts); len(counts) == 0 {
		return 0, 0
	}
	return counts[len(counts)/2], of
}

// expected is the rate of n starts that are published, when each tries so many ports, at random, of which as many are free at
// first as there are starts.
func expected(tries, of, n int) float64 {
	free := float64(n)
	for range n {
		free -= 1 - math.Pow(1-float64(tries)/float64(of), free)
	}
	return 1 - free/float64(n)
}

// PrintClaims prints the claims that are not held up, how many are, and returns whether all are that are about something.
func (r *Results) PrintClaims(out io.Writer) bool {
	held, failed := 0, 0
	for _, c := range r.Claims() {
		switch {
		case !c.Shown:
			fmt.Fprintln(out, "not shown:", c.Text)
		case !c.Holds:
			fmt.Fprintln(out, "NOT AS CLAIMED:", c.Text)
			failed++
		default:
			held++
		}
	}
	fmt.Fprintf(out, "%d claims are held up, %d are not\n", held, failed)
	return failed == 0
}
