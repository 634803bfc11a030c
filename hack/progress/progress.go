// Package progress tells whoever waits that something still goes on.
package progress

import (
	"fmt"
	"io"
	"time"
)

// Every is how long it is quiet at most.
const Every = 2 * time.Second

// Start says what is being done, and for how long already, each time that it has taken Every more, until done is called; the
// writer is not used after that.
func Start(out io.Writer, what string) (done func()) {
	stop, stopped := make(chan struct{}), make(chan struct{})
	begun := time.Now()
	go func() {
		defer close(stopped)
		tick := time.NewTicker(Every)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				fmt.Fprintf(out, "%s (%v)\n", what, time.Since(begun).Round(time.Second))
			}
		}
	}()
	return func() { close(stop); <-stopped }
}
