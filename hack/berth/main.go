// Command berth is Berth's front door: it builds the patched Docker and runs it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit statuses.
const (
	failed   = 1
	misused  = 2
	notShown = 3
)

// exitError is an error with an exit status of its own.
type exitError struct {
	error
	status int
}

// errWouldFail ends `berth doctor` with its status; what would fail is printed already.
var errWouldFail = errors.New("something would fail")

func (e exitError) Unwrap() error { return e.error }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	// A second Ctrl-C is not caught any more: it ends a clean-up that hangs.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, newRootCommand(), os.Stderr))
}

// run runs the command and returns its exit status.
func run(ctx context.Context, cmd *cobra.Command, stderr io.Writer) int {
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(stderr, "berth:", err)
	if e, ok := errors.AsType[exitError](err); ok {
		return e.status
	}
	return failed
}

func newRootCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "berth",
		Short: "Docker's rootless daemon, patched to find a free host port whenever there is one",
		Long: `Berth is a patch set for Docker's rootless daemon: a container that asks for any free
host port gets one whenever the host has one. This command builds the patched daemon and
all that a rootless Docker needs beside it, and runs it.

Exit status: 0 done, 1 failed, 2 used wrongly, 3 done, but it showed something else than is
claimed (stress).`,
		Args:              unknownCommand,
		SilenceErrors:     true, // run prints them, once
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	version := cmd.Flags().Bool("version", false, "print the version")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if !*version {
			return cmd.Help()
		}
		v, err := ownVersion(cmd.Context())
		if err == nil {
			fmt.Fprintln(cmd.OutOrStdout(), "berth", v)
		}
		return err
	}
	cmd.AddCommand(commands()...)
	cmd.SetFlagErrorFunc(misuse)
	cmd.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return misuse(cmd, cmd.ValidateFlagGroups()) }
	for _, sub := range cmd.Commands() {
		if args := sub.Args; args != nil {
			sub.Args = func(cmd *cobra.Command, given []string) error { return misuse(cmd, args(cmd, given)) }
		}
	}
	return cmd
}

// misuse makes err, if any, one about how the command was called.
func misuse(cmd *cobra.Command, err error) error {
	if err == nil {
		return nil
	}
	return exitError{fmt.Errorf("%w\nsee `%s --help`", err, cmd.CommandPath()), misused}
}

// unknownCommand is for the arguments that no command has taken.
func unknownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	err := fmt.Errorf("there is no command %q", args[0])
	if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
		err = fmt.Errorf("%w: is it %s?", err, strings.Join(like, " or "))
	}
	return misuse(cmd, err)
}

// noArguments is cobra.NoArgs, in words that fit: what it refuses is no command.
func noArguments(_ *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return fmt.Errorf("unexpected argument %q", args[0])
}

func writeJSON(out io.Writer, v any) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
