// Package stress runs hack/stress.sh against a daemon and reads what came of it.
package stress

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"

	"berth/integration/whoami"
)

// Script is one run of stress.sh. The daemon has the test image.
type Script struct {
	Repository     string // where hack/stress.sh is
	Bin            string // folder with the docker CLI
	Host           string // DOCKER_HOST
	Starts, AtOnce int
	Out, Err       io.Writer // what the script prints, line by line
}

// Run runs the script. The containers are left to the end of their stack, which has them
// all at once.
func (s Script) Run(ctx context.Context) (Result, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.Repository, "hack", "stress.sh"),
		"-n", strconv.Itoa(s.Starts), "-c", strconv.Itoa(s.AtOnce), "-i", whoami.Image, "-k")
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+s.Host, "PATH="+s.Bin+":"+os.Getenv("PATH"))
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it ends what it has begun
	var out bytes.Buffer
	cmd.Stdout = io.MultiWriter(s.Out, &out)
	cmd.Stderr = s.Err
	err := cmd.Run()
	// Its exit status 1 says no more than its last line.
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || exit.ExitCode() != 1) {
		return Result{}, fmt.Errorf("stress.sh: %w", err)
	}
	return parseResult(out.String())
}

// Result is the last line of stress.sh.
type Result struct {
	Name         string      `json:"name"` // of what was tried; the script knows none
	Starts       int         `json:"starts"`
	Published    int         `json:"published"`
	InUse        int         `json:"port_in_use"`
	Other        int         `json:"other_failure"`
	Answered     int         `json:"answered"`
	Misdelivered int         `json:"misdelivered"`
	Silent       int         `json:"silent"`
	Median       json.Number `json:"median_ms,omitempty"` // none when nothing was published
	P95          json.Number `json:"p95_ms,omitempty"`
	Seconds      float64     `json:"seconds"`
}

var resultLine = regexp.MustCompile(`(?m)^stress: starts=(\d+) published=(\d+) inuse=(\d+) other=(\d+) answered=(\d+) misdelivered=(\d+) silent=(\d+) median_ms=(\d+|-) p95_ms=(\d+|-) seconds=([\d.]+)\n\z`)

func parseResult(output string) (Result, error) {
	m := resultLine.FindStringSubmatch(output)
	if m == nil {
		return Result{}, errors.New("the output of stress.sh does not end with its line of results")
	}
	var r Result
	for i, n := range []*int{&r.Starts, &r.Published, &r.InUse, &r.Other, &r.Answered, &r.Misdelivered, &r.Silent} {
		var err error
		if *n, err = strconv.Atoi(m[i+1]); err != nil {
			return Result{}, err
		}
	}
	r.Median, r.P95 = json.Number(strings.Trim(m[8], "-")), json.Number(strings.Trim(m[9], "-"))
	var err error
	r.Seconds, err = strconv.ParseFloat(m[10], 64)
	return r, err
}

// PerSecond is n of what took the run's time, a second.
func (r Result) PerSecond(n int) float64 { return float64(n) / r.Seconds }

// PrintTable prints the results, a line each.
func PrintTable(out io.Writer, results ...Result) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\tstarts\tpublished\tport in use\tother failure\twrong or no answer\tmedian ms\tp95 ms\tstarts/s\t")
	for _, r := range results {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%s\t%s\t%.1f\t\n",
			r.Name, r.Starts, r.Published, r.InUse, r.Other, r.Misdelivered+r.Silent, r.Median, r.P95, r.PerSecond(r.Starts))
	}
	w.Flush()
}
