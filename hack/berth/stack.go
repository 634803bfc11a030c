//go:build linux

package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"berth/hack/checkout"
	"berth/hack/stack"
)

// nameFlag adds the flag that says which stack a command is about.
func nameFlag(flags *pflag.FlagSet) *string {
	name := new(string)
	flags.Func("name", "the stack of that `NAME`, where there are several", func(v string) error {
		*name = v
		return stack.CheckName(v)
	})
	return name
}

// driverFlags adds the flags that say how RootlessKit connects a stack to the host.
func driverFlags(flags *pflag.FlagSet, o *stack.Options) {
	flags.StringVar(&o.Net, "net", stack.DefaultNet, "RootlessKit's network `DRIVER`")
	flags.StringVar(&o.PortDriver, "port-driver", stack.DefaultPortDriver, "RootlessKit's port `DRIVER`")
	flags.BoolFunc("detach-netns", "leave dockerd's process in the host's network namespace (default true)", func(v string) error {
		detach, err := strconv.ParseBool(v)
		o.NoDetachNetns = !detach
		return err
	})
}

// at is the place of the stack with that name, and what its options have from where this command is.
func at(cmd *cobra.Command, name string) (*stack.Stack, stack.Options, error) {
	root, err := checkout.Root()
	if err != nil {
		return nil, stack.Options{}, err
	}
	s, err := stack.At(name)
	if err != nil {
		return nil, stack.Options{}, err
	}
	log := "stack.log"
	if name != "" {
		log = "stack-" + name + ".log"
	}
	return s, stack.Options{
		Checkout: root,
		Bin:      checkout.Bin(root),
		Log:      checkout.Log(root, log),
		Env:      proxies(os.Environ()),
		Progress: cmd.ErrOrStderr(),
	}, nil
}

// proxies has those variables of an environment that dockerd reaches registries by.
func proxies(environ []string) (list []string) {
	for _, v := range environ {
		name, _, _ := strings.Cut(v, "=")
		switch strings.ToUpper(name) {
		case "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY":
			list = append(list, v)
		}
	}
	return list
}

// withName is the command line's way to say which stack.
func withName(command, name string) string {
	if name != "" {
		command += " --name " + name
	}
	return command
}

// plural is "1 image" or "2 images".
func plural(n int, one string) string {
	if n != 1 {
		one += "s"
	}
	return fmt.Sprintf("%d %s", n, one)
}
