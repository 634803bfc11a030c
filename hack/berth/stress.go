//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"berth/hack/checkout"
	"berth/hack/progress"
	"berth/hack/stack"
	"berth/integration/harness"
	"berth/integration/hostload"
	"berth/integration/stress"
	"berth/integration/whoami"
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
	var list, full, quick bool
	var measured harness.Options
	cmd := &cobra.Command{
		Use:   "stress",
		Short: "Show stock failing and Berth not failing, under the same host load",
		Long: fmt.Sprintf(`Run hack/stress.sh against a stack with upstream's daemon, then against one with the
patched daemon, while another process holds %d of the first %d dynamic host ports and
releases one and takes another every %v, in the mean. Prints what came of it, and exits 0 only
if Berth published every container and stock failed some, with 3 if not: then nothing is
shown.

With --contender, --load, --request or --dockerd it measures those, and all of what is not chosen
among, through the daemons' API: in turns, and each daemon on a host of its own if root runs this. Each
start must be answered by its own container. What was measured is kept in build/results/stress.json,
of which no cell is measured again. --full measures everything, 200 starts a cell, in at
most three hours; --quick the same with 40 starts. Both exit with 3 if something is not as
docs/measuring.md claims, and write a page of it all.`, loadHold, loadOf, loadChurn),
		Example: `  berth stress -n 40
  berth stress --list
  berth stress --contender berth,berth-no-view,stock --load row-100 --request tcp --starts 10`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if starts < 1 || atOnce < 1 {
				return misuse(cmd, errors.New("want at least one start, and one at a time"))
			}
			if list {
				harness.List(cmd.OutOrStdout())
				return nil
			}
			s, from, err := at(cmd, "stress")
			if err != nil {
				return err
			}
			root := from.Checkout
			o.Checkout, o.Bin, o.Progress = root, from.Bin, from.Progress
			unlock, err := lockStress(s)
			if err != nil {
				return err
			}
			defer unlock()
			measured.Starts, measured.Parallel, measured.Root, measured.Full = starts, atOnce, root, full || quick
			switch f := cmd.Flags(); {
			case quick:
				measured.Starts = 40
				return measure(cmd, measured, "stress-quick.json")
			case full:
				measured.Starts = 200
				return measure(cmd, measured, "stress-full.json")
			case f.Changed("contender") || f.Changed("load") || f.Changed("request") || f.Changed("dockerd"):
				return measure(cmd, measured, "stress.json")
			}
			run := stressRun{stack: s, root: root, options: o, starts: starts, atOnce: atOnce, out: cmd.OutOrStdout(), err: cmd.ErrOrStderr()}
			stock, err := run.run(cmd.Context(), "stock", stockDockerd(root))
			if err != nil {
				return fmt.Errorf("stress with stock: %w", err)
			}
			berth, err := run.run(cmd.Context(), "Berth", filepath.Join(o.Bin, "dockerd"))
			if err != nil {
				return fmt.Errorf("stress with Berth: %w", err)
			}
			fmt.Fprintln(run.out)
			stress.PrintTable(run.out, stock, berth)
			fmt.Fprintf(run.out, "Berth to stock: %.2f x the starts per second, %.2f x those that were published (failing is quick)\n",
				berth.PerSecond(berth.Starts)/stock.PerSecond(stock.Starts), berth.PerSecond(berth.Published)/stock.PerSecond(stock.Published))
			if err := verdict(stock, berth); err != nil {
				return exitError{err, notShown}
			}
			return nil
		},
	}
	cmd.Flags().IntVarP(&starts, "starts", "n", 80, "how many containers to start")
	cmd.Flags().IntVarP(&atOnce, "parallel", "c", 8, "how many at a time")
	cmd.Flags().StringSliceVar(&measured.Contenders, "contender", nil, "measure these daemons (`NAME,...`)")
	cmd.Flags().StringSliceVar(&measured.Loads, "load", nil, "under these loads of the host (`NAME,...`)")
	cmd.Flags().StringSliceVar(&measured.Requests, "request", nil, "asking for these ports (`NAME,...`)")
	cmd.Flags().StringVar(&measured.Dockerd, "dockerd", "", "measure this daemon, too (`FILE`)")
	cmd.Flags().Uint64Var(&measured.Seed, "seed", loadSeed, "what is chosen at random is by this")
	cmd.Flags().BoolVar(&full, "full", false, "measure everything")
	cmd.Flags().BoolVar(&quick, "quick", false, "measure everything, with fewer starts")
	for _, all := range []string{"full", "quick"} {
		for _, some := range []string{"starts", "contender", "load", "request", "dockerd"} {
			cmd.MarkFlagsMutuallyExclusive(all, some)
		}
	}
	cmd.Flags().BoolVar(&list, "list", false, "list what there is to choose from")
	driverFlags(cmd.Flags(), &o)
	return cmd
}

// measure runs the harness, with a file of results.
func measure(cmd *cobra.Command, o harness.Options, file string) (err error) {
	if o.Dockerd != "" {
		if o.Dockerd, err = filepath.Abs(o.Dockerd); err != nil {
			return err
		}
	}
	o.File = checkout.Results(o.Root, file)
	o.Progress = harness.NewProgress(cmd.ErrOrStderr())
	results, err := harness.Run(cmd.Context(), o)
	if errors.Is(err, harness.ErrUnknown) {
		return misuse(cmd, err)
	}
	if results == nil || len(results.Cells) == 0 {
		return err
	}
	out := cmd.OutOrStdout()
	fmt.Fprintln(out)
	results.Print(out)
	held := !o.Full || results.PrintClaims(out)
	files, pageErr := results.WritePage()
	fmt.Fprintln(out, "kept in", strings.Join(append([]string{o.File}, files...), ", "))
	if err = errors.Join(err, pageErr); err == nil && !held {
		return exitError{errors.New("not everything is as claimed"), notShown}
	}
	return err
}

// lockStress keeps a second stress away: the stack is one, and so is the host that they would load. The lock ends with this process.
func lockStress(s *stack.Stack) (unlock func(), _ error) {
	l, err := net.Listen("unix", fmt.Sprintf("@berth-stress-%d", s.UID()))
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("another `berth stress` is running as user %s: wait for its end", s.User())
	}
	if err != nil {
		return nil, err
	}
	return func() { l.Close() }, nil
}

// stressRun is what both daemons' runs have in common.
type stressRun struct {
	stack          *stack.Stack
	root           string
	options        stack.Options
	starts, atOnce int
	out, err       io.Writer
}

// run brings a stack up with the daemon, runs stress.sh under the host load, and takes
// the stack down.
func (r stressRun) run(ctx context.Context, name, dockerd string) (_ stress.Result, retErr error) {
	s := r.stack
	o := r.options
	// A run that was killed may have left its stack.
	if _, err := s.Purge(ctx, o); err != nil {
		return stress.Result{}, err
	}
	fmt.Fprintf(r.out, "\n%s: %d starts, %d at a time, %d of the first %d dynamic host ports held\n", name, r.starts, r.atOnce, loadHold, loadOf)
	o.Dockerd = dockerd
	o.Log = checkout.Log(r.root, "stress-"+filepath.Base(dockerd)+".log")
	if err := s.Up(ctx, o); err != nil {
		return stress.Result{}, err
	}
	defer func() {
		_, err := s.Purge(ctx, o)
		retErr = errors.Join(retErr, err)
	}()
	defer progress.Start(r.err, name+": starting containers")()
	daemon, err := s.Client()
	if err != nil {
		return stress.Result{}, err
	}
	defer daemon.Close()
	if err := whoami.Import(ctx, r.root, daemon); err != nil {
		return stress.Result{}, err
	}

	ports, err := hostload.DynamicPorts(loadOf)
	if err != nil {
		return stress.Result{}, err
	}
	load, err := hostload.Start(hostload.Load{Network: "tcp4", Ports: ports, Hold: loadHold, Churn: loadChurn, Seed: loadSeed})
	if err != nil {
		return stress.Result{}, err
	}
	script := stress.Script{Repository: r.root, Bin: r.options.Bin, Host: s.Host(), Starts: r.starts, AtOnce: r.atOnce, Out: r.out, Err: r.err}
	res, err := script.Run(ctx)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	report, stopErr := load.Stop()
	if err := errors.Join(err, stopErr); err != nil {
		return stress.Result{}, err
	}
	fmt.Fprintf(r.out, "host load: %d ports held, %d released and others taken\n", len(report.Held), report.Churned)
	res.Name = name
	return res, nil
}

// verdict returns an error that says which half of the claim was not shown.
func verdict(stock, berth stress.Result) error {
	var errs []error
	if berth.Answered != berth.Starts {
		errs = append(errs, fmt.Errorf("only %d of Berth's %d containers were published and answered", berth.Answered, berth.Starts))
	}
	if stock.Answered == stock.Starts {
		errs = append(errs, errors.New("the load proved nothing: stock failed none"))
	}
	return errors.Join(errs...)
}
