// Package soak tells what grew in a stack that has started and stopped containers for long.
package soak

import "fmt"

// Sample is what there was at one time, with no container running and no call under way.
type Sample struct {
	Minutes  float64 `json:"minutes"`
	Starts   int     `json:"starts"`   // so far
	Refusals int     `json:"refusals"` // host ports that the daemon was refused, and searched on; so far
	Faults   int     `json:"faults"`   // that were done to requests between dockerd and RootlessKit; so far
	Lost     int     `json:"lost"`     // of these, answers to requests for a port that did not come back; so far
	Injected int     `json:"injected"` // containers that were not published because of that; so far
	Failures int     `json:"failures"` // containers that were not published or did not answer, for another reason; so far

	RSS            int `json:"dockerd_rss_kib"`
	Descriptors    int `json:"dockerd_descriptors"`
	Goroutines     int `json:"dockerd_goroutines"`
	RootlessKitFDs int `json:"rootlesskit_descriptors"`
	Peak           int `json:"listeners_peak"` // the most host ports that were published at once, of those looks that there were; so far
	Named          int `json:"named"`          // host ports that RootlessKit was left with, and the daemon's log names
	Listeners      int `json:"listeners"`      // host ports that are published, without those
	Containers     int `json:"containers"`     // that the daemon knows of
}

// Header and String are lines of one table.
const Header = " minutes   starts  refusals  faults  failed of them  failures  RSS MiB  descriptors  goroutines  RootlessKit's descriptors  listeners: most, named, now"

func (s Sample) String() string {
	return fmt.Sprintf("%8.1f %8d %9d %7d %15d %9d %8d %12d %11d %26d %16d %6d %4d",
		s.Minutes, s.Starts, s.Refusals, s.Faults, s.Injected, s.Failures, s.RSS>>10, s.Descriptors, s.Goroutines, s.RootlessKitFDs, s.Peak, s.Named, s.Listeners)
}

// What comes and goes in an idle daemon: connections that are kept, timers, what the garbage
// collector has not returned yet. It does not depend on how many containers there were.
const (
	noiseDescriptors = 16
	noiseGoroutines  = 32
	noiseRSS         = 48 << 10 // and a quarter of what there was
)

// Verdict names what is wrong with a soak that was like first after its warm-up, and like last
// at its end: nothing, if it is well.
func Verdict(first, last Sample) (wrong []string) {
	if last.Failures != 0 {
		wrong = append(wrong, fmt.Sprintf("%d failures", last.Failures))
	}
	if last.Injected != last.Lost {
		wrong = append(wrong, fmt.Sprintf("%d answers were lost, and %d starts failed of it", last.Lost, last.Injected))
	}
	wrong = append(wrong, Grown(first, last)...)
	if last.Faults == 0 {
		wrong = append(wrong, "no fault was injected")
	}
	if last.Peak == 0 {
		wrong = append(wrong, "no published port was ever seen on the host, so that none left proves nothing")
	}
	if last.Starts == first.Starts {
		wrong = append(wrong, "nothing was started after the warm-up")
	}
	return wrong
}

// Grown names what is left at last, with no container running, and what there is more of than
// there was at first.
func Grown(first, last Sample) (wrong []string) {
	grown := func(what string, from, to, noise int) {
		if to > from+noise {
			wrong = append(wrong, fmt.Sprintf("%s grew from %d to %d in %d starts", what, from, to, last.Starts-first.Starts))
		}
	}
	left := func(what string, n int) {
		if n != 0 {
			wrong = append(wrong, fmt.Sprintf("%d %s", n, what))
		}
	}
	left("host ports are left that nothing names", last.Listeners)
	left("containers are left", last.Containers)
	grown("dockerd's descriptors", first.Descriptors, last.Descriptors, noiseDescriptors)
	grown("dockerd's goroutines", first.Goroutines, last.Goroutines, noiseGoroutines)
	// A port that it was left with has a listener.
	grown("RootlessKit's descriptors", first.RootlessKitFDs-first.Named, last.RootlessKitFDs-last.Named, noiseDescriptors)
	grown("dockerd's RSS (KiB)", first.RSS, last.RSS, noiseRSS+first.RSS/4)
	return wrong
}
