package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"berth/hack/stack"
)

func newDownCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Stop the stack and remove everything it made",
		Long: `Stop the stack that "berth up" started, with its containers, and remove all it made,
images and volumes too; only its log is kept. If anything is left, a process, a mount, a
socket or a file, it is named and the exit status is 1. Ctrl-C kills what does not stop.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := stack.At("")
			if err != nil {
				return err
			}
			existed := s.Exists()
			if err := s.Down(cmd.Context()); err != nil {
				return err
			}
			if existed {
				fmt.Fprintln(cmd.OutOrStdout(), "the stack is down, and nothing of it is left")
			} else {
				fmt.Fprintln(cmd.OutOrStdout(), "nothing is up")
			}
			return nil
		},
	}
}
