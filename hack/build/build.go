// Package build compiles what vendor.conf lists into build/bin, and only what has changed.
package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/mod/sumdb/dirhash"
	"golang.org/x/sys/unix"

	"berth/hack/checkout"
	"berth/hack/pins"
	"berth/hack/progress"
	"berth/hack/tree"
)

// Race is the component that is the patched dockerd with the race detector in it. It is built only when asked for by name: it
// shares no package with the others, so that the first time takes minutes.
const Race = "dockerd-race"

// Run builds the components of the checkout at root that are named, without names all but the optional ones, and tells out
// about each in a line. With GOARCH set to another architecture than this machine's, it builds for that, into build/bin/GOARCH.
// What it needs of them is in place under build/bin when it returns nil. An interrupted or failed Run leaves the binaries of the one
// before it; the next goes on from there.
func Run(ctx context.Context, root string, out io.Writer, names []string) error {
	return Options{}.Run(ctx, root, out, names)
}

// Options say what is built otherwise than Run does.
type Options struct {
	Base  string // build the components of this base, and put them below build/base/<version>
	Force bool   // patch a base whose nat package is not the one that the patch was written against
}

// Run is as the function of that name.
func (o Options) Run(ctx context.Context, root string, out io.Writer, names []string) error {
	err := o.run(ctx, root, out, names)
	if err != nil && ctx.Err() != nil {
		return errors.New("stopped: build again to go on from here")
	}
	return err
}

// Bin is the folder that Run builds into.
func (o Options) Bin(root string) string {
	if o.Base == "" {
		return checkout.Bin(root)
	}
	return filepath.Join(root, "build", "base", o.Base)
}

func (o Options) run(ctx context.Context, root string, out io.Writer, names []string) error {
	list, err := pins.Load(filepath.Join(root, "vendor.conf"))
	if err != nil {
		return err
	}
	bases := pins.Bases(list)
	if o.Base != "" {
		base, err := pins.Base(list, o.Base)
		if err != nil {
			return err
		}
		list = []pins.Pin{base}
	} else if len(bases) > 1 {
		list = slices.DeleteFunc(list, func(pin pins.Pin) bool { return pin.Patch != 0 && pin.Version != bases[0].Version })
	}
	all, err := components(ctx, root, list)
	if err != nil {
		return err
	}
	chosen, err := choose(all, names)
	if err != nil {
		return err
	}
	var foreign string
	if goarch, err := output(ctx, root, "go", "env", "GOARCH", "GOHOSTARCH"); err != nil {
		return err
	} else if arch, host, _ := strings.Cut(goarch, "\n"); arch != host {
		foreign = arch
	}
	b := builder{Options: o, root: root, foreign: foreign, out: out, bases: bases, dirs: map[string]string{}}
	for _, dir := range []string{b.bin(""), filepath.Join(root, "build", "log"), b.stamp("")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	unlock, err := lock(ctx, root, out)
	if err != nil {
		return err
	}
	defer unlock()

	if b.goVersion, err = output(ctx, root, "go", "env", "GOVERSION", "GOOS", "GOARCH"); err != nil {
		return err
	}
	for _, c := range chosen {
		if err := b.bring(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// Version is what a dockerd says of itself, such as 29.8.0+berth.1.
func Version(ctx context.Context, dockerd string) (string, error) {
	out, err := output(ctx, filepath.Dir(dockerd), dockerd, "--version")
	if err != nil {
		return "", err
	}
	words := strings.Fields(strings.ReplaceAll(out, ",", " ")) // Docker version V, build C
	if len(words) < 3 {
		return "", fmt.Errorf("%s --version: %q", dockerd, out)
	}
	return words[2], nil
}

// ErrNoComponent is what a name is that vendor.conf does not have.
var ErrNoComponent = errors.New("no component")

// component is one file of build/bin.
type component struct {
	name    string
	pin     pins.Pin
	pkg     string // the Go package to build, or
	file    string // the file to take, made first if the pin is Debian's
	patched bool
	race    bool
	patch   string // when patched: a hash of what of the patch goes into the binary
	version string
	commit  string
}

// cgo tells whether it is built with cgo, which the race detector is linked by.
func (c component) cgo() bool { return c.pin.CGO || c.race }

func components(ctx context.Context, root string, list []pins.Pin) ([]component, error) {
	var all []component
	for _, pin := range list {
		for _, pkg := range pin.Packages {
			c := component{name: pin.Name, pin: pin, pkg: pkg, version: pin.Release, commit: pin.Version}
			if len(pin.Packages) > 1 {
				c.name = path.Base(pkg)
			}
			if pin.Patch == 0 || c.name != "dockerd" { // the one that the patch is in
				all = append(all, c)
				continue
			}
			hash, err := patchHash(root)
			if err != nil {
				return nil, err
			}
			patched := c
			patched.patched, patched.patch = true, hash
			patched.version = fmt.Sprintf("%s+berth.%d", pin.Release, pin.Patch)
			patched.commit = commit(ctx, root)
			race := patched
			race.name, race.race = Race, true
			c.name += "-stock"
			all = append(all, patched, race, c)
		}
		for _, file := range pin.Files {
			all = append(all, component{name: path.Base(file), pin: pin, file: file, version: pin.Release})
		}
	}
	return all, nil
}

func choose(all []component, names []string) ([]component, error) {
	var chosen []component
	for _, c := range all {
		if slices.Contains(names, c.name) || len(names) == 0 && !c.pin.Optional && !c.race {
			chosen = append(chosen, c)
		}
	}
	for _, name := range names {
		if !slices.ContainsFunc(all, func(c component) bool { return c.name == name }) {
			var known []string
			for _, c := range all {
				known = append(known, c.name)
			}
			return nil, fmt.Errorf("%w %q: there are %s", ErrNoComponent, name, strings.Join(known, ", "))
		}
	}
	return chosen, nil
}

// lock keeps two builds in one checkout from treading on each other's trees. It waits for its turn.
func lock(ctx context.Context, root string, out io.Writer) (unlock func(), _ error) {
	f, err := os.Create(filepath.Join(root, "build", ".lock"))
	if err != nil {
		return nil, err
	}
	for waiting := false; ; waiting = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if !waiting {
			fmt.Fprintln(out, "another build is running in this checkout: waiting for it to end")
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// builder is what the components of one Run have in common.
type builder struct {
	Options
	root      string
	foreign   string // the architecture to build for, if it is not this machine's
	out       io.Writer
	goVersion string
	bases     []pins.Pin
	dirs      map[string]string // the source folders made so far, by what they are made of
}

// bring brings one file of build/bin up to date.
func (b *builder) bring(ctx context.Context, c component) error {
	fmt.Fprintf(b.out, "%-24s %-16s ", c.name, c.version)
	start := time.Now()
	stamp := b.stamp(c.name)
	key := b.key(c)
	stale := !current(stamp, key) || !exists(b.bin(c.name))
	quiet := func() {}
	if stale {
		fmt.Fprint(b.out, "building")
		quiet = progress.Dots(b.out)
	}
	var dir string
	var err error
	// The base's trees are for reading, too: they are put right whether or not something is built from them.
	if stale || c.pin.Patch != 0 {
		dir, err = b.source(ctx, c)
	}
	if err == nil && stale {
		err = b.build(ctx, c, dir)
	}
	quiet()
	switch {
	case err != nil:
		fmt.Fprintln(b.out, " failed")
		return err
	case !stale:
		fmt.Fprintln(b.out, "unchanged")
		return nil
	}
	fmt.Fprintf(b.out, " %.0f s\n", time.Since(start).Seconds())
	return os.WriteFile(stamp, []byte(key), 0o644)
}

func (b *builder) bin(name string) string { return filepath.Join(b.Bin(b.root), b.foreign, name) }

func (b *builder) stamp(name string) string {
	return filepath.Join(b.root, "build", "stamp", b.Base, b.foreign, name)
}

// key is everything that the component's binary depends on.
func (b *builder) key(c component) string {
	lines := append([]string{b.goVersion, c.pin.Module + "@" + c.pin.Version, c.pin.SHA256 + c.pin.Sum, c.patch, c.file}, env(c)...)
	return strings.Join(append(lines, args(c)...), "\n")
}

func current(stamp, key string) bool {
	have, err := os.ReadFile(stamp)
	return err == nil && string(have) == key
}

func exists(file string) bool {
	_, err := os.Stat(file)
	return err == nil
}

// source makes the folder that the component is built from.
func (b *builder) source(ctx context.Context, c component) (string, error) {
	id := fmt.Sprint(c.pin.Name, c.patched)
	if dir := b.dirs[id]; dir != "" {
		return dir, nil
	}
	fetch := tree.Module
	if c.pin.Debian != "" {
		fetch = tree.Debian
	}
	dir, err := fetch(ctx, b.root, c.pin)
	switch {
	case err != nil:
	case c.patched:
		if err = b.checkNAT(ctx, c.pin, dir); err == nil {
			dir, err = tree.Berth(b.root, c.pin, dir)
		}
	case c.pin.Patch != 0:
		dir, err = tree.Stock(b.root, c.pin, dir)
	case exists(filepath.Join(dir, "vendor.mod")):
		dir, err = tree.Vendored(b.root, c.pin, dir)
	}
	b.dirs[id] = dir
	return dir, err
}

// checkNAT refuses a base, with its module's folder, whose nat package the patch was not written against: it shows how that differs.
func (b *builder) checkNAT(ctx context.Context, base pins.Pin, module string) error {
	hash, err := tree.NATHash(module)
	if err != nil || hash == base.NAT || b.Force {
		return err
	}
	refused := fmt.Errorf("%s's %s has changed: vendor.conf has nat=%s, this is nat=%s (read what changed, and record it there, or use --force)",
		base.Version, tree.PatchDir, base.NAT, hash)
	for _, other := range b.bases {
		if other.Version == base.Version {
			continue
		}
		was, err := tree.Module(ctx, b.root, other)
		if err != nil {
			return errors.Join(refused, err)
		}
		if hash, err := tree.NATHash(was); err != nil || hash != other.NAT {
			continue
		}
		diff, err := tree.Diff(ctx, was, module, tree.PatchDir)
		if err != nil {
			return errors.Join(refused, err)
		}
		if diff == "" {
			diff = "its files do not differ"
		}
		return fmt.Errorf("%w; against %s:\n%s", refused, other.Version, diff)
	}
	return refused
}

func (b *builder) build(ctx context.Context, c component, dir string) error {
	bin := b.bin(c.name)
	if c.pin.Debian != "" {
		if err := b.run(ctx, c, dir, "make", args(c)); err != nil {
			return err
		}
	}
	if c.file != "" {
		return tree.CopyFile(bin, filepath.Join(dir, c.file), 0o755)
	}
	tmp := bin + ".tmp"
	if err := os.RemoveAll(tmp); err != nil { // go build does not write over what is not a binary
		return err
	}
	if err := b.run(ctx, c, dir, "go", slices.Concat([]string{"build", "-o", tmp}, args(c))); err != nil {
		return err
	}
	return os.Rename(tmp, bin)
}

// run runs the compiler in dir, with its output in the component's log.
func (b *builder) run(ctx context.Context, c component, dir, name string, args []string) error {
	logName := filepath.Join("build", "log", b.Base+c.name+".log")
	log, err := os.Create(filepath.Join(b.root, logName))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env(c)...)
	if c.pin.Debian != "" { // any variable is one of make's, and there may be a make above us
		cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	}
	cmd.Stdout, cmd.Stderr = log, log
	// A group of its own, to stop the compiler and the linker with their parent: the linker alone can take half a minute.
	// If we are killed it must not go on either, to write where the next build does. That signal comes when our thread ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGINT}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = 10 * time.Second
	fmt.Fprintf(log, "in %s: %s %s\n", dir, strings.Join(env(c), " "), strings.Join(cmd.Args, " "))
	if err := cmd.Run(); err != nil {
		if c.cgo() || c.pin.Debian != "" {
			err = fmt.Errorf("%w (hack/deps.sh installs the C compiler and the libraries)", err)
		}
		return fmt.Errorf("%s: %w\n%s\nthe whole log: %s", c.name, err, tail(log.Name()), logName)
	}
	return nil
}

// env is what must not depend on the caller's environment.
func env(c component) []string {
	cgo := "CGO_ENABLED=0"
	if c.cgo() {
		cgo = "CGO_ENABLED=1"
	}
	return []string{cgo, "GOWORK=off", "GOFLAGS=-mod=readonly"}
}

// args are the arguments of make, or of go build without the place of its output. Version control is not looked at: the trees lie
// inside this repository, whose state is not theirs.
func args(c component) []string {
	if c.pin.Debian != "" {
		return slices.Concat([]string{"VERSION=" + c.version}, c.pin.Make, []string{c.file})
	}
	ldflags := "-s -w"
	if c.pin.VersionVar != "" {
		ldflags += " -X " + c.pin.VersionVar + "=" + c.version
	}
	if c.pin.CommitVar != "" {
		ldflags += " -X " + c.pin.CommitVar + "=" + c.commit
	}
	args := []string{"-trimpath", "-buildvcs=false", "-tags=" + strings.Join(c.pin.Tags, ","), "-ldflags=" + ldflags}
	if c.race {
		args = append(args, "-race")
	}
	return append(args, c.pkg)
}

// tail is the last lines of a log.
func tail(name string) string {
	data, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

// patchHash is a hash of the patch's files that are compiled into dockerd.
func patchHash(root string) (string, error) {
	files, err := tree.Patch(root)
	if err != nil {
		return "", err
	}
	maps.DeleteFunc(files, func(rel, _ string) bool {
		return strings.HasSuffix(rel, "_test.go") || strings.Contains(rel, "/testdata/")
	})
	return dirhash.Hash1(slices.Collect(maps.Keys(files)), func(rel string) (io.ReadCloser, error) { return os.Open(files[rel]) })
}

// commit names the last commit that changed what dockerd is made of, so that others do not cause a build.
func commit(ctx context.Context, root string) string {
	hash, err := output(ctx, root, "git", "log", "-1", "--format=%h", "--abbrev=12", "--", "daemon", "vendor.conf")
	if err != nil || hash == "" {
		return "unknown"
	}
	if changed, err := output(ctx, root, "git", "status", "--porcelain", "--", "daemon", "vendor.conf"); err != nil || changed != "" {
		return hash + "-dirty"
	}
	return hash
}

func output(ctx context.Context, dir, name string, arg ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, arg...)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w", strings.Join(cmd.Args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}
