package main

import (
	"fmt"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"berth/hack/doctor"
)

func newDoctorCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor [PORT[/PROTO] | FIRST-LAST | ADDR:PORT | compose.yaml]...",
		Short: "Say whether ports can be published here, and if not why and what to do",
		Long: `Say, before anything is started, whether your Docker could publish these ports here: that of
"berth up" if there is one, else your own. 0 is any port. Without arguments: whether this machine
has what your Docker needs. It changes nothing and needs no root; what root would have to
do is printed as one block.

Exit status: 0 fine, 1 something would fail, 2 used wrongly.`,
		Example: `  berth doctor
  berth doctor 8080 53/udp 20000-20040 127.0.0.1:5432
  berth doctor compose.yaml
  berth doctor --json 80`,
	}
	asJSON := cmd.Flags().Bool("json", false, "print it as JSON")
	list := cmd.Flags().Bool("list", false, "list the checks")
	ignore := cmd.Flags().StringArray("ignore", nil, "leave out the check of that `NAME`")
	look := lookFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		out := cmd.OutOrStdout()
		checks, err := doctor.Find(*ignore)
		if err != nil {
			return misuse(cmd, err)
		}
		if *list {
			w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
			for _, c := range checks {
				fmt.Fprintf(w, "%s\t%s\n", c.Name, c.Looks)
			}
			return w.Flush()
		}
		var asks []doctor.Ask
		for _, arg := range args {
			if ext := filepath.Ext(arg); ext == ".yaml" || ext == ".yml" {
				more, err := doctor.FromCompose(cmd.Context(), arg)
				if err != nil {
					return misuse(cmd, err)
				}
				asks = append(asks, more...)
				continue
			}
			a, err := doctor.ParseAsk(arg)
			if err != nil {
				return misuse(cmd, err)
			}
			asks = append(asks, a)
		}
		if len(args) > 0 && len(asks) == 0 {
			fmt.Fprintln(cmd.ErrOrStderr(), "nothing in there is published")
			return nil
		}
		h, err := look()
		if err != nil {
			return err
		}
		r := doctor.Examine(h, checks, asks)
		if *asJSON {
			err = writeJSON(out, r)
		} else {
			err = r.Print(out, out == os.Stdout && isatty.IsTerminal(os.Stdout.Fd()) && os.Getenv("NO_COLOR") == "")
		}
		if err == nil && r.Failed() {
			err = errWouldFail
		}
		return err
	}
	return cmd
}
