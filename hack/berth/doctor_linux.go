package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/moby/moby/client"
	"github.com/spf13/cobra"

	"berth/hack/doctor"
	"berth/hack/stack"
)

// lookFlags adds the flags that say whose daemon is meant, and returns what looks at it and at the host.
func lookFlags(cmd *cobra.Command) func() (*doctor.Host, error) {
	name := nameFlag(cmd.Flags())
	rootful := cmd.Flags().Bool("rootful", false, "of the system's Docker, which runs as root")
	cmd.MarkFlagsMutuallyExclusive("name", "rootful")
	return func() (*doctor.Host, error) {
		c, rootlessKit, err := daemonOf(*name, *rootful)
		if err != nil {
			return nil, err
		}
		defer c.Close()
		return doctor.Look(doctor.AskDaemon(cmd.Context(), c, rootlessKit), *rootful)
	}
}

// withReasons returns err, and before that says what this machine lacks for a user's Docker, which may be why.
func withReasons(cmd *cobra.Command, err error, uid int, ignore ...string) error {
	if err == nil || cmd.Context().Err() != nil {
		return err
	}
	if r, failed := doctor.Preconditions(uid, ignore...); failed == nil && len(r.Findings) > 0 {
		fmt.Fprintln(cmd.ErrOrStderr(), "`berth doctor` says of this machine:")
		_ = r.Print(cmd.ErrOrStderr(), false)
	}
	return err
}

// daemonOf is the system's daemon, the stack's where there is one, or the user's own.
func daemonOf(name string, rootful bool) (_ *client.Client, rootlessKit string, _ error) {
	if rootful {
		c, err := client.New(client.WithHost("unix:///var/run/docker.sock"))
		return c, "", err
	}
	s, err := stack.At(name)
	if err == nil && s.Exists() || name != "" {
		if err != nil {
			return nil, "", err
		}
		c, err := s.Client()
		return c, s.RootlessKitSocket(), err
	}
	dir := os.Getenv("XDG_RUNTIME_DIR")
	c, err := client.New(client.WithHost("unix://" + filepath.Join(dir, "docker.sock")))
	return c, filepath.Join(dir, "dockerd-rootless", "api.sock"), err
}
