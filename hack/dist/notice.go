package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// compiled lists the folder of every package of a program, with its module and that one's folder. The standard library has none.
const compiled = `{{if .Standard}}{{else}}{{with .Module}}{{.Path}}	{{.Version}}	{{.Dir}}{{end}}	{{.Dir}}{{end}}`

var licenceFile = regexp.MustCompile(`(?i)^(licen[cs]e|copying|notice|patents|copyright)([.-].*)?$`)

// notice writes the licences of all that is compiled into the programs, each once, with what it is the licence of.
func (r release) notice(ctx context.Context, file, arch string) error {
	files := map[string]map[string]bool{} // the modules by the file's text
	none := map[string]bool{}             // modules without any
	add := func(module, file string) error {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		t := strings.TrimSpace(string(text)) + "\n"
		if files[t] == nil {
			files[t] = map[string]bool{}
		}
		files[t][module] = true
		none[module] = false
		return nil
	}

	goroot, err := output(ctx, r.root, "go", "env", "GOROOT", "GOVERSION")
	if err != nil {
		return err
	}
	dir, version, _ := strings.Cut(strings.TrimSpace(goroot), "\n")
	if err := add("Go "+version, filepath.Join(dir, "LICENSE")); err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, in := range []struct{ dir, packages string }{
		{r.root, "./hack/berth"},
		{filepath.Join(r.root, "build", "tree", r.base.Version, "berth"), strings.Join(r.base.Packages, " ")},
	} {
		list, err := output(ctx, in.dir, "env", append(append(goEnv(arch), "go", "list", "-deps", "-f", compiled), strings.Fields(in.packages)...)...)
		if err != nil {
			return err
		}
		for line := range strings.Lines(list) {
			f := strings.Split(strings.TrimSpace(line), "\t")
			if len(f) != 4 || f[0] == "berth" { // berth's own is beside this
				continue
			}
			module := f[0] + " " + f[1]
			if f[1] == "" { // the base, which is what its tree is made of
				module = r.base.Module + " " + r.base.Version
			}
			if _, ok := none[module]; !ok {
				none[module] = true
			}
			for dir := f[3]; !seen[dir] && len(dir) >= len(f[2]); dir = filepath.Dir(dir) {
				seen[dir] = true
				entries, err := os.ReadDir(dir)
				if err != nil {
					return err
				}
				for _, e := range entries {
					if e.Type().IsRegular() && licenceFile.MatchString(e.Name()) && filepath.Ext(e.Name()) != ".go" {
						if err := add(module, filepath.Join(dir, e.Name())); err != nil {
							return err
						}
					}
				}
			}
		}
	}
	if len(none) < 10 {
		return errors.New("the modules were not found")
	}

	var b strings.Builder
	fmt.Fprintf(&b, "Berth %s is licensed under the Apache License 2.0, see LICENSE. Compiled into its programs are the modules below,\neach under the terms that follow it.\n", r.Version)
	var without []string
	for _, module := range slices.Sorted(maps.Keys(none)) {
		if none[module] {
			without = append(without, module)
		}
	}
	if len(without) > 0 {
		fmt.Fprintf(&b, "\nNo licence file comes with these: see where their sources are published.\n  %s\n", strings.Join(without, "\n  "))
	}
	texts := map[string]string{}
	for text, modules := range files {
		texts[strings.Join(slices.Sorted(maps.Keys(modules)), "\n  ")+"\n\n"+text] = text
	}
	for _, text := range slices.Sorted(maps.Keys(texts)) {
		fmt.Fprintf(&b, "\n%s\n  %s", strings.Repeat("-", 80), text)
	}
	return os.WriteFile(file, []byte(b.String()), 0o644)
}
