//go:build linux

package main

import (
	"github.com/spf13/cobra"

	"berth/hack/checkout"
	"berth/hack/rebase"
)

func newRebaseCommand() *cobra.Command {
	var r rebase.Rebase
	cmd := &cobra.Command{
		Use:   "rebase VERSION",
		Short: "Take a newer version of upstream for the base",
		Long: `Take a newer version of upstream for the base: say what has changed there in what the patch
replaces, stands on or is called by, build the daemon in a copy of this checkout, hold it to
upstream's API, modules and tests, and apply the series. Only when all of that holds are
vendor.conf and go.mod changed: the version is the default base then, and the one before it
is an older one. The first time takes about ten minutes.`,
		Example: `  berth rebase --dry-run VERSION`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if r.Root, err = checkout.Root(); err != nil {
				return err
			}
			r.Version, r.Out = args[0], cmd.OutOrStdout()
			return r.Run(cmd.Context())
		},
	}
	cmd.Flags().BoolVar(&r.DryRun, "dry-run", false, "change nothing, even when all holds")
	cmd.Flags().BoolVar(&r.Force, "force", false, "go on when upstream has changed the nat package")
	cmd.Flags().StringVar(&r.Release, "release", "", "the product's `NUMBER` of that version, where its releases/versions.yaml does not say it")
	return cmd
}
