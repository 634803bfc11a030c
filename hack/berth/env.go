package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"berth/hack/checkout"
	"berth/hack/stack"
)

func newEnvCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "env",
		Short:   "Print DOCKER_HOST and PATH of the stack, for eval",
		Long:    `Print shell commands that point docker to the stack that "berth up" started.`,
		Example: `  eval "$(build/bin/berth env)"`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			root, err := checkout.Root()
			if err != nil {
				return err
			}
			s, err := stack.At("")
			if err != nil {
				return err
			}
			if !s.Running(cmd.Context()) {
				return errors.New("nothing is up: start a stack with `berth up`")
			}
			fmt.Fprintf(cmd.OutOrStdout(), "export DOCKER_HOST=%s\nexport PATH=%s:\"$PATH\"\n", quote(s.Host()), quote(checkout.Bin(root)))
			return nil
		},
	}
}

// quote makes one word of s for a POSIX shell.
func quote(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
