//go:build linux

package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

func newEnvCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "env",
		Short:   "Print DOCKER_HOST and PATH of the stack, for eval",
		Long:    `Print shell commands that point docker to the stack that "berth up" started.`,
		Example: `  eval "$(berth env)"`,
		Args:    noArguments,
	}
	name := nameFlag(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		s, _, err := at(cmd, *name)
		if err != nil {
			return err
		}
		status, err := s.Status(cmd.Context())
		if err != nil {
			return err
		}
		if !status.Up {
			return fmt.Errorf("nothing is up: start a stack with `%s`", withName("berth up", *name))
		}
		fmt.Fprintf(cmd.OutOrStdout(), "export DOCKER_HOST=%s\nexport PATH=%s:\"$PATH\"\n", quote(s.Host()), quote(status.Options.Bin))
		return nil
	}
	return cmd
}

// quote makes one word of s for a POSIX shell.
func quote(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
