package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"berth/hack/doctor"
)

// commands are those of this system: the rest of Berth is about Linux.
func commands() []*cobra.Command { return []*cobra.Command{newDoctorCommand()} }

func ownVersion(context.Context) (string, error) { return "", errors.New("not known on Windows") }

func lookFlags(cmd *cobra.Command) func() (*doctor.Host, error) {
	return func() (*doctor.Host, error) { return doctor.Look(cmd.Context()), nil }
}
