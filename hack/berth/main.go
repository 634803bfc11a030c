// Command berth is Berth's front door: it builds the patched Docker and runs it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	// A second Ctrl-C is not caught any more: it ends a clean-up that hangs.
	context.AfterFunc(ctx, stop)
	if err := newRootCommand().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "berth:", err)
		os.Exit(1)
	}
}

func newRootCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "berth",
		Short: "Docker's rootless daemon, patched to find a free host port whenever there is one",
		Long: `Berth is a patch set for Docker's rootless daemon: a container that asks for any free
host port gets one whenever the host has one. This command builds the patched daemon and
all that a rootless Docker needs beside it.`,
		Args:              cobra.NoArgs,
		SilenceErrors:     true, // main prints them, once
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	cmd.AddCommand(
		newBuildCommand(),
		newUpCommand(),
		newDownCommand(),
		newEnvCommand(),
		newStressCommand(),
		newInstallCommand(),
		newUninstallCommand(),
	)
	return cmd
}
