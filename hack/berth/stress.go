package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"berth/hack/tree"
	"berth/integration/hostload"
	"berth/integration/image"
	"berth/integration/stack"
)

// The host load: of the first ports that a container gets, three in ten belong to someone else.
const (
	loadOf    = 1000
	loadHold  = 300
	loadChurn = time.Millisecond
	loadSeed  = 1
)

func newStressCommand() *cobra.Command {
	var o stack.Options
	var starts, atOnce int
	cmd := &cobra.Command{
		Use:   "stress",
		Short: "Show stock failing and Berth not failing, under the same host load",
		Long: fmt.Sprintf(`Run hack/stress.sh against a stack with upstream's daemon, then against one with the
patched daemon, while another process holds %d of the first %d dynamic host ports and
releases one and takes another every %v. Prints what came of it, and exits 0 only
if Berth published every container and stock failed some: otherwise nothing is shown.`, loadHold, loadOf, loadChurn),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			root, err := tree.Root()
			if err != nil {
				return err
			}
			o.Bin = binDir(root)
			run := stressRun{root: root, options: o, starts: starts, atOnce: atOnce, out: cmd.OutOrStdout(), err: cmd.ErrOrStderr()}
			stock, err := run.stress(cmd.Context(), "stock", stockDockerd(root))
			if err != nil {
				return fmt.Errorf("stress with stock: %w", err)
			}
			berth, err := run.stress(cmd.Context(), "Berth", filepath.Join(o.Bin, "dockerd"))
			if err != nil {
				return fmt.Errorf("stress with Berth: %w", err)
			}
			fmt.Fprintln(run.out)
			printTable(run.out, stock, berth)
			return verdict(stock, berth)
		},
	}
	cmd.Flags().IntVarP(&starts, "starts", "n", 80, "how many containers to start")
	cmd.Flags().IntVarP(&atOnce, "at-once", "c", 8, "how many at a time")
	stackFlags(cmd.Flags(), &o)
	return cmd
}

// stressRun is what both daemons' runs have in common.
type stressRun struct {
	root           string
	options        stack.Options
	starts, atOnce int
	out, err       io.Writer
}

// stress brings a stack up with the daemon, runs stress.sh under the host load, and takes
// the stack down.
func (r stressRun) stress(ctx context.Context, name, dockerd string) (_ result, retErr error) {
	s, err := stack.At("stress")
	if err != nil {
		return result{}, err
	}
	// A run that was killed may have left its stack.
	if err := s.Down(ctx); err != nil {
		return result{}, err
	}
	fmt.Fprintf(r.out, "\n%s: %d starts, %d at a time, %d of the first %d dynamic host ports held\n", name, r.starts, r.atOnce, loadHold, loadOf)
	o := r.options
	o.Dockerd = dockerd
	o.Log = filepath.Join(r.root, "build", "log", "stress-"+filepath.Base(dockerd)+".log")
	o.Progress = r.err
	if err := s.Up(ctx, o); err != nil {
		return result{}, err
	}
	defer func() { retErr = errors.Join(retErr, s.Down(ctx)) }()
	if err := image.Import(ctx, r.root, filepath.Join(r.options.Bin, "docker"), s.Host()); err != nil {
		return result{}, err
	}

	ports, err := hostload.DynamicPorts(loadOf)
	if err != nil {
		return result{}, err
	}
	load, err := hostload.Start(hostload.Load{Network: "tcp4", Ports: ports, Hold: loadHold, Churn: loadChurn, Seed: loadSeed})
	if err != nil {
		return result{}, err
	}
	res, err := r.script(ctx, s.Host())
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	report, stopErr := load.Stop()
	if err := errors.Join(err, stopErr); err != nil {
		return result{}, err
	}
	fmt.Fprintf(r.out, "host load: %d ports held, %d released and others taken\n", len(report.Held), report.Churned)
	res.name = name
	return res, nil
}

// script runs stress.sh, shows its output, and reads its last line. The containers are left
// to the end of their stack, which has them all at once.
func (r stressRun) script(ctx context.Context, host string) (result, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(r.root, "hack", "stress.sh"),
		"-n", strconv.Itoa(r.starts), "-c", strconv.Itoa(r.atOnce), "-i", image.Name, "-k")
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+host, "PATH="+r.options.Bin+":"+os.Getenv("PATH"))
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) } // it removes its containers
	var out bytes.Buffer
	cmd.Stdout = io.MultiWriter(r.out, &out)
	cmd.Stderr = r.err
	err := cmd.Run()
	// Its exit status 1 says no more than its last line.
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || exit.ExitCode() != 1) {
		return result{}, fmt.Errorf("stress.sh: %w", err)
	}
	return parseResult(out.String())
}

// result is the last line of stress.sh.
type result struct {
	name                            string
	starts, published, inUse, other int
	answered, misdelivered, silent  int
	median, p95                     string // in ms; "-" when nothing was published
	seconds                         float64
}

var resultLine = regexp.MustCompile(`(?m)^stress: starts=(\d+) published=(\d+) inuse=(\d+) other=(\d+) answered=(\d+) misdelivered=(\d+) silent=(\d+) median_ms=(\d+|-) p95_ms=(\d+|-) seconds=([\d.]+)\n\z`)

func parseResult(output string) (result, error) {
	m := resultLine.FindStringSubmatch(output)
	if m == nil {
		return result{}, errors.New("the output of stress.sh does not end with its line of results")
	}
	var r result
	for i, n := range []*int{&r.starts, &r.published, &r.inUse, &r.other, &r.answered, &r.misdelivered, &r.silent} {
		var err error
		if *n, err = strconv.Atoi(m[i+1]); err != nil {
			return result{}, err
		}
	}
	r.median, r.p95 = m[8], m[9]
	var err error
	r.seconds, err = strconv.ParseFloat(m[10], 64)
	return r, err
}

func (r result) perSecond(n int) float64 { return float64(n) / r.seconds }

func printTable(out io.Writer, stock, berth result) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "\tstarts\tpublished\tport in use\tother failure\twrong or no answer\tmedian ms\tp95 ms\tstarts/s\t")
	for _, r := range []result{stock, berth} {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%s\t%s\t%.1f\t\n",
			r.name, r.starts, r.published, r.inUse, r.other, r.misdelivered+r.silent, r.median, r.p95, r.perSecond(r.starts))
	}
	w.Flush()
	fmt.Fprintf(out, "Berth to stock: %.2f x the starts per second, %.2f x those that were published (failing is quick)\n",
		berth.perSecond(berth.starts)/stock.perSecond(stock.starts), berth.perSecond(berth.published)/stock.perSecond(stock.published))
}

// verdict returns an error that says which half of the claim was not shown.
func verdict(stock, berth result) error {
	var errs []error
	if berth.answered != berth.starts {
		errs = append(errs, fmt.Errorf("only %d of Berth's %d containers were published and answered", berth.answered, berth.starts))
	}
	if stock.answered == stock.starts {
		errs = append(errs, errors.New("the load proved nothing: stock failed none"))
	}
	return errors.Join(errs...)
}
