// Package checkout knows where things are in Berth's checkout.
package checkout

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/mod/modfile"
)

// module is in the go.mod that makes a folder the checkout.
const module = "berth"

// Root is the checkout that the running program lies in, as build/bin/berth does, else the one that the working
// directory lies in.
func Root() (string, error) {
	if exe, err := os.Executable(); err == nil {
		if root, ok := above(filepath.Dir(exe)); ok {
			return root, nil
		}
	}
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	if root, ok := above(wd); ok {
		return root, nil
	}
	return "", fmt.Errorf("no go.mod of module %s in %s or above: run this inside Berth's checkout", module, wd)
}

// above is the nearest checkout from dir upwards.
func above(dir string) (root string, ok bool) {
	for {
		if data, err := os.ReadFile(filepath.Join(dir, "go.mod")); err == nil && modfile.ModulePath(data) == module {
			return dir, true
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", false
		}
		dir = parent
	}
}

// Bin is the folder of the built programs, or one of them.
func Bin(root string, program ...string) string { return in(root, "bin", program) }

// Log is the folder of what programs said, or one file of it.
func Log(root string, file ...string) string { return in(root, "log", file) }

// Results is the folder of what tests and benchmarks saw, or one file of it.
func Results(root string, file ...string) string { return in(root, "results", file) }

func in(root, folder string, rest []string) string {
	return filepath.Join(append([]string{root, "build", folder}, rest...)...)
}
