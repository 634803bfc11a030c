package install

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

const (
	version  = "29.8.0+berth.1"
	unitText = `[Unit]
Description=Docker Application Container Engine (Rootless)

[Service]
Environment=PATH=/usr/bin:/sbin:/usr/sbin
ExecStart=%s/dockerd-rootless.sh --flag
Type=notify
KillMode=mixed
`
	scriptText = "#!/bin/sh\nexec \"${DOCKERD:-dockerd}\" \"$@\"\n"
)

// home is one where a Docker of that version runs under systemd, and Berth's files are in a folder beside it.
func home(t *testing.T, docker string) Options {
	t.Helper()
	top := t.TempDir()
	o := Options{From: filepath.Join(top, "berth"), Home: filepath.Join(top, "ho me"), Out: io.Discard}
	o.Config = filepath.Join(o.Home, ".config")
	bin := filepath.Join(top, "bin")
	release(t, o.From, version)
	write(t, filepath.Join(bin, "dockerd"), says(docker))
	write(t, filepath.Join(bin, "dockerd-rootless.sh"), scriptText)
	write(t, filepath.Join(o.Config, "systemd/user/docker.service"), fmt.Sprintf(unitText, bin))
	return o
}

func release(t *testing.T, dir, version string) {
	t.Helper()
	write(t, filepath.Join(dir, "dockerd"), says(version))
	write(t, filepath.Join(dir, "docker-proxy"), "#!/bin/sh\n# of "+version)
}

func says(version string) string {
	return "#!/bin/sh\necho 'Docker version " + version + ", build 0123456'\n"
}

func write(t *testing.T, name, text string) {
	t.Helper()
	assert.NilError(t, os.MkdirAll(filepath.Dir(name), 0o755))
	mode := fs.FileMode(0o644)
	if strings.HasPrefix(text, "#!") {
		mode = 0o755
	}
	assert.NilError(t, os.WriteFile(name, []byte(text), mode))
}

// list is all that is below dir: names, modes, and what is in the files.
func list(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	assert.NilError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		var text []byte
		if d.Type().IsRegular() {
			text, err = os.ReadFile(path)
		}
		all[path] = info.Mode().String() + " " + string(text)
		return err
	}))
	return all
}

func TestInstallAndBack(t *testing.T) {
	o := home(t, "29.1.0")
	before := list(t, o.Home)
	var said strings.Builder
	o.Out = &said

	o.DryRun = true
	assert.NilError(t, Install(t.Context(), o))
	assert.Check(t, is.Contains(said.String(), "copy "+o.From+"/dockerd to "+o.lib()+"/"+version+"/dockerd"))
	assert.DeepEqual(t, list(t, o.Home), before)

	o.DryRun = false
	said.Reset()
	assert.NilError(t, Install(t.Context(), o))
	assert.Check(t, is.Contains(said.String(), "systemctl --user restart docker"))
	for _, name := range programs {
		have, err := os.ReadFile(filepath.Join(o.lib(), version, name))
		assert.NilError(t, err)
		want, err := os.ReadFile(filepath.Join(o.From, name))
		assert.NilError(t, err)
		assert.Check(t, bytes.Equal(have, want))
	}
	dropIn, err := os.ReadFile(filepath.Join(o.Config, "systemd/user/docker.service.d/berth.conf"))
	assert.NilError(t, err)
	assert.Check(t, is.Contains(string(dropIn), "\nEnvironment=\"DOCKERD="+o.lib()+"/"+version+"/dockerd\"\n"))

	once := list(t, o.Home)
	assert.NilError(t, Install(t.Context(), o))
	assert.DeepEqual(t, list(t, o.Home), once)

	o.DryRun = true
	assert.NilError(t, Uninstall(t.Context(), o))
	assert.DeepEqual(t, list(t, o.Home), once)
	o.DryRun = false
	assert.NilError(t, Uninstall(t.Context(), o))
	assert.DeepEqual(t, list(t, o.Home), before)
	said.Reset()
	assert.NilError(t, Uninstall(t.Context(), o))
	assert.Equal(t, said.String(), "nothing is installed\n")
}

func TestInstalledTellsOfItsUser(t *testing.T) {
	runtime := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", runtime)
	o := home(t, "29.1.0")
	state := func() State {
		t.Helper()
		s, err := Installed(t.Context(), o)
		assert.NilError(t, err)
		return s
	}
	assert.DeepEqual(t, state(), State{})
	assert.NilError(t, Install(t.Context(), o))
	dockerd := filepath.Join(o.lib(), version, "dockerd")
	assert.DeepEqual(t, state(), State{Dockerd: dockerd, Version: version, Unit: true})

	l, err := net.Listen("unix", filepath.Join(runtime, "docker.sock"))
	assert.NilError(t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, `{"Version": "29.1.0", "ApiVersion": "1.52", "MinAPIVersion": "1.44"}`)
	})}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	assert.DeepEqual(t, state(), State{Dockerd: dockerd, Version: version, Unit: true, Running: "29.1.0"})

	write(t, o.unsettled(), "{}")
	assert.Check(t, state().Half)
}

func TestUpdateReplacesTheOldVersion(t *testing.T) {
	o := home(t, "29.1.0")
	before := list(t, o.Home)
	assert.NilError(t, Install(t.Context(), o))
	release(t, o.From, "29.8.0+berth.2")
	assert.NilError(t, Install(t.Context(), o))
	versions, err := filepath.Glob(filepath.Join(o.lib(), "*+*"))
	assert.NilError(t, err)
	assert.DeepEqual(t, versions, []string{filepath.Join(o.lib(), "29.8.0+berth.2")})
	assert.NilError(t, Uninstall(t.Context(), o))
	assert.DeepEqual(t, list(t, o.Home), before)
}

// What the user has there stays: folders that are empty, and files of the user's own.
func TestUninstallLeavesWhatIsNotBerths(t *testing.T) {
	o := home(t, "29.1.0")
	assert.NilError(t, os.MkdirAll(filepath.Join(o.Home, ".local/lib/berth"), 0o700))
	write(t, filepath.Join(filepath.Dir(o.dropIn()), "override.conf"), "[Service]\nEnvironment=HTTP_PROXY=http://127.0.0.1\n")
	before := list(t, o.Home)
	assert.NilError(t, Install(t.Context(), o))
	assert.NilError(t, Uninstall(t.Context(), o))
	assert.DeepEqual(t, list(t, o.Home), before)

	assert.NilError(t, Install(t.Context(), o))
	mine := filepath.Join(o.lib(), version, "notes")
	write(t, mine, "mine")
	assert.NilError(t, Uninstall(t.Context(), o))
	after := list(t, o.Home)
	assert.Check(t, after[mine] != "")
	assert.Equal(t, len(after), len(before)+2) // with the folder that they are in
}

// stopped is a context that has end called before each step, with the number of steps before it.
type stopped struct {
	context.Context
	steps int
	end   func(steps int) error
}

func (s *stopped) Err() error {
	s.steps++
	return s.end(s.steps - 1)
}

// Whatever was done when it was killed, it can be gone on with, or taken back; and that can be killed, too.
func TestKilledAtEachStep(t *testing.T) {
	const kill = "killed"
	t.Setenv("PATH", "") // systemd-analyze is slow
	run := func(t *testing.T, o Options, f func(context.Context, Options) error, after int) (ended bool) {
		defer func() {
			if p := recover(); p != nil && p != kill {
				panic(p)
			}
		}()
		assert.NilError(t, f(&stopped{Context: t.Context(), end: func(steps int) error {
			if steps == after {
				panic(kill)
			}
			return nil
		}}, o))
		return true
	}
	// at has f killed at each of its steps in turn, in a home that prepare has had, and then sees to it with check.
	at := func(t *testing.T, f func(context.Context, Options) error, prepare func(Options), check func(t *testing.T, o Options)) {
		for after := 0; ; after++ {
			o := home(t, "29.1.0")
			prepare(o)
			ended := run(t, o, f, after)
			check(t, o)
			if ended {
				assert.Check(t, after >= 4)
				return
			}
		}
	}
	fresh := func(Options) {}
	installed := func(o Options) {
		assert.NilError(t, Install(t.Context(), o))
		release(t, o.From, "29.8.0+berth.2")
	}
	back := func(t *testing.T, o Options) {
		assert.NilError(t, Uninstall(t.Context(), o))
		left := list(t, o.Home)
		assert.NilError(t, os.RemoveAll(o.Home))
		write(t, filepath.Join(o.Config, "systemd/user/docker.service"), fmt.Sprintf(unitText, filepath.Join(o.Home, "../bin")))
		assert.DeepEqual(t, left, list(t, o.Home))
	}
	on := func(t *testing.T, o Options) {
		assert.NilError(t, Install(t.Context(), o))
		after := list(t, o.Home)
		assert.NilError(t, Install(t.Context(), o))
		assert.DeepEqual(t, list(t, o.Home), after)
		back(t, o)
	}
	t.Run("install, taken back", func(t *testing.T) { at(t, Install, fresh, back) })
	t.Run("install, gone on with", func(t *testing.T) { at(t, Install, fresh, on) })
	t.Run("update, taken back", func(t *testing.T) { at(t, Install, installed, back) })
	t.Run("update, gone on with", func(t *testing.T) { at(t, Install, installed, on) })
	t.Run("uninstall, gone on with", func(t *testing.T) { at(t, Uninstall, installed, back) })
	t.Run("uninstall, installed again", func(t *testing.T) { at(t, Uninstall, installed, on) })
}

func TestHalfAFileIsRemoved(t *testing.T) {
	o := home(t, "29.1.0")
	before := list(t, o.Home)
	assert.NilError(t, Install(t.Context(), o))
	for _, name := range []string{filepath.Join(o.lib(), version, "dockerd"), o.dropIn(), o.unsettled()} {
		write(t, name+halfway, "half")
	}
	assert.NilError(t, Uninstall(t.Context(), o))
	assert.DeepEqual(t, list(t, o.Home), before)
}

func TestCancelledAtEachStep(t *testing.T) {
	t.Setenv("PATH", "")
	for _, update := range []bool{false, true} {
		o := home(t, "29.1.0")
		if update {
			assert.NilError(t, Install(t.Context(), o))
			release(t, o.From, "29.8.0+berth.2")
		}
		before := list(t, o.Home)
		for after := 0; ; after++ {
			err := Install(&stopped{Context: t.Context(), end: func(steps int) error {
				if steps >= after {
					return context.Canceled
				}
				return nil
			}}, o)
			if err == nil {
				assert.Check(t, after > 4)
				break
			}
			assert.ErrorContains(t, err, "all is as it was before")
			assert.DeepEqual(t, list(t, o.Home), before)
		}
	}
}

func TestRefuses(t *testing.T) {
	for _, tc := range []struct {
		name    string
		docker  string
		prepare func(t *testing.T, o *Options)
		want    string
	}{
		{"another major version", "28.5.2", nil, "the installed Docker is 28.5.2, and Berth's dockerd is made from 29.8.0+berth.1: use a Berth for 28, or --force"},
		{"a stock dockerd beside it", "29.1.0", func(t *testing.T, o *Options) { release(t, o.From, "29.8.0") }, "dockerd is 29.8.0, not a patched one"},
		{"no dockerd beside it", "29.1.0", func(t *testing.T, o *Options) { o.From = t.TempDir() }, "no patched dockerd beside this command"},
		{"a script that does not look at DOCKERD", "29.1.0", func(t *testing.T, o *Options) {
			write(t, filepath.Join(o.Home, "../bin/dockerd-rootless.sh"), "#!/bin/sh\nexec dockerd\n")
		}, "which does not look at $DOCKERD"},
		{"a drop-in that would win", "29.1.0", func(t *testing.T, o *Options) {
			write(t, filepath.Join(filepath.Dir(o.dropIn()), "override.conf"), "[Service]\nEnvironment=DOCKERD=/x\n")
		}, "override.conf sets DOCKERD, and would win"},
		{"a drop-in of that name", "29.1.0", func(t *testing.T, o *Options) { write(t, o.dropIn(), "mine") }, "berth.conf is there already and is not Berth's"},
		{"a unit that systemd refuses", "29.1.0", func(t *testing.T, o *Options) {
			write(t, filepath.Join(filepath.Dir(o.dropIn()), "a.conf"), "[Service]\nExecStart=/bin/true\n")
		}, "Service has more than one ExecStart="},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := home(t, tc.docker)
			if tc.prepare != nil {
				tc.prepare(t, &o)
			}
			before := list(t, o.Home)
			assert.ErrorContains(t, Install(t.Context(), o), tc.want)
			assert.DeepEqual(t, list(t, o.Home), before)
		})
	}
}

func TestForceMixesMajorVersions(t *testing.T) {
	o := home(t, "28.5.2")
	o.Force = true
	assert.NilError(t, Install(t.Context(), o))
	assert.Check(t, exists(o.dropIn()))
}

func TestWithoutSystemdTheVariablesAreNamed(t *testing.T) {
	o := home(t, "29.1.0")
	t.Setenv("PATH", filepath.Join(o.Home, "../bin")+":"+os.Getenv("PATH"))
	assert.NilError(t, os.RemoveAll(o.Config))
	before := list(t, o.Home)
	var said strings.Builder
	o.Out = &said
	assert.NilError(t, Install(t.Context(), o))
	bin := filepath.Join(o.lib(), version)
	assert.Check(t, is.Contains(said.String(), "export DOCKERD='"+bin+"/dockerd'\n  export PATH='"+bin+"':\"$PATH\"\n"))
	assert.Check(t, is.Contains(said.String(), "FROM docker:29-dind-rootless\n"))
	assert.Check(t, !exists(o.Config))
	assert.NilError(t, Uninstall(t.Context(), o))
	assert.DeepEqual(t, list(t, o.Home), before)
}

func TestDropInIsQuoted(t *testing.T) {
	assert.Equal(t, (*unit)(nil).dropIn(`/ho me/50%/"\`+"`"+`dockerd`), "# Made by `berth install`, removed by `berth uninstall`.\n"+
		`[Service]`+"\n"+`Environment="DOCKERD=/ho me/50%%/\"\\`+"`"+`dockerd"`+"\n")
}
