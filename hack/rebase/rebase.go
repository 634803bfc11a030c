// Package rebase takes a newer version of upstream for the default base: it says what has changed there, tries it in a copy of the
// checkout, and only when all holds changes the checkout itself.
package rebase

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/mod/semver"

	"berth/hack/pins"
	"berth/hack/tree"
)

// watched are the folders that the patch replaces or stands on. A file of the callers counts if it speaks of port mappers.
var (
	watched = []string{
		tree.PatchDir,
		"daemon/libnetwork/portmapperapi",
		"daemon/libnetwork/portallocator",
		"daemon/libnetwork/internal/rlkclient",
	}
	callers   = "daemon/libnetwork/drivers/bridge"
	isCalling = regexp.MustCompile(`portmapperapi|PortMapper`)
)

// Rebase is one try.
type Rebase struct {
	Root    string
	Version string
	Release string // the product's number of that version; "" asks the version's own releases/versions.yaml
	Force   bool   // go on when the nat package has changed
	DryRun  bool   // leave the checkout as it is, even when all holds
	Out     io.Writer
}

// Run says what changed upstream, and tries the version. It fails if that does not work: then the checkout is as it was, and the copy
// that was tried is in build/rebase.
func (r Rebase) Run(ctx context.Context) error {
	list, err := pins.Load(filepath.Join(r.Root, "vendor.conf"))
	if err != nil {
		return err
	}
	old, err := pins.Base(list, "")
	if err != nil {
		return err
	}
	if !semver.IsValid(r.Version) || semver.Compare(r.Version, old.Version) <= 0 {
		return fmt.Errorf("want a version of %s that is newer than %s, got %q", old.Module, old.Version, r.Version)
	}
	was, err := tree.Module(ctx, r.Root, old)
	if err != nil {
		return err
	}
	fmt.Fprintf(r.Out, "downloading %s\n", r.Version)
	module, _, err := tree.Download(ctx, r.Root, pins.Pin{Module: old.Module, Version: r.Version})
	if err != nil {
		return err
	}
	return r.from(ctx, old, was, module, r.try)
}

// from goes from the base old, in the folder was, to the module in that folder, if check is content with the checkout that has it.
func (r Rebase) from(ctx context.Context, old pins.Pin, was, module string, check func(ctx context.Context, dir string, base pins.Pin) error) error {
	if err := r.changes(ctx, old.Version, was, module); err != nil {
		return err
	}
	nat, err := tree.NATHash(module)
	if err != nil {
		return err
	}
	if nat != old.NAT && !r.Force {
		diff, err := tree.Diff(ctx, was, module, tree.PatchDir)
		return errors.Join(fmt.Errorf("%s has changed: put into the patch what is new there, and go on with --force:\n%s", tree.PatchDir, diff), err)
	}
	release := r.Release
	if release == "" {
		if release, err = releaseOf(module); err != nil {
			return err
		}
	}
	oldSum, err := tree.Sum(r.Root, old)
	if err != nil {
		return err
	}
	conf, err := os.ReadFile(filepath.Join(r.Root, "vendor.conf"))
	if err != nil {
		return err
	}
	text, err := rewrite(string(conf), old, oldSum, r.Version, release, nat)
	if err != nil {
		return err
	}
	dir := filepath.Join(r.Root, "build", "rebase", r.Version)
	if err := copyCheckout(r.Root, dir); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "vendor.conf"), []byte(text), 0o644); err != nil {
		return err
	}
	if err := check(ctx, dir, old); err != nil {
		if ctx.Err() != nil {
			return errors.New("stopped: nothing was changed")
		}
		return fmt.Errorf("%w\n%s does not work: %s is the last base that did, and stays; what was tried is in %s", err, r.Version, old.Version, dir)
	}
	if r.DryRun {
		fmt.Fprintf(r.Out, "%s works; nothing was changed\n", r.Version)
		return os.RemoveAll(dir)
	}
	for _, name := range []string{"go.mod", "go.sum", "vendor.conf"} {
		if err := tree.CopyFile(filepath.Join(r.Root, name), filepath.Join(dir, name), 0o644); err != nil {
			return err
		}
	}
	fmt.Fprintf(r.Out, "%s works, and is the base now: see `git diff`, run `make test` and `make bases`, and commit\n", r.Version)
	return os.RemoveAll(dir)
}

// changes prints which of the watched files have changed, and keeps how in a file.
func (r Rebase) changes(ctx context.Context, oldVersion, was, module string) (retErr error) {
	tmp, err := os.MkdirTemp("", "berth-rebase-")
	if err != nil {
		return err
	}
	defer func() { retErr = errors.Join(retErr, os.RemoveAll(tmp)) }()
	a, b := filepath.Join(tmp, oldVersion), filepath.Join(tmp, r.Version)
	for dst, src := range map[string]string{a: was, b: module} {
		if err := takeWatched(dst, src); err != nil {
			return err
		}
	}
	diff, err := tree.Diff(ctx, a, b, "")
	if err != nil {
		return err
	}
	fmt.Fprintf(r.Out, "between %s and %s, of what the patch replaces, stands on or is called by:\n", oldVersion, r.Version)
	for _, folder := range append(watched, callers) {
		added, removed := countLines(diff, folder)
		if added+removed == 0 {
			fmt.Fprintf(r.Out, "  %-42s unchanged\n", folder)
		} else {
			fmt.Fprintf(r.Out, "  %-42s %d lines added, %d removed\n", folder, added, removed)
		}
	}
	if diff == "" {
		return nil
	}
	name := filepath.Join(r.Root, "build", "rebase", r.Version+".diff")
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	fmt.Fprintf(r.Out, "how: %s\n", name)
	return os.WriteFile(name, []byte(diff), 0o644)
}

// takeWatched copies the watched files, without tests, from the base's folder to dst.
func takeWatched(dst, module string) error {
	if err := os.MkdirAll(dst, 0o755); err != nil {
		return err
	}
	for _, folder := range append(watched, callers) {
		entries, err := os.ReadDir(filepath.Join(module, folder))
		if errors.Is(err, os.ErrNotExist) {
			continue // gone, or not there yet: all its lines are removed, or added
		}
		if err != nil {
			return err
		}
		for _, entry := range entries {
			if name := entry.Name(); !entry.Type().IsRegular() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
				continue
			}
			from := filepath.Join(module, folder, entry.Name())
			if folder == callers {
				data, err := os.ReadFile(from)
				if err != nil {
					return err
				}
				if !isCalling.Match(data) {
					continue
				}
			}
			if err := tree.CopyFile(filepath.Join(dst, folder, entry.Name()), from, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// countLines counts what a diff says of the files in folder.
func countLines(diff, folder string) (added, removed int) {
	in := false
	for line := range strings.Lines(diff) {
		switch {
		case strings.HasPrefix(line, "diff --git "):
			in = strings.Contains(line, "/"+folder+"/")
		case !in, strings.HasPrefix(line, "+++ "), strings.HasPrefix(line, "--- "):
		case strings.HasPrefix(line, "+"):
			added++
		case strings.HasPrefix(line, "-"):
			removed++
		}
	}
	return added, removed
}

var lastRelease = regexp.MustCompile(`(?m)^\s*(?:last|current):\s*"([0-9][^"]*)"`)

// releaseOf is the newest release that the version's own list has come out.
func releaseOf(module string) (string, error) {
	data, err := os.ReadFile(filepath.Join(module, "releases", "versions.yaml"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	m := lastRelease.FindSubmatch(data)
	if m == nil {
		return "", errors.New("releases/versions.yaml does not say which release this is: say it with --release")
	}
	return string(m[1]), nil
}

// rewrite makes the version vendor.conf's default base. The one that was it becomes the first of the older ones.
func rewrite(conf string, old pins.Pin, oldSum, version, release, nat string) (string, error) {
	var out strings.Builder
	found := false
	for line := range strings.Lines(conf) {
		f := strings.Fields(line)
		switch {
		case len(f) < 3 || f[0] != old.Name:
			out.WriteString(line)
		case f[2] == old.Version:
			found = true
			set := func(key, value string) {
				line = regexp.MustCompile(`\b`+key+`=\S*`).ReplaceAllLiteralString(line, key+"="+value)
			}
			line = strings.Replace(line, old.Version, version, 1)
			set("release", release)
			set("patch", "1")
			set("nat", nat)
			out.WriteString(line)
			name, settings, _ := strings.Cut(line, version)
			space := settings[:len(settings)-len(strings.TrimLeft(settings, " \t"))]
			fmt.Fprintf(&out, "%s%s%srelease=%s nat=%s h1=%s\n", name, old.Version, space, old.Release, old.NAT, strings.TrimPrefix(oldSum, "h1:"))
		case f[2] != version:
			out.WriteString(line)
		}
	}
	if !found {
		return "", fmt.Errorf("vendor.conf has no line for %s %s", old.Name, old.Version)
	}
	_, err := pins.Parse("the new vendor.conf", strings.NewReader(out.String()))
	return out.String(), err
}

// copyCheckout makes dst a copy of the checkout, without what is built, and without its history.
func copyCheckout(root, dst string) error {
	if err := os.RemoveAll(dst); err != nil {
		return err
	}
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		switch {
		case rel == "build" || rel == ".git":
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		case !d.Type().IsRegular():
			return nil
		}
		return tree.CopyFile(filepath.Join(dst, rel), path, 0o644)
	})
}

// try has go.mod require the version, and runs what every base must pass.
func (r Rebase) try(ctx context.Context, dir string, old pins.Pin) error {
	for _, args := range [][]string{
		{"get", old.Module + "@" + r.Version},
		{"mod", "tidy"},
		{"test", "./hack/pins"}, // vendor.conf and go.mod must agree on all else, too
		{"vet", "./daemon/..."},
		{"test", "-tags", "integration", "-count=1", "-v", "-timeout", "0", "-run", "^TestBases$", "./integration/upstream", "-bases", r.Version},
	} {
		fmt.Fprintf(r.Out, "+ go %s\n", strings.Join(args, " "))
		if err := r.goTool(ctx, dir, args...); err != nil {
			return fmt.Errorf("go %s: %w", strings.Join(args, " "), err)
		}
	}
	return nil
}

func (r Rebase) goTool(ctx context.Context, dir string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=")
	cmd.Stdout, cmd.Stderr = r.Out, r.Out
	// All of a group end with us: the compilers, and the tests.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGINT}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = 10 * time.Second
	return cmd.Run()
}
