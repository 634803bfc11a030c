package main

import (
	"errors"

	"github.com/spf13/cobra"

	"berth/hack/build"
	"berth/hack/checkout"
)

func newBuildCommand() *cobra.Command {
	var race bool
	cmd := &cobra.Command{
		Use:   "build [component...]",
		Short: "Build what vendor.conf lists into build/bin",
		Long: `Build what vendor.conf lists into build/bin: dockerd (patched) and dockerd-stock, and
everything that a rootless Docker needs beside them. With names, only those; the ones marked
optional in vendor.conf are built only so. Only what has changed is built again. The sources
are left in build/tree, the compiler's output in build/log.

With --race, dockerd-race: the patched dockerd with Go's race detector in it. The first time,
this takes as long as everything else.`,
		Example: `  berth build
  berth build dockerd rootlesskit2
  berth build --race`,
		RunE: func(cmd *cobra.Command, names []string) error {
			root, err := checkout.Root()
			if err != nil {
				return err
			}
			if race {
				names = append(names, build.Race)
			}
			err = build.Run(cmd.Context(), root, cmd.OutOrStdout(), names)
			if errors.Is(err, build.ErrNoComponent) {
				return misuse(cmd, err)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&race, "race", false, "build dockerd-race, and else only what is named")
	return cmd
}
