package install

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// record is what Install made, so that Uninstall removes just that. It is written before anything is made, in the home itself, which
// is there; once all is, it moves to lib.
type record struct {
	Files []string
	Dirs  []string // those that were not there before, each after the one that it is in
}

func (o Options) unsettled() string { return filepath.Join(o.Home, ".berth-install.json") }
func (o Options) settled() string   { return filepath.Join(o.lib(), "install.json") }

// scratch is a runtime folder for systemd-analyze, which makes another in it and cannot do without. It is there during an Install only.
func (o Options) scratch() string { return filepath.Join(o.lib(), "verify.tmp") }

// load is the record of the last Install, empty if there is none.
func (o Options) load() (r record, _ error) {
	for _, name := range []string{o.unsettled(), o.settled()} {
		data, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = json.Unmarshal(data, &r)
		}
		if err != nil {
			return r, fmt.Errorf("what `berth install` made: %s: %w", name, err)
		}
		return r, nil
	}
	return r, nil
}

func (o Options) save(r record) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return replace(o.unsettled(), append(data, '\n'), 0o600)
}

// with is r with more files, and the folders that are to be made for them.
func (r record) with(files []string) record {
	r.Files, r.Dirs = slices.Clone(r.Files), slices.Clone(r.Dirs)
	for _, file := range files {
		if !slices.Contains(r.Files, file) {
			r.Files = append(r.Files, file)
		}
		var missing []string
		for dir := filepath.Dir(file); !exists(dir); dir = filepath.Dir(dir) {
			missing = append(missing, dir)
		}
		for _, dir := range slices.Backward(missing) {
			if !slices.Contains(r.Dirs, dir) {
				r.Dirs = append(r.Dirs, dir)
			}
		}
	}
	return r
}

// keep removes what the record has beside files, and the folders that are empty then, and settles the record of the rest.
func (o Options) keep(r record, files []string) error {
	gone := []string{o.unsettled() + halfway}
	for _, file := range r.Files {
		if !slices.Contains(files, file) {
			gone = append(gone, file, file+halfway)
		}
	}
	if len(files) == 0 {
		gone = append(gone, o.settled())
	}
	for _, name := range gone {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := os.RemoveAll(o.scratch()); err != nil {
		return err
	}
	var dirs []string
	for _, dir := range slices.Backward(r.Dirs) {
		err := os.Remove(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			if !errors.Is(err, syscall.ENOTEMPTY) {
				return err
			}
			dirs = append(dirs, dir)
		}
	}
	slices.Reverse(dirs)
	if len(files) == 0 {
		if err := os.Remove(o.unsettled()); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	if err := o.save(record{Files: files, Dirs: dirs}); err != nil {
		return err
	}
	return os.Rename(o.unsettled(), o.settled())
}

// halfway is added to the name of a file that is not all written yet, by tree.CopyFile, too. As it is known, a leftover is found.
const halfway = ".tmp"

func replace(name string, data []byte, mode fs.FileMode) error {
	if err := os.WriteFile(name+halfway, data, mode); err != nil {
		return err
	}
	return os.Rename(name+halfway, name)
}
