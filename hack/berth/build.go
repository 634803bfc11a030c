package main

import (
	"github.com/spf13/cobra"

	"berth/hack/build"
	"berth/hack/tree"
)

func newBuildCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "build [component...]",
		Short: "Build what vendor.conf lists into build/bin",
		Long: `Build what vendor.conf lists into build/bin: dockerd (patched) and dockerd-stock, and
everything that a rootless Docker needs beside them. With names, only those; the ones marked
optional in vendor.conf are built only so. Only what has changed is built again. The sources
are left in build/tree, the compiler's output in build/log.`,
		Example: `  berth build
  berth build dockerd rootlesskit2`,
		RunE: func(cmd *cobra.Command, names []string) error {
			root, err := tree.Root()
			if err != nil {
				return err
			}
			return build.Run(cmd.Context(), root, cmd.OutOrStdout(), names)
		},
	}
}
