//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"berth/hack/build"
	"berth/hack/checkout"
	"berth/hack/install"
	"berth/hack/stack"
)

// report is what `berth status --json` prints.
type report struct {
	stack.Status
	Patched bool  `json:"patched"` // the dockerd that is up
	Built   built `json:"built"`
	// Differs tells whether a restart would take another dockerd than the one that is up.
	Differs bool `json:"differs"`
	// Installed is about the user's own Docker; nil for root, who has no rootless one.
	Installed *install.State `json:"installed,omitempty"`
}

// built is the dockerd that a restart would take.
type built struct {
	Path    string `json:"path"`
	Version string `json:"version,omitempty"` // "": it is not there
	SHA256  string `json:"sha256,omitempty"`
}

func newStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Tell what is up, and what it has",
		Long: `Tell whether the stack is up, as whom, with which daemon, and whether another one was built
since; how it is connected to the host; and what its containers publish. That a stack is not up is
no error. Then, whether the patched daemon is installed for your own rootless Docker ("berth install"),
and which one that runs.`,
		Example: `  berth status
  berth status --json`,
		Args: noArguments,
	}
	name := nameFlag(cmd.Flags())
	asJSON := cmd.Flags().Bool("json", false, "print all of it as JSON")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		installed, err := installed(cmd)
		if err != nil {
			return err
		}
		s, o, err := at(cmd, *name)
		if err != nil {
			if installed == nil || *name != "" {
				return err
			}
			// From a package: there is no checkout, and so no stack of this command's.
			if *asJSON {
				return writeJSON(cmd.OutOrStdout(), report{Installed: installed})
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			defer w.Flush()
			printInstalled(w, installed)
			return nil
		}
		status, err := s.Status(cmd.Context())
		if err != nil {
			return err
		}
		r := report{Status: status, Built: built{Path: status.Options.Dockerd}, Installed: installed}
		if r.Built.Path == "" {
			r.Built.Path = checkout.Bin(o.Checkout, "dockerd")
		}
		if r.Built.SHA256, err = stack.Sum(r.Built.Path); err == nil {
			r.Built.Version, _ = build.Version(cmd.Context(), r.Built.Path)
		}
		if d := status.Dockerd; d != nil {
			r.Patched = strings.Contains(d.Version, "+berth.")
			r.Differs = d.SHA256 != r.Built.SHA256
		}
		if *asJSON {
			return writeJSON(cmd.OutOrStdout(), r)
		}
		r.print(cmd.OutOrStdout(), *name)
		return nil
	}
	return cmd
}

func (r report) print(out io.Writer, name string) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	line := func(what, format string, args ...any) { fmt.Fprintf(w, what+"\t"+format+"\n", args...) }
	d := r.Dockerd
	switch {
	case !r.Exists:
		line("stack", "none: `%s` starts one", withName("berth up", name))
	case d == nil && len(r.Processes) > 0:
		line("stack", "its daemon does not answer, but these processes run: %v; `%s` starts it again", r.Processes, withName("berth restart", name))
	case d == nil:
		line("stack", "down: `%s` starts it again", withName("berth up", name))
	default:
		line("stack", "up")
	}
	line("user", "%s", r.User)
	if r.Exists {
		line("files", "%s", r.Dir)
		line("checkout", "%s", r.Options.Checkout)
	}
	if d != nil {
		kind := "stock"
		if r.Patched {
			kind = "patched"
		}
		line("dockerd", "%s, %s, process %d, a copy of the program at %s", d.Version, kind, d.PID, d.Path)
	}
	switch b := r.Built; {
	case b.Version == "":
		line("program", "%s is not there: `berth build` makes it", b.Path)
	case d == nil:
		line("program", "%s, %s", b.Path, b.Version)
	case r.Differs:
		line("program", "%s has changed since, it is %s: `%s` takes it", b.Path, b.Version, withName("berth restart", name))
	default:
		line("program", "%s, unchanged since", b.Path)
	}
	if d != nil {
		line("network", "%s, port driver %s", r.Options.Net, r.Options.PortDriver)
		line("view", "%s", r.view())
		line("docker", "%s", d.Host)
		line("RootlessKit", "%s", d.API)
	}
	line("cgroups", "%s", r.Cgroups)
	if r.Exists {
		line("log", "%s", r.Options.Log)
	}
	if d != nil {
		line("containers", "%d", len(r.Has))
	}
	for _, c := range r.Has {
		line("", "%s, %s %s", c.Name, c.State, strings.Join(c.Ports, " "))
	}
	if r.Installed != nil {
		printInstalled(w, r.Installed)
	}
}

// view tells whether dockerd sees which of the host's ports are free, and why not.
func (r report) view() string {
	switch {
	case !r.Dockerd.View:
		return "no: dockerd's process is in RootlessKit's network namespace (--detach-netns=false)"
	case !r.Patched:
		return "no: stock does not look, though its process is on the host"
	}
	return "yes: it looks which of the host's ports are free"
}

func newLogsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "logs",
		Short: "Print the stack's log",
		Example: `  berth logs
  berth logs -f`,
		Args: noArguments,
	}
	name := nameFlag(cmd.Flags())
	follow := cmd.Flags().BoolP("follow", "f", false, "go on until Ctrl-C")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		s, o, err := at(cmd, *name)
		if err != nil {
			return err
		}
		status, err := s.Status(cmd.Context())
		if err != nil {
			return err
		}
		if status.Options.Log != "" { // another checkout's, perhaps
			o.Log = status.Options.Log
		}
		args := []string{"-n", "+1", o.Log}
		if *follow {
			args = append([]string{"-F"}, args...)
		}
		tail := exec.CommandContext(cmd.Context(), "tail", args...)
		tail.Stdout, tail.Stderr = cmd.OutOrStdout(), cmd.ErrOrStderr()
		if err := tail.Run(); err != nil && !errors.Is(cmd.Context().Err(), context.Canceled) {
			return fmt.Errorf("print %s: %w", o.Log, err)
		}
		return nil
	}
	return cmd
}
