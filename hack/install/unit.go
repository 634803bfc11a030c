package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
)

// unit is the user's docker.service, as dockerd-rootless-setuptool.sh makes it.
type unit struct {
	path   string
	script string // the dockerd-rootless.sh that it starts
}

var (
	execStart = regexp.MustCompile(`(?m)^\s*ExecStart\s*=\s*[-@:+!]*(\S+)`)
	readsIt   = regexp.MustCompile(`\$\{?DOCKERD\b`)
	setsIt    = regexp.MustCompile(`(?m)^\s*Environment\s*=.*\bDOCKERD=`)
)

// unit is nil if the user has none. A unit that would not run what a drop-in says is an error.
func (o Options) unit() (*unit, error) {
	for _, dir := range []string{filepath.Join(o.Config, "systemd/user"), "/etc/systemd/user", "/usr/local/lib/systemd/user", "/usr/lib/systemd/user"} {
		u := &unit{path: filepath.Join(dir, "docker.service")}
		text, err := os.ReadFile(u.path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		m := execStart.FindSubmatch(text)
		if m == nil {
			return nil, fmt.Errorf("%s starts nothing: it has no ExecStart", u.path)
		}
		u.script = strings.ReplaceAll(string(m[1]), "%h", o.Home)
		script, err := os.ReadFile(u.script)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", u.path, err)
		}
		if !readsIt.Match(script) {
			return nil, fmt.Errorf("%s starts %s, which does not look at $DOCKERD: another dockerd can't be given to it", u.path, u.script)
		}
		return u, o.checkLater()
	}
	return nil, nil
}

// checkLater tells of another drop-in that comes after ours and says something else: as of `systemctl --user edit docker`.
func (o Options) checkLater() error {
	others, err := filepath.Glob(filepath.Join(filepath.Dir(o.dropIn()), "*.conf"))
	if err != nil {
		return err
	}
	for _, other := range others {
		text, err := os.ReadFile(other)
		if err != nil {
			return err
		}
		if filepath.Base(other) > dropInName && setsIt.Match(text) {
			return fmt.Errorf("%s sets DOCKERD, and would win: remove it there", other)
		}
	}
	return nil
}

// dropIn is the text that has the unit run dockerd.
func (*unit) dropIn(dockerd string) string {
	escaped := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%").Replace(dockerd) // systemd.syntax(7), "Specifiers" in systemd.unit(5)
	return "# Made by `berth install`, removed by `berth uninstall`.\n[Service]\nEnvironment=\"DOCKERD=" + escaped + "\"\n"
}

// verify has systemd read the unit with all its drop-ins. What it only warns of counts, if it is about ours.
func (o Options) verify(ctx context.Context, u *unit) error {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		fmt.Fprintln(o.Out, "there is no systemd-analyze here to check that with")
		return nil
	}
	if err := os.MkdirAll(o.scratch(), 0o700); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, analyze, "--user", "verify", u.path)
	cmd.Env = append(os.Environ(), "HOME="+o.Home, "XDG_CONFIG_HOME="+o.Config, "XDG_RUNTIME_DIR="+o.scratch())
	// If we are killed it must not go on, and make that folder again. The signal comes when our thread ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err == nil && bytes.Contains(out, []byte(o.dropIn())) {
		err = errors.New("it does not understand the drop-in")
	}
	if err != nil {
		return fmt.Errorf("systemd-analyze --user verify %s: %w\n%s", u.path, err, bytes.TrimSpace(out))
	}
	fmt.Fprintln(o.Out, "systemd-analyze --user verify finds no fault with it")
	return nil
}
