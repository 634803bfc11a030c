package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"berth/hack/checkout"
	"berth/hack/stack"
)

func newUpCommand() *cobra.Command {
	var o stack.Options
	var stock bool
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start a rootless stack with the patched daemon",
		Long: `Start a rootless stack, RootlessKit and the patched dockerd from build/bin, for the
current user, or for the user berth when that is root. It keeps running until "berth down".
All its files are in ~/.berth of that user; its log is build/log/stack.log.`,
		Example: `  berth up
  berth up --stock
  berth up --net slirp4netns --port-driver slirp4netns`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			root, err := checkout.Root()
			if err != nil {
				return err
			}
			s, err := stack.At("")
			if err != nil {
				return err
			}
			o.Bin = checkout.Bin(root)
			o.Log = checkout.Log(root, "stack.log")
			o.Progress = cmd.ErrOrStderr()
			if stock {
				o.Dockerd = stockDockerd(root)
			}
			err = s.Up(cmd.Context(), o)
			if errors.Is(err, stack.ErrUp) && cmd.Flags().NFlag() == 0 {
				fmt.Fprintf(cmd.OutOrStdout(), "%v: %s\n", err, s.Host())
				return nil
			}
			if errors.Is(err, stack.ErrUp) {
				return fmt.Errorf("%w, perhaps with other options: end it with `berth down`", err)
			}
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "dockerd is up at %s as user %s, its log is %s\n", s.Host(), s.User(), o.Log)
			fmt.Fprintf(cmd.OutOrStdout(), "`eval \"$(%s env)\"` points docker to it, `berth down` stops it\n", filepath.Join(o.Bin, "berth"))
			return nil
		},
	}
	cmd.Flags().BoolVar(&stock, "stock", false, "run upstream's daemon, unpatched")
	cmd.Flags().StringVar(&o.Dockerd, "dockerd", "", "run this daemon (`FILE`)")
	cmd.MarkFlagsMutuallyExclusive("stock", "dockerd")
	stackFlags(cmd.Flags(), &o)
	return cmd
}

// stackFlags adds the flags that say how RootlessKit connects a stack to the host.
func stackFlags(flags *pflag.FlagSet, o *stack.Options) {
	flags.StringVar(&o.Net, "net", stack.DefaultNet, "RootlessKit's network `DRIVER`")
	flags.StringVar(&o.PortDriver, "port-driver", stack.DefaultPortDriver, "RootlessKit's port `DRIVER`")
	flags.BoolFunc("detach-netns", "leave dockerd's process in the host's network namespace (default true)", func(v string) error {
		detach, err := strconv.ParseBool(v)
		o.NoDetachNetns = !detach
		return err
	})
}

func stockDockerd(root string) string { return checkout.Bin(root, "dockerd-stock") }
