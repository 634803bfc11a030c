package harness

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/mattn/go-isatty"

	"berth/hack/progress"
)

// Progress tells whoever waits how far a run is: on a terminal in one line that changes, elsewhere in a line now and then.
type Progress struct {
	out  io.Writer
	live bool

	mu      sync.Mutex
	begun   time.Time
	doing   string
	total   int // starts
	ended   int
	skipped int // of ended: they can't be
	failed  int // of ended
}

// NewProgress writes to out.
func NewProgress(out io.Writer) *Progress {
	f, ok := out.(*os.File)
	return &Progress{out: out, live: ok && isatty.IsTerminal(f.Fd()), begun: time.Now()}
}

// start tells until stop.
func (p *Progress) start() (stop func()) {
	every := progress.Every
	if p.live {
		every = 200 * time.Millisecond
	}
	tick := time.NewTicker(every)
	stopped := make(chan struct{})
	go func() {
		for {
			select {
			case <-stopped:
				return
			case <-tick.C:
				p.tell()
			}
		}
	}()
	return func() {
		tick.Stop()
		close(stopped)
		p.Write(nil)
	}
}

func (p *Progress) tell() {
	p.mu.Lock()
	defer p.mu.Unlock()
	left := "?"
	if n := p.ended - p.skipped; n > 0 {
		left = (time.Since(p.begun) / time.Duration(n) * time.Duration(p.total-p.ended)).Round(time.Second).String()
	}
	line := fmt.Sprintf("%s; %d of %d starts, %d failed, about %s left", p.doing, p.ended, p.total, p.failed, left)
	if p.live {
		fmt.Fprint(p.out, "\r\x1b[K", line)
	} else {
		fmt.Fprintln(p.out, line)
	}
}

// Write is for the lines of others.
func (p *Progress) Write(line []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.live {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
	return p.out.Write(line)
}

// now tells what is being done.
func (p *Progress) now(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.doing = what
}

// done counts a start.
func (p *Progress) done(outcome string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended++
	if outcome != published {
		p.failed++
	}
}

// skip counts the n starts of a cell that cannot run.
func (p *Progress) skip(c *Cell, n int) {
	fmt.Fprintf(p, "%s: cannot run here: %s\n", c.key(), c.CannotRun)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended += n
	p.skipped += n
}
