//go:build linux

package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"berth/hack/checkout"
	"berth/hack/stack"
)

func newUpCommand() *cobra.Command {
	var o stack.Options
	var stock bool
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start a rootless stack with the patched daemon, or resume one",
		Long: `Start a rootless stack, RootlessKit and the patched dockerd from build/bin, for the
current user, or for the user berth when that is root. It keeps running until "berth down",
a reboot or a crash; then this command starts it again, with the images, volumes and containers
that it had. All its files are in ~/.berth of that user (~/.berth-NAME with --name); its log
is build/log/stack.log. HTTP_PROXY, HTTPS_PROXY and NO_PROXY are passed on to it.

Root's berth copies the programs to /var/lib/berth, which root alone can write, and does
everything else as that user.`,
		Example: `  berth up
  berth up --name second --stock
  berth up --name third --net slirp4netns --port-driver slirp4netns`,
		Args: noArguments,
	}
	name := nameFlag(cmd.Flags())
	cmd.Flags().BoolVar(&stock, "stock", false, "run upstream's daemon, unpatched")
	cmd.Flags().StringVar(&o.Dockerd, "dockerd", "", "run this daemon (`FILE`)")
	cmd.MarkFlagsMutuallyExclusive("stock", "dockerd")
	driverFlags(cmd.Flags(), &o)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		s, from, err := at(cmd, *name)
		if err != nil {
			return err
		}
		from.Net, from.PortDriver, from.NoDetachNetns = o.Net, o.PortDriver, o.NoDetachNetns
		if from.Dockerd = o.Dockerd; o.Dockerd != "" {
			// The stack may be restarted from elsewhere.
			if from.Dockerd, err = filepath.Abs(o.Dockerd); err != nil {
				return err
			}
		}
		if stock {
			from.Dockerd = stockDockerd(from.Checkout)
		}
		existed := s.Exists()
		err = s.Up(cmd.Context(), from)
		own := cmd.LocalFlags().Changed("name")
		if errors.Is(err, stack.ErrUp) && (cmd.Flags().NFlag() == 0 || own && cmd.Flags().NFlag() == 1) {
			fmt.Fprintf(cmd.OutOrStdout(), "%v: %s\n", err, s.Host())
			return nil
		}
		if errors.Is(err, stack.ErrUp) {
			return fmt.Errorf("%w, perhaps with other options: end it with `%s` first", err, withName("berth down", *name))
		}
		if err != nil {
			return withReasons(cmd, err, s.UID(), "runtime-dir") // a stack has its own
		}
		tellUp(cmd, s, from, *name, existed)
		return nil
	}
	return cmd
}

// tellUp says where a stack is that has just come up.
func tellUp(cmd *cobra.Command, s *stack.Stack, o stack.Options, name string, existed bool) {
	out := cmd.OutOrStdout()
	again := ""
	if existed {
		again = " again"
	}
	berth := filepath.Join(o.Bin, "berth")
	fmt.Fprintf(out, "dockerd is up%s at %s as user %s, its log is %s\n", again, s.Host(), s.User(), o.Log)
	if status, err := s.Status(cmd.Context()); err == nil {
		fmt.Fprintf(out, "cgroups: %s\n", status.Cgroups)
	}
	fmt.Fprintf(out, "`eval \"$(%s)\"` points docker to it, `%s` stops it\n", withName(berth+" env", name), withName(berth+" down", name))
}

func newRestartCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "restart",
		Short: "Restart the stack, with a dockerd that was built since",
		Long: `Stop what runs of the stack that "berth up" started, and start it again as it was, but with the
programs that are in build/bin now. Its containers stop; those with a restart policy
start again.`,
		Example: `  berth restart`,
		Args:    noArguments,
	}
	name := nameFlag(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		s, from, err := at(cmd, *name)
		if err != nil {
			return err
		}
		status, err := s.Status(cmd.Context())
		if err != nil {
			return err
		}
		if !status.Exists {
			return fmt.Errorf("there is no stack to restart: start one with `%s`", withName("berth up", *name))
		}
		was := status.Options
		from.Net, from.PortDriver, from.NoDetachNetns, from.Dockerd = was.Net, was.PortDriver, was.NoDetachNetns, was.Dockerd
		if err := s.Restart(cmd.Context(), from); err != nil {
			return err
		}
		tellUp(cmd, s, from, *name, true)
		return nil
	}
	return cmd
}

func stockDockerd(root string) string { return checkout.Bin(root, "dockerd-stock") }
