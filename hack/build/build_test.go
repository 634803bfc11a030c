package build

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/module"
	"golang.org/x/mod/sumdb/dirhash"
	modzip "golang.org/x/mod/zip"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
	gofs "gotest.tools/v3/fs"

	"berth/hack/tree"
)

const (
	nat    = "daemon/libnetwork/portmappers/nat"
	mapper = "package nat\n\nconst Name = \"upstream\"\n"
)

// natHash is what vendor.conf records of a base with this mapper.
func natHash(t *testing.T, mapper string) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, nat, "mapper_linux.go"), mapper)
	hash, err := tree.NATHash(dir)
	assert.NilError(t, err)
	return hash
}

// newCheckout is a small Berth over small modules, which a folder publishes in a module proxy's stead: the whole way from
// vendor.conf to binaries that run.
func newCheckout(t *testing.T) (root string) {
	t.Helper()
	modCache := t.TempDir()
	t.Cleanup(func() { // go makes it read-only
		filepath.WalkDir(modCache, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				err = os.Chmod(path, 0o755)
			}
			return err
		})
	})
	proxy := t.TempDir()
	for name, value := range map[string]string{
		"GOMODCACHE": modCache, "GOPROXY": "file://" + proxy, "GOSUMDB": "off", "GONOPROXY": "none", "GOPRIVATE": "",
		"GOFLAGS": "-tags=ambient", // must not matter
	} {
		t.Setenv(name, value)
	}
	sums := map[string]string{}
	for _, version := range []string{"v1.0.0", "v0.9.0", "v0.8.0"} {
		mapper := mapper
		if version == "v0.8.0" {
			mapper += "\nconst Old = true\n"
		}
		sums[version] = publish(t, proxy, "example.com/base", version, map[string]string{
			"go.mod":                 "module example.com/base\n\ngo 1.25\n",
			nat + "/mapper_linux.go": mapper,
			"contrib/start.sh":       "#!/bin/sh\necho started\n",
			"v/v.go":                 "package v\n\nvar Version, Commit string\n",
			"cmd/dockerd/main.go": `package main

import (
	"example.com/base/` + nat + `"
	"example.com/base/v"
)

func main() { println(nat.Name, v.Version, v.Commit) }
`,
			"cmd/proxy/main.go": "package main\n\nfunc main() { println(\"proxy\") }\n",
		})
	}
	cli := publish(t, proxy, "example.com/cli", "v3.0.0+incompatible", map[string]string{
		"vendor.mod": "module example.com/cli\n\ngo 1.25\n",
		"main.go":    "package main\n\nvar version string\n\nfunc main() { println(\"cli\", version) }\n",
	})
	return gofs.NewDir(t, "root",
		gofs.WithFile("go.mod", "module berth\n\ngo 1.25\n"),
		gofs.WithFile("go.sum", "example.com/base v1.0.0 "+sums["v1.0.0"]+"\n"),
		gofs.WithFile("vendor.conf", `
base  example.com/base  v1.0.0  release=29.0.0 patch=2 nat=`+natHash(t, mapper)+` packages=./cmd/dockerd,./cmd/proxy files=contrib/start.sh version-var=example.com/base/v.Version commit-var=example.com/base/v.Commit
base  example.com/base  v0.9.0  release=28.9.0 nat=`+natHash(t, mapper)+` `+h1(sums["v0.9.0"])+`
base  example.com/base  v0.8.0  release=28.8.0 nat=h1:wrong= `+h1(sums["v0.8.0"])+`
cli   example.com/cli   v3.0.0+incompatible  packages=. version-var=main.version `+h1(cli)+`
other example.com/base  v1.0.0  packages=./cmd/proxy optional=yes
`),
		gofs.WithDir(nat,
			gofs.WithFile("mapper_linux.go", "package nat\n\nconst Name = \"patched\"\n"),
			gofs.WithFile("mapper_linux_test.go", "package nat\n"),
		),
	).Path()
}

// h1 is a hash as vendor.conf has it.
func h1(sum string) string { return strings.Replace(sum, ":", "=", 1) }

// publish returns the module's hash.
func publish(t *testing.T, proxy, path, version string, files map[string]string) string {
	t.Helper()
	src := t.TempDir()
	for name, data := range files {
		write(t, filepath.Join(src, name), data)
	}
	dir := filepath.Join(proxy, path, "@v")
	mod := files["go.mod"]
	if mod == "" {
		mod = "module " + path + "\n"
	}
	write(t, filepath.Join(dir, version+".mod"), mod)
	write(t, filepath.Join(dir, version+".info"), `{"Version":"`+version+`"}`)
	f, err := os.Create(filepath.Join(dir, version+".zip"))
	assert.NilError(t, err)
	defer f.Close()
	assert.NilError(t, modzip.CreateFromDir(f, module.Version{Path: path, Version: version}, src))
	sum, err := dirhash.HashZip(f.Name(), dirhash.Hash1)
	assert.NilError(t, err)
	return sum
}

func write(t *testing.T, name, data string) {
	t.Helper()
	assert.NilError(t, os.MkdirAll(filepath.Dir(name), 0o755))
	assert.NilError(t, os.WriteFile(name, []byte(data), 0o644))
}

// result builds and returns what became of each component: "unchanged", or the time it took as "built".
func result(t *testing.T, root string, names ...string) map[string]string {
	t.Helper()
	var out bytes.Buffer
	assert.NilError(t, Run(t.Context(), root, &out, names))
	results := map[string]string{}
	for line := range strings.Lines(out.String()) {
		fields := strings.Fields(line)
		results[fields[0]] = fields[2]
		if strings.TrimRight(fields[2], ".") == "building" { // with a dot every now and then
			results[fields[0]] = "built"
		}
	}
	return results
}

func says(t *testing.T, root, name string) string {
	t.Helper()
	out, err := exec.Command(filepath.Join(root, "build/bin", name)).CombinedOutput()
	assert.NilError(t, err)
	return strings.TrimSpace(string(out))
}

func TestBuildsWhatHasChanged(t *testing.T) {
	root := newCheckout(t)
	assert.DeepEqual(t, result(t, root), map[string]string{
		"dockerd": "built", "dockerd-stock": "built", "proxy": "built", "start.sh": "built", "cli": "built",
	})
	assert.Equal(t, says(t, root, "dockerd"), "patched 29.0.0+berth.2 unknown")
	assert.Equal(t, says(t, root, "dockerd-stock"), "upstream 29.0.0 v1.0.0")
	assert.Equal(t, says(t, root, "proxy"), "proxy")
	assert.Equal(t, says(t, root, "start.sh"), "started")
	assert.Equal(t, says(t, root, "cli"), "cli 3.0.0")

	unchanged := map[string]string{
		"dockerd": "unchanged", "dockerd-stock": "unchanged", "proxy": "unchanged", "start.sh": "unchanged", "cli": "unchanged",
	}
	assert.DeepEqual(t, result(t, root), unchanged)

	// A test of the patch goes into the tree, and into no binary.
	write(t, filepath.Join(root, nat, "mapper_linux_test.go"), "package nat // more\n")
	assert.DeepEqual(t, result(t, root), unchanged)
	data, err := os.ReadFile(filepath.Join(root, "build/tree/v1.0.0/berth", nat, "mapper_linux_test.go"))
	assert.NilError(t, err)
	assert.Equal(t, string(data), "package nat // more\n")

	write(t, filepath.Join(root, nat, "mapper_linux.go"), "package nat\n\nconst Name = \"better\"\n")
	assert.NilError(t, os.Remove(filepath.Join(root, "build/bin/cli")))
	assert.DeepEqual(t, result(t, root), map[string]string{
		"dockerd": "built", "dockerd-stock": "unchanged", "proxy": "unchanged", "start.sh": "unchanged", "cli": "built",
	})
	assert.Equal(t, says(t, root, "dockerd"), "better 29.0.0+berth.2 unknown")

	// A change of a line is a change of what it builds.
	conf, err := os.ReadFile(filepath.Join(root, "vendor.conf"))
	assert.NilError(t, err)
	write(t, filepath.Join(root, "vendor.conf"), strings.ReplaceAll(string(conf), "patch=2", "patch=3"))
	assert.DeepEqual(t, result(t, root, "dockerd", "dockerd-stock"), map[string]string{"dockerd": "built", "dockerd-stock": "unchanged"})
	assert.Equal(t, says(t, root, "dockerd"), "better 29.0.0+berth.3 unknown")
}

func TestBuildsByName(t *testing.T) {
	root := newCheckout(t)
	assert.DeepEqual(t, result(t, root, "other", "start.sh"), map[string]string{"start.sh": "built", "other": "built"})
	assert.Equal(t, says(t, root, "other"), "proxy")

	err := Run(t.Context(), root, &bytes.Buffer{}, []string{"moby"})
	assert.Error(t, err, `no component "moby": there are dockerd, dockerd-race, dockerd-stock, proxy, start.sh, cli, other`)
}

func TestAnotherBaseIsBuiltBesideTheDefaultOne(t *testing.T) {
	root := newCheckout(t)
	result(t, root, "dockerd")
	older := Options{Base: "v0.9.0"}
	assert.NilError(t, older.Run(t.Context(), root, &bytes.Buffer{}, nil))
	says := func(name string) string {
		t.Helper()
		out, err := exec.Command(filepath.Join(older.Bin(root), name)).CombinedOutput()
		assert.NilError(t, err)
		return strings.TrimSpace(string(out))
	}
	assert.Equal(t, says("dockerd"), "patched 28.9.0+berth.2 unknown")
	assert.Equal(t, says("dockerd-stock"), "upstream 28.9.0 v0.9.0")
	assert.Equal(t, says("proxy"), "proxy")
	assert.Check(t, is.Len(files(t, older.Bin(root)), 4))
	assert.DeepEqual(t, result(t, root, "dockerd"), map[string]string{"dockerd": "unchanged"})

	var out bytes.Buffer
	assert.NilError(t, older.Run(t.Context(), root, &out, []string{"dockerd"}))
	assert.Check(t, is.Contains(out.String(), "unchanged"))
	assert.ErrorContains(t, Options{Base: "v0.7.0"}.Run(t.Context(), root, &out, nil), "no base v0.7.0 in vendor.conf: there are v1.0.0, v0.9.0, v0.8.0")
	assert.ErrorContains(t, older.Run(t.Context(), root, &out, []string{"cli"}), `no component "cli": there are dockerd, dockerd-race, dockerd-stock, proxy, start.sh`)
}

func TestRefusesABaseWhosePackageHasChanged(t *testing.T) {
	root := newCheckout(t)
	changed := Options{Base: "v0.8.0"}
	err := changed.Run(t.Context(), root, &bytes.Buffer{}, []string{"dockerd"})
	assert.ErrorContains(t, err, "v0.8.0's "+nat+" has changed: vendor.conf has nat=h1:wrong=, this is nat=h1:")
	assert.ErrorContains(t, err, "against v1.0.0:\n")
	assert.ErrorContains(t, err, "\n+const Old = true\n")
	assert.Check(t, is.Len(files(t, changed.Bin(root)), 0))
	assert.NilError(t, changed.Run(t.Context(), root, &bytes.Buffer{}, []string{"dockerd-stock"})) // is not patched

	changed.Force = true
	assert.NilError(t, changed.Run(t.Context(), root, &bytes.Buffer{}, []string{"dockerd"}))
}

func TestRaceIsThePatchWithTheDetector(t *testing.T) {
	root := newCheckout(t)
	assert.DeepEqual(t, result(t, root, Race), map[string]string{Race: "built"})
	assert.Equal(t, says(t, root, Race), "patched 29.0.0+berth.2 unknown")
	info, err := buildinfo.ReadFile(filepath.Join(root, "build/bin", Race))
	assert.NilError(t, err)
	assert.Check(t, is.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}))
	assert.DeepEqual(t, result(t, root, "dockerd", Race), map[string]string{"dockerd": "built", Race: "unchanged"})

	write(t, filepath.Join(root, nat, "mapper_linux.go"), "package nat\n\nconst Name = \"better\"\n")
	assert.DeepEqual(t, result(t, root, Race), map[string]string{Race: "built"})
}

func TestSourcesAreThoseOfTheirHash(t *testing.T) {
	root := newCheckout(t)
	name := filepath.Join(root, "vendor.conf")
	conf, err := os.ReadFile(name)
	assert.NilError(t, err)
	h1 := regexp.MustCompile(`h1=\S+`)

	write(t, name, h1.ReplaceAllString(string(conf), "h1="+strings.Repeat("0", 43)+"="))
	err = Run(t.Context(), root, &bytes.Buffer{}, []string{"cli"})
	assert.ErrorContains(t, err, "example.com/cli@v3.0.0+incompatible is not what it was: its hash is h1:")
	write(t, name, h1.ReplaceAllString(string(conf), ""))
	err = Run(t.Context(), root, &bytes.Buffer{}, []string{"cli"})
	assert.ErrorContains(t, err, "nothing says what example.com/cli@v3.0.0+incompatible must be: add its h1= to vendor.conf")
	write(t, filepath.Join(root, "go.sum"), "example.com/base v1.0.0 h1:"+strings.Repeat("0", 43)+"=\n")
	err = Run(t.Context(), root, &bytes.Buffer{}, []string{"dockerd"})
	assert.ErrorContains(t, err, "checksum mismatch") // go's own words
	_, err = os.Stat(filepath.Join(root, "build/tree"))
	assert.ErrorIs(t, err, os.ErrNotExist)
}

func TestBuildsForAnotherArchitecture(t *testing.T) {
	root := newCheckout(t)
	foreign := "arm64"
	if runtime.GOARCH == foreign {
		foreign = "amd64"
	}
	t.Setenv("GOARCH", foreign)
	assert.DeepEqual(t, result(t, root, "dockerd"), map[string]string{"dockerd": "built"})
	info, err := buildinfo.ReadFile(filepath.Join(root, "build/bin", foreign, "dockerd"))
	assert.NilError(t, err)
	assert.Check(t, is.Contains(info.Settings, debug.BuildSetting{Key: "GOARCH", Value: foreign}))
	assert.DeepEqual(t, result(t, root, "dockerd"), map[string]string{"dockerd": "unchanged"})
	t.Setenv("GOARCH", runtime.GOARCH)
	assert.DeepEqual(t, result(t, root, "dockerd"), map[string]string{"dockerd": "built"})
	assert.Equal(t, says(t, root, "dockerd"), "patched 29.0.0+berth.2 unknown")
}

func TestFailureShowsTheCompilersOutput(t *testing.T) {
	root := newCheckout(t)
	result(t, root, "dockerd")
	write(t, filepath.Join(root, nat, "mapper_linux.go"), "package nat\n\nconst Name = nothing\n")
	err := Run(t.Context(), root, &bytes.Buffer{}, nil)
	assert.ErrorContains(t, err, "undefined: nothing")
	assert.ErrorContains(t, err, "the whole log: build/log/dockerd.log")
	assert.Equal(t, says(t, root, "dockerd"), "patched 29.0.0+berth.2 unknown") // the one before is still there

	write(t, filepath.Join(root, "vendor.conf"), "gone example.com/gone v1.0.0 packages=. h1="+strings.Repeat("0", 43)+"=\n")
	err = Run(t.Context(), root, &bytes.Buffer{}, nil)
	assert.ErrorContains(t, err, "download example.com/gone@v1.0.0")
}

func TestDebianSourceIsMade(t *testing.T) {
	root := newCheckout(t)
	src := gofs.NewDir(t, "src", gofs.WithDir("tool-1.0", gofs.WithFile("Makefile", `FLAGS ?= none
tool: real
	ln -s real tool
real:
	printf '#!/bin/sh\necho $(VERSION) $(FLAGS)\n' >real; test '$(VERSION)' != broken
`)))
	archive := filepath.Join(root, "build/tree/tool/tool_1.0.orig.tar.bz2")
	assert.NilError(t, os.MkdirAll(filepath.Dir(archive), 0o755))
	_, err := output(t.Context(), src.Path(), "tar", "-cjf", archive, "tool-1.0")
	assert.NilError(t, err)
	data, err := os.ReadFile(archive)
	assert.NilError(t, err)
	line := func(release string) {
		t.Helper()
		write(t, filepath.Join(root, "vendor.conf"), fmt.Sprintf(
			"tool tool 1.0 debian=trixie sha256=%x release=%s files=tool optional=yes\n", sha256.Sum256(data), release))
	}
	t.Setenv("FLAGS", "ambient")
	t.Setenv("MAKEFLAGS", "n") // as in `make -n`, which says what it would do, and does nothing

	line("2025")
	assert.DeepEqual(t, result(t, root, "tool"), map[string]string{"tool": "built"})
	assert.Equal(t, says(t, root, "tool"), "2025 none")
	assert.DeepEqual(t, result(t, root, "tool"), map[string]string{"tool": "unchanged"})
	assert.DeepEqual(t, result(t, root), map[string]string{})
	line("2025 make=FLAGS=given")
	assert.DeepEqual(t, result(t, root, "tool"), map[string]string{"tool": "built"})
	assert.Equal(t, says(t, root, "tool"), "2025 given")

	line("broken")
	err = Run(t.Context(), root, &bytes.Buffer{}, []string{"tool"})
	assert.ErrorContains(t, err, "Makefile:5: real] Error 1")
	assert.ErrorContains(t, err, "the whole log: build/log/tool.log")
	assert.Equal(t, says(t, root, "tool"), "2025 given") // the one before is still there
}

// stopper stops a build when it says the word.
type stopper struct {
	word string
	stop func()
}

func (s stopper) Write(p []byte) (int, error) {
	if strings.Contains(string(p), s.word) {
		s.stop()
	}
	return len(p), nil
}

func TestStoppedBuildIsGoneOnWith(t *testing.T) {
	root := newCheckout(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err := Run(ctx, root, stopper{"building", cancel}, nil)
	assert.Error(t, err, "stopped: build again to go on from here")
	assert.Check(t, is.Len(files(t, filepath.Join(root, "build/bin")), 0))
	assert.Check(t, is.Len(files(t, filepath.Join(root, "build/stamp")), 0))
	assert.Equal(t, result(t, root)["dockerd"], "built")

	err = Run(ctx, root, &bytes.Buffer{}, nil)
	assert.Error(t, err, "stopped: build again to go on from here")
}

func TestWaitsForAnotherBuild(t *testing.T) {
	root := newCheckout(t)
	assert.NilError(t, os.Mkdir(filepath.Join(root, "build"), 0o755))
	unlock, err := lock(t.Context(), root, &bytes.Buffer{})
	assert.NilError(t, err)

	var out bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = lock(ctx, root, &out)
	assert.ErrorIs(t, err, context.DeadlineExceeded)
	assert.Check(t, is.Contains(out.String(), "another build is running"))

	second := make(chan error, 1)
	go func() {
		_, err := lock(t.Context(), root, &bytes.Buffer{})
		second <- err
	}()
	unlock()
	assert.NilError(t, <-second)
}

func TestCommitNamesTheLastChangeOfDockerd(t *testing.T) {
	root := newCheckout(t)
	git := func(arg ...string) string {
		t.Helper()
		arg = append([]string{"-c", "user.name=t", "-c", "user.email=t@example.com"}, arg...)
		out, err := output(t.Context(), root, "git", arg...)
		assert.NilError(t, err)
		return out
	}
	assert.Equal(t, commit(t.Context(), root), "unknown")
	git("init", "-q")
	git("add", ".")
	assert.Equal(t, commit(t.Context(), root), "unknown")
	git("commit", "-q", "-m", "one")
	first := git("rev-parse", "--short=12", "HEAD")
	assert.Equal(t, commit(t.Context(), root), first)

	write(t, filepath.Join(root, "README.md"), "words")
	git("add", ".")
	git("commit", "-q", "-m", "two")
	assert.Equal(t, commit(t.Context(), root), first)

	write(t, filepath.Join(root, nat, "new_linux.go"), "package nat\n")
	assert.Equal(t, commit(t.Context(), root), first+"-dirty")
}

func files(t *testing.T, dir string) []os.DirEntry {
	t.Helper()
	entries, err := os.ReadDir(dir)
	assert.NilError(t, err)
	return entries
}
