package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"berth/hack/build"
	"berth/hack/checkout"
	"berth/hack/pins"
)

// commands are those of this system: Linux has all.
func commands() []*cobra.Command {
	return []*cobra.Command{
		newBuildCommand(),
		newPatchCommand(),
		newRebaseCommand(),
		newUpCommand(),
		newDownCommand(),
		newRestartCommand(),
		newStatusCommand(),
		newLogsCommand(),
		newEnvCommand(),
		newStressCommand(),
		newDoctorCommand(),
		newInstallCommand(),
		newUninstallCommand(),
		newManCommand(),
	}
}

// ownVersion is that of the daemon that is beside this command, or is built by it.
func ownVersion(ctx context.Context) (string, error) {
	if exe, err := os.Executable(); err == nil {
		if exe, err = filepath.EvalSymlinks(exe); err == nil {
			if v, err := build.Version(ctx, filepath.Join(filepath.Dir(exe), "dockerd")); err == nil {
				return v, nil
			}
		}
	}
	root, err := checkout.Root()
	if err != nil {
		return "", err
	}
	list, err := pins.Load(filepath.Join(root, "vendor.conf"))
	if err != nil {
		return "", err
	}
	base, err := pins.Base(list, "")
	return fmt.Sprintf("%s+berth.%d", base.Release, base.Patch), err
}
