// Package progress tells whoever waits that something still goes on.
package progress

import (
	"fmt"
	"io"
	"time"
)

const (
	// Every is how long it is quiet at most.
	Every = 2 * time.Second
	// first is less, since what came before may have been quiet, too.
	first = Every / 2
)

// Start says what is being done, and for how long already, now and then until done is called; the writer is not used after
// that.
func Start(out io.Writer, what string) (done func()) {
	begun := time.Now()
	return tick(first, func() { fmt.Fprintf(out, "%s (%v)\n", what, time.Since(begun).Round(time.Second)) })
}

// Dots adds a dot to the line that was begun, as Start says a line.
func Dots(out io.Writer) (done func()) {
	return tick(Every, func() { fmt.Fprint(out, ".") })
}

func tick(first time.Duration, say func()) (done func()) {
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(first)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				tick.Reset(Every)
				say()
			}
		}
	}()
	return func() { close(stop); <-stopped }
}
