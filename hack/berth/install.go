//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"berth/hack/install"
)

func newInstallCommand() *cobra.Command {
	var o install.Options
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Have your rootless Docker run the patched daemon",
		Long: `Copy the patched dockerd that is beside this command to ~/.local/lib/berth, and point your
systemd user unit docker.service to it with a drop-in, docker.service.d/berth.conf. Run it
as the user whose rootless Docker it is. Docker itself, its images and its containers are not
touched, and nothing is restarted: what to restart is printed. Where Docker is not
started by systemd, the variables to set are.

It refuses to mix major versions: the installed Docker must be of the line that the patched
dockerd is made from. Done again, it updates. "berth uninstall" goes back.`,
		Example: `  berth install --dry-run
  berth install`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := complete(cmd, &o); err != nil {
				return err
			}
			return withReasons(cmd, install.Install(cmd.Context(), o), os.Getuid())
		},
	}
	cmd.Flags().BoolVar(&o.Force, "force", false, "whatever version the installed Docker is, if there is one")
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "print what would be done, and do nothing")
	return cmd
}

func newUninstallCommand() *cobra.Command {
	var o install.Options
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Have your rootless Docker run its own daemon again",
		Long: `Remove what "berth install" made, and nothing else, also after one that was interrupted.
What to restart is printed.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := complete(cmd, &o); err != nil {
				return err
			}
			return install.Uninstall(cmd.Context(), o)
		},
	}
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "print what would be done, and do nothing")
	return cmd
}

// installed tells about the user's own Docker; nil for root, who has no rootless one.
func installed(cmd *cobra.Command) (*install.State, error) {
	if os.Getuid() == 0 {
		return nil, nil
	}
	var o install.Options
	if err := complete(cmd, &o); err != nil {
		return nil, err
	}
	s, err := install.Installed(cmd.Context(), o)
	return &s, err
}

func printInstalled(w io.Writer, s *install.State) {
	switch {
	case s.Half:
		fmt.Fprintln(w, "installed\thalf: `berth install` or `berth uninstall` was interrupted, run it again")
	case s.Dockerd == "":
		fmt.Fprintln(w, "installed\tno: `berth install` has your rootless Docker run the patched daemon")
	case s.Unit:
		fmt.Fprintf(w, "installed\t%s, for your docker.service\n", s.Version)
	default:
		fmt.Fprintf(w, "installed\t%s, for where DOCKERD is set to %s\n", s.Version, s.Dockerd)
	}
	switch {
	case s.Running == "":
		fmt.Fprintln(w, "your Docker\tnot up")
	case s.Version != "" && s.Running != s.Version:
		fmt.Fprintf(w, "your Docker\t%s is up: restart it to run the installed one\n", s.Running)
	default:
		fmt.Fprintf(w, "your Docker\t%s is up\n", s.Running)
	}
}

// complete adds who runs the command, and from where.
func complete(cmd *cobra.Command, o *install.Options) error {
	if os.Getuid() == 0 {
		return errors.New("this is for the user whose rootless Docker it is, not for root")
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	if exe, err = filepath.EvalSymlinks(exe); err != nil { // a package may link it
		return err
	}
	o.From, o.Out = filepath.Dir(exe), cmd.OutOrStdout()
	if o.Home, err = os.UserHomeDir(); err != nil {
		return err
	}
	o.Config, err = os.UserConfigDir()
	return err
}
