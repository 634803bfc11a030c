// Package tree makes the source trees that Berth builds from, below build/tree: the base as it was published (stock), the
// same with the patch laid over it (berth), and modules that need a go.mod to be built at all.
package tree

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/dirhash"

	"berth/hack/pins"
)

// PatchDir is the patch's folder, here as upstream. Nothing else of the base is touched.
const PatchDir = "daemon/libnetwork/portmappers/nat"

// Module is the folder of pin's module in the Go module cache, read-only; the module is downloaded if need be. Nothing is
// made of a module whose hash is not the one that vendor.conf or go.sum has.
func Module(ctx context.Context, root string, pin pins.Pin) (string, error) {
	want, err := Sum(root, pin)
	if err != nil {
		return "", err
	}
	dir, sum, err := Download(ctx, root, pin)
	if err == nil && sum != want {
		return "", fmt.Errorf("%s@%s is not what it was: its hash is %s, it should be %s", pin.Module, pin.Version, sum, want)
	}
	return dir, err
}

// Download is the folder of pin's module, and its hash, which is held against nothing but what go.sum says of it, if anything.
func Download(ctx context.Context, root string, pin pins.Pin) (dir, sum string, _ error) {
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", pin.Module+"@"+pin.Version)
	cmd.Dir = root // so that root's go.sum is held against what it lists
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=-mod=readonly")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var m struct{ Dir, Sum, Error string }
	_ = json.Unmarshal(stdout.Bytes(), &m) // nothing is printed when the command itself fails: then its stderr says why
	if err != nil {
		return "", "", fmt.Errorf("download %s@%s: %w: %s", pin.Module, pin.Version, err, strings.TrimSpace(m.Error+stderr.String()))
	}
	return m.Dir, m.Sum, nil
}

// Sum is the hash that pin's module must have.
func Sum(root string, pin pins.Pin) (string, error) {
	if pin.Sum != "" {
		return pin.Sum, nil
	}
	data, err := os.ReadFile(filepath.Join(root, "go.sum"))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == pin.Module && f[1] == pin.Version {
			return f[2], nil
		}
	}
	return "", fmt.Errorf("nothing says what %s@%s must be: add its h1= to vendor.conf (`go mod download -json` prints it)", pin.Module, pin.Version)
}

// Stock makes build/tree/<version>/stock of the base's module folder and returns its path.
func Stock(root string, base pins.Pin, module string) (string, error) {
	files, err := list(module)
	if err != nil {
		return "", err
	}
	return write(filepath.Join(root, "build", "tree", base.Version, "stock"), files)
}

// Berth makes build/tree/<version>/berth of the base's module folder and the patch, and returns its path. The patch's files
// replace upstream's of the same name; upstream's others (its tests) stay.
func Berth(root string, base pins.Pin, module string) (string, error) {
	files, err := list(module)
	if err != nil {
		return "", err
	}
	patch, err := Patch(root)
	if err != nil {
		return "", err
	}
	maps.Copy(files, patch)
	return write(filepath.Join(root, "build", "tree", base.Version, "berth"), files)
}

// Patch lists the patch's files: where each goes in the base's tree, and where it is.
func Patch(root string) (map[string]string, error) {
	found, err := list(filepath.Join(root, PatchDir))
	if err != nil {
		return nil, err
	}
	files := map[string]string{}
	for rel, src := range found {
		if !strings.HasPrefix(filepath.Base(rel), ".") { // an editor's
			files[filepath.Join(PatchDir, rel)] = src
		}
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s: no files: the patch is missing", filepath.Join(root, PatchDir))
	}
	return files, nil
}

// NATHash is the hash of the package that the patch replaces, in the base's folder: of what is compiled, not of its tests.
func NATHash(module string) (string, error) {
	files, err := list(filepath.Join(module, PatchDir))
	if err != nil {
		return "", err
	}
	maps.DeleteFunc(files, func(rel, _ string) bool { return strings.HasSuffix(rel, "_test.go") })
	return dirhash.Hash1(slices.Collect(maps.Keys(files)), func(rel string) (io.ReadCloser, error) { return os.Open(files[rel]) })
}

// Diff shows how folder of the base's folder module differs from that of the base's folder was; "" if it doesn't.
func Diff(ctx context.Context, was, module, folder string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", "diff", "--no-index", "--no-color", "--no-ext-diff", filepath.Join(was, folder), filepath.Join(module, folder))
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 1 && stderr.Len() == 0) { // 1: they differ
		return "", fmt.Errorf("compare %s: %w: %s", folder, err, strings.TrimSpace(stderr.String()))
	}
	return strings.NewReplacer(was, "", module, "").Replace(string(out)), nil
}

// Vendored makes build/tree/<name>/<version> of the folder of a module that keeps its go.mod as vendor.mod, as docker's older
// repositories do. The vendor folder, of which a module archive has the list only, is left out.
func Vendored(root string, pin pins.Pin, module string) (string, error) {
	found, err := list(module)
	if err != nil {
		return "", err
	}
	files := map[string]string{}
	for rel, src := range found {
		switch {
		case rel == "vendor.mod":
			rel = "go.mod"
		case rel == "vendor.sum":
			rel = "go.sum"
		case strings.HasPrefix(rel, "vendor/"):
			continue
		}
		files[rel] = src
	}
	return write(filepath.Join(root, "build", "tree", pin.Name, pin.Version), files)
}

// list maps the path of every file below dir, relative to it, to its full path.
func list(dir string) (map[string]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		files[rel] = path
		return err
	})
	return files, err
}

// write makes dst hold copies of files (path in dst to source) and nothing else, and returns dst. What is already right is not
// touched, so that doing it again costs little, and so that a copy that was interrupted or edited is put right.
func write(dst string, files map[string]string) (string, error) {
	dirs := map[string]bool{".": true}
	for rel := range files {
		for dir := filepath.Dir(rel); !dirs[dir]; dir = filepath.Dir(dir) {
			dirs[dir] = true
		}
	}
	if err := os.MkdirAll(dst, 0o755); err != nil {
		return "", err
	}
	if err := filepath.WalkDir(dst, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dst, path)
		if err != nil || d.IsDir() && dirs[rel] || d.Type().IsRegular() && files[rel] != "" {
			return err
		}
		if err := os.RemoveAll(path); err != nil || !d.IsDir() {
			return err
		}
		return fs.SkipDir
	}); err != nil {
		return "", err
	}
	for rel, src := range files {
		if err := CopyFile(filepath.Join(dst, rel), src, 0o644); err != nil {
			return "", err
		}
	}
	return dst, nil
}

// CopyFile makes dst a copy of src with the mode given. A copy that is right already is not touched; else dst is replaced in one
// step, never seen half written.
func CopyFile(dst, src string, mode fs.FileMode) error {
	want, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	if info, err := os.Stat(dst); err == nil && info.Mode().Perm() == mode && info.Size() == int64(len(want)) {
		if have, err := os.ReadFile(dst); err == nil && bytes.Equal(have, want) {
			return nil
		}
	}
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	tmp := dst + ".tmp"
	if err := os.WriteFile(tmp, want, mode); err != nil {
		return err
	}
	if err := os.Chmod(tmp, mode); err != nil { // whatever the umask, and the mode of a leftover of this name
		return err
	}
	return os.Rename(tmp, dst)
}
