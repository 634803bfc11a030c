// Package install has the rootless Docker that a user runs already take the patched daemon, and gives it back its own.
package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"berth/hack/tree"
)

// Options say whose Docker it is. All of it is done with the rights of whoever runs it, who should be that user.
type Options struct {
	From   string // the folder that has the patched dockerd
	Home   string
	Config string // where the user's settings are: $XDG_CONFIG_HOME, or .config in the home
	Force  bool   // whatever the installed Docker's version is
	DryRun bool   // say only what would be done
	Out    io.Writer
}

// lib is where the daemon goes, a folder for each version.
func (o Options) lib() string { return filepath.Join(o.Home, ".local", "lib", "berth") }

func (o Options) dropIn() string {
	return filepath.Join(o.Config, "systemd", "user", "docker.service.d", dropInName)
}

const dropInName = "berth.conf"

// programs are what the base's patched build is, for a Docker that has all else.
var programs = []string{"dockerd", "docker-proxy"}

// Install is done twice as well as once, and an update is one. A failed or cancelled one leaves what was there before it; of one
// that was killed, the next Install or Uninstall knows.
func Install(ctx context.Context, o Options) (retErr error) {
	dockerd := filepath.Join(o.From, "dockerd")
	version, err := versionOf(ctx, dockerd)
	if err != nil {
		return fmt.Errorf("no patched dockerd beside this command: %w", err)
	}
	if !strings.Contains(version, "+berth.") {
		return fmt.Errorf("%s is %s, not a patched one", dockerd, version)
	}
	unit, err := o.unit()
	if err != nil {
		return err
	}
	if err := o.checkDocker(ctx, version, unit); err != nil {
		return err
	}

	bin := filepath.Join(o.lib(), version)
	var files []string
	for _, name := range programs {
		files = append(files, filepath.Join(bin, name))
	}
	if unit != nil {
		files = append(files, o.dropIn())
	}
	old, err := o.load()
	if err != nil {
		return err
	}
	for _, file := range files {
		if exists(file) && !slices.Contains(old.Files, file) {
			return fmt.Errorf("%s is there already and is not Berth's: move it away", file)
		}
	}
	oldDropIn, err := os.ReadFile(o.dropIn())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	r := old.with(files)
	defer func() {
		if retErr == nil || o.DryRun {
			return
		}
		if oldDropIn != nil {
			retErr = errors.Join(retErr, replace(o.dropIn(), oldDropIn, 0o644))
		}
		if err := o.keep(r, old.Files); err != nil {
			retErr = fmt.Errorf("%w; and it could not be taken back, which `berth uninstall` does: %w", retErr, err)
			return
		}
		retErr = fmt.Errorf("%w\nall is as it was before", retErr)
	}()

	s := steps{ctx: ctx, dryRun: o.DryRun, out: o.Out}
	s.do("", func() error { return o.save(r) })
	for _, name := range programs {
		from, to := filepath.Join(o.From, name), filepath.Join(bin, name)
		s.do("copy "+from+" to "+to, func() error { return tree.CopyFile(to, from, 0o755) })
	}
	if unit != nil {
		dropIn := unit.dropIn(filepath.Join(bin, "dockerd"))
		s.do("write "+o.dropIn()+":\n"+indent(dropIn), func() error {
			if err := os.MkdirAll(filepath.Dir(o.dropIn()), 0o755); err != nil {
				return err
			}
			return replace(o.dropIn(), []byte(dropIn), 0o644)
		})
		s.do("", func() error { return o.verify(ctx, unit) })
	}
	var replaced string
	for _, file := range old.Files {
		if !slices.Contains(files, file) {
			replaced += "remove " + file + "\n"
		}
	}
	s.do(replaced, func() error { return o.keep(r, files) }) // in one step: it is installed, and cannot be cancelled any more
	if s.err != nil {
		return s.err
	}
	if o.DryRun {
		fmt.Fprintln(o.Out, "nothing was changed")
		return nil
	}
	fmt.Fprintf(o.Out, "Berth's dockerd %s is installed. ", version)
	if unit != nil {
		fmt.Fprint(o.Out, "To run it:\n"+indent(restart)+"`docker version` then shows it as the server, and `berth uninstall` goes back.\n")
		return nil
	}
	fmt.Fprintf(o.Out, "This user has no docker.service of systemd's. Where dockerd-rootless.sh is started, set\n"+
		"  export DOCKERD=%s\n  export PATH=%s:\"$PATH\"\n", quote(filepath.Join(bin, "dockerd")), quote(bin))
	fmt.Fprintf(o.Out, "An image made of docker:dind-rootless takes it so, with %s as the context:\n"+
		"  FROM docker:%s-dind-rootless\n  COPY --chmod=755 dockerd docker-proxy /usr/local/bin/\n", bin, major(version))
	return nil
}

const restart = "systemctl --user daemon-reload\nsystemctl --user restart docker\n"

// Uninstall removes what Install made, whether or not it came to its end, and nothing else.
func Uninstall(ctx context.Context, o Options) error {
	r, err := o.load()
	if err != nil {
		return err
	}
	if len(r.Files) == 0 {
		fmt.Fprintln(o.Out, "nothing is installed")
		return nil
	}
	s := steps{ctx: ctx, dryRun: o.DryRun, out: o.Out}
	restored := exists(o.dropIn()) && slices.Contains(r.Files, o.dropIn())
	s.do("", func() error { return o.save(r) })
	for _, file := range slices.Backward(r.Files) { // first of all, Docker goes back to its own
		if exists(file) { // not all that an interrupted Install was about to make is
			s.do("remove "+file, func() error { return os.Remove(file) })
		}
	}
	s.do("", func() error { return o.keep(r, nil) })
	if s.err != nil {
		return fmt.Errorf("%w: `berth uninstall` goes on from here", s.err)
	}
	switch {
	case o.DryRun:
		fmt.Fprintln(o.Out, "nothing was changed")
	case restored:
		fmt.Fprint(o.Out, "Docker has its own dockerd again. To run that:\n"+indent(restart))
	default:
		fmt.Fprintln(o.Out, "Berth's dockerd is removed: where DOCKERD or PATH were set to it, set them back")
	}
	return nil
}

// steps says what is done, and does it unless it is a dry run. After an error or a cancellation, it does nothing more.
type steps struct {
	ctx    context.Context
	dryRun bool
	out    io.Writer
	err    error
}

func (s *steps) do(what string, f func() error) {
	if s.err != nil {
		return
	}
	if s.err = s.ctx.Err(); s.err != nil {
		return
	}
	if what != "" {
		fmt.Fprintln(s.out, strings.TrimSuffix(what, "\n"))
	}
	if !s.dryRun {
		s.err = f()
	}
}

// checkDocker refuses to put the patched daemon among the parts of a Docker that it was not made with.
func (o Options) checkDocker(ctx context.Context, version string, unit *unit) error {
	if o.Force {
		return nil
	}
	installed := "dockerd"
	if unit != nil && unit.script != "" {
		if beside := filepath.Join(filepath.Dir(unit.script), "dockerd"); exists(beside) {
			installed = beside
		}
	}
	have, err := versionOf(ctx, installed)
	if err != nil {
		return fmt.Errorf("which Docker is installed here? %w\nwith --force, that does not matter", err)
	}
	if major(have) != major(version) {
		return fmt.Errorf("the installed Docker is %s, and Berth's dockerd is made from %s: use a Berth for %s, or --force", have, version, major(have))
	}
	return nil
}

var versionLine = regexp.MustCompile(`^Docker version ([^ ,]+)`)

func versionOf(ctx context.Context, dockerd string) (string, error) {
	out, err := exec.CommandContext(ctx, dockerd, "--version").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w: %s", dockerd, err, bytes.TrimSpace(out))
	}
	m := versionLine.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("%s --version: %q is not what a dockerd says", dockerd, bytes.TrimSpace(out))
	}
	return string(m[1]), nil
}

func major(version string) string {
	m, _, _ := strings.Cut(version, ".")
	return m
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

func indent(text string) string {
	return "  " + strings.ReplaceAll(strings.TrimSuffix(text, "\n"), "\n", "\n  ") + "\n"
}

// quote makes one word of s for a POSIX shell.
func quote(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
