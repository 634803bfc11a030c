//go:build linux

package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"berth/hack/checkout"
	"berth/hack/patch"
	"berth/hack/pins"
	"berth/hack/tree"
)

func newPatchCommand() *cobra.Command {
	var version string
	cmd := &cobra.Command{
		Use:   "patch",
		Short: "Write the patch as a series of mails for upstream",
		Long: `Write the patch as upstream takes patches: a series of mails in build/patch, for git am,
with a cover letter. The user that git knows in this checkout signs it off.`,
		Example: `  berth patch
  git -C ../moby am --empty=drop "$PWD"/build/patch/*.patch`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			root, err := checkout.Root()
			if err != nil {
				return err
			}
			list, err := pins.Load(filepath.Join(root, "vendor.conf"))
			if err != nil {
				return err
			}
			base, err := pins.Base(list, version)
			if err != nil {
				return err
			}
			module, err := tree.Module(cmd.Context(), root, base)
			if err != nil {
				return err
			}
			s := patch.Series{Root: root, Base: base, Module: module, Dir: filepath.Join(root, "build", "patch")}
			if err := s.Write(cmd.Context()); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "the series for %s is in %s\n", base.Version, s.Dir)
			return nil
		},
	}
	cmd.Flags().StringVar(&version, "base", "", "write it for this `VERSION` of upstream")
	return cmd
}
