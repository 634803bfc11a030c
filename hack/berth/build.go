//go:build linux

package main

import (
	"errors"

	"github.com/spf13/cobra"

	"berth/hack/build"
	"berth/hack/checkout"
)

func newBuildCommand() *cobra.Command {
	var race bool
	var o build.Options
	cmd := &cobra.Command{
		Use:   "build [component...]",
		Short: "Build what vendor.conf lists into build/bin",
		Long: `Build what vendor.conf lists into build/bin: dockerd (patched) and dockerd-stock, and
everything that a rootless Docker needs beside them. With names, only those; the ones marked
optional in vendor.conf are built only so. Only what has changed is built again. The sources
are left in build/tree, the compiler's output in build/log.

With --base, the daemon of that version of upstream, out of those that vendor.conf has,
patched and stock, and what comes with it, into build/base/<version>.

With --race, dockerd-race: the patched dockerd with Go's race detector in it. The first time,
this takes as long as everything else.`,
		Example: `  berth build
  berth build dockerd rootlesskit2
  berth build --base VERSION
  berth build --race`,
		RunE: func(cmd *cobra.Command, names []string) error {
			root, err := checkout.Root()
			if err != nil {
				return err
			}
			if race {
				names = append(names, build.Race)
			}
			err = o.Run(cmd.Context(), root, cmd.OutOrStdout(), names)
			if errors.Is(err, build.ErrNoComponent) {
				return misuse(cmd, err)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&o.Base, "base", "", "build for this `VERSION` of upstream")
	cmd.Flags().BoolVar(&o.Force, "force", false, "patch a base whose nat package is not the one that the patch was written against")
	cmd.Flags().BoolVar(&race, "race", false, "build dockerd-race, and else only what is named")
	return cmd
}
