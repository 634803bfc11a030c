//go:build linux

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/moby/moby/client"
	"github.com/spf13/cobra"

	"berth/hack/stack"
)

func newDownCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop the stack; with --purge, remove all it has",
		Long: `Stop the stack that "berth up" started, with its containers. What it has stays, images,
volumes and containers, for the next "berth up". With --purge, it is all removed; only the log
is kept. If anything is left then, a process, a socket or a file, it is named and the exit
status is 1. Ctrl-C kills what does not stop.`,
		Example: `  berth down
  berth down --purge`,
		Args: noArguments,
	}
	name := nameFlag(cmd.Flags())
	purge := cmd.Flags().Bool("purge", false, "remove its images, volumes and containers, too")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		s, o, err := at(cmd, *name)
		if err != nil {
			return err
		}
		out := cmd.OutOrStdout()
		if *purge {
			had := has(cmd.Context(), s)
			removed, err := s.Purge(cmd.Context(), o)
			for _, r := range removed {
				fmt.Fprintf(out, "removed %s%s\n", r, had)
			}
			if err == nil && len(removed) == 0 {
				fmt.Fprintln(out, "there is nothing to remove")
			}
			return err
		}
		if !s.Exists() {
			fmt.Fprintln(out, "nothing is up")
			return nil
		}
		if err := s.Down(cmd.Context(), o); err != nil {
			return err
		}
		fmt.Fprintf(out, "the stack is down; %s keeps what it has: `%s` starts it again, `%s` removes it\n",
			s.Dir, withName("berth up", *name), withName("berth down --purge", *name))
		return nil
	}
	return cmd
}

// has tells what a stack that is up holds, in words to append.
func has(ctx context.Context, s *stack.Stack) string {
	if !s.Running(ctx) {
		return ""
	}
	c, err := s.Client()
	if err != nil {
		return ""
	}
	defer c.Close()
	containers, err1 := c.ContainerList(ctx, client.ContainerListOptions{All: true})
	images, err2 := c.ImageList(ctx, client.ImageListOptions{})
	volumes, err3 := c.VolumeList(ctx, client.VolumeListOptions{})
	if err1 != nil || err2 != nil || err3 != nil {
		return ""
	}
	return ", with " + strings.Join([]string{
		plural(len(containers.Items), "container"), plural(len(images.Items), "image"), plural(len(volumes.Items), "volume"),
	}, ", ")
}
