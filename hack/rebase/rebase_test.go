package rebase

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
	gofs "gotest.tools/v3/fs"

	"berth/hack/pins"
	"berth/hack/tree"
)

const oldSum = "h1:0123456789abcdef0123456789abcdef0123456789+="

// upstream is a small version of it.
func upstream(t *testing.T, nat, api, bridge string) string {
	t.Helper()
	return gofs.NewDir(t, "module",
		gofs.WithDir(tree.PatchDir, gofs.WithFile("mapper_linux.go", nat), gofs.WithFile("mapper_linux_test.go", api)),
		gofs.WithDir(watched[1], gofs.WithFile("api.go", api)),
		gofs.WithDir(callers,
			gofs.WithFile("port_mapping_linux.go", "package bridge\n\nvar _ portmapperapi.PortBinding\n"+bridge),
			gofs.WithFile("link.go", "package bridge\n"+api),
		),
		gofs.WithDir("releases", gofs.WithFile("versions.yaml", "docker:\n  last: \"30.0.1\"\n  next: \"30.0.2\"\n")),
	).Path()
}

// checkout is a small Berth whose base is v1.1.0, in the folder was.
func checkout(t *testing.T, was string) (root string, old pins.Pin) {
	t.Helper()
	hash, err := tree.NATHash(was)
	assert.NilError(t, err)
	root = gofs.NewDir(t, "root",
		gofs.WithFile("go.mod", "module berth\n"),
		gofs.WithFile("go.sum", "example.com/base v1.1.0 "+oldSum+"\n"),
		gofs.WithFile("vendor.conf", `# bases
base   example.com/base v1.1.0  release=30.0.0 patch=3 nat=`+hash+` packages=./cmd/dockerd
base   example.com/base v1.0.0  release=29.0.0 nat=h1:old=
other  example.com/other v1.1.0 packages=.
`),
		gofs.WithDir("build", gofs.WithFile("large", "")),
		gofs.WithDir("docs", gofs.WithFile("words.md", "words")),
	).Path()
	list, err := pins.Load(filepath.Join(root, "vendor.conf"))
	assert.NilError(t, err)
	old, err = pins.Base(list, "")
	assert.NilError(t, err)
	return root, old
}

func read(t *testing.T, name ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(name...))
	assert.NilError(t, err)
	return string(data)
}

func TestNewBaseIsTakenWhenItWorks(t *testing.T) {
	was := upstream(t, "package nat\n", "package a\n", "")
	module := upstream(t, "package nat\n", "package a\n\nvar X, Y int\n", "var Z int\n")
	root, old := checkout(t, was)
	before := read(t, root, "vendor.conf")
	var out strings.Builder
	r := Rebase{Root: root, Version: "v1.2.0", Out: &out, DryRun: true}
	tried := 0
	check := func(_ context.Context, dir string, _ pins.Pin) error {
		tried++
		assert.Equal(t, read(t, root, "vendor.conf"), before)
		assert.Equal(t, read(t, dir, "docs", "words.md"), "words")
		_, err := os.Stat(filepath.Join(dir, "build"))
		assert.ErrorIs(t, err, os.ErrNotExist)
		return os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module berth // new\n"), 0o644)
	}
	assert.NilError(t, r.from(t.Context(), old, was, module, check))
	assert.Equal(t, read(t, root, "vendor.conf"), before)
	assert.Equal(t, read(t, root, "go.mod"), "module berth\n")
	for _, want := range []string{
		"\n  daemon/libnetwork/portmappers/nat          unchanged\n", // its test is not counted
		"\n  daemon/libnetwork/portmapperapi            2 lines added, 0 removed\n",
		"\n  daemon/libnetwork/drivers/bridge           1 lines added, 0 removed\n", // nor a file that calls no port mapper
		"\nv1.2.0 works; nothing was changed\n",
	} {
		assert.Check(t, is.Contains(out.String(), want))
	}
	diff := read(t, root, "build/rebase/v1.2.0.diff")
	assert.Check(t, is.Contains(diff, "\n+++ b/daemon/libnetwork/portmapperapi/api.go\n"))

	r.DryRun = false
	assert.NilError(t, r.from(t.Context(), old, was, module, check))
	assert.Equal(t, tried, 2)
	assert.Equal(t, read(t, root, "go.mod"), "module berth // new\n")
	assert.Equal(t, read(t, root, "vendor.conf"), `# bases
base   example.com/base v1.2.0  release=30.0.1 patch=1 nat=`+old.NAT+` packages=./cmd/dockerd
base   example.com/base v1.1.0  release=30.0.0 nat=`+old.NAT+` h1=`+strings.TrimPrefix(oldSum, "h1:")+`
base   example.com/base v1.0.0  release=29.0.0 nat=h1:old=
other  example.com/other v1.1.0 packages=.
`)
	_, err := os.Stat(filepath.Join(root, "build/rebase/v1.2.0"))
	assert.ErrorIs(t, err, os.ErrNotExist)
}

func TestBaseThatDoesNotWorkIsNotTaken(t *testing.T) {
	was := upstream(t, "package nat\n", "package a\n", "")
	root, old := checkout(t, was)
	before := read(t, root, "vendor.conf")
	boom := errors.New("boom")
	r := Rebase{Root: root, Version: "v1.2.0", Out: &strings.Builder{}}
	err := r.from(t.Context(), old, was, was, func(context.Context, string, pins.Pin) error { return boom })
	assert.ErrorIs(t, err, boom)
	assert.ErrorContains(t, err, "v1.2.0 does not work: v1.1.0 is the last base that did, and stays")
	assert.Equal(t, read(t, root, "vendor.conf"), before)

	ctx, cancel := context.WithCancel(t.Context())
	err = r.from(ctx, old, was, was, func(context.Context, string, pins.Pin) error { cancel(); return boom })
	assert.ErrorContains(t, err, "stopped: nothing was changed")
}

func TestChangedPackageIsLookedAtFirst(t *testing.T) {
	was := upstream(t, "package nat\n", "package a\n", "")
	module := upstream(t, "package nat\n\nconst Fixed = true\n", "package a\n", "")
	root, old := checkout(t, was)
	var out strings.Builder
	r := Rebase{Root: root, Version: "v1.2.0", Out: &out}
	check := func(context.Context, string, pins.Pin) error { return nil }
	err := r.from(t.Context(), old, was, module, check)
	assert.ErrorContains(t, err, tree.PatchDir+" has changed: put into the patch what is new there, and go on with --force:\n")
	assert.ErrorContains(t, err, "\n+const Fixed = true\n")

	r.Force = true
	assert.NilError(t, r.from(t.Context(), old, was, module, check))
	hash, err := tree.NATHash(module)
	assert.NilError(t, err)
	assert.Check(t, is.Contains(read(t, root, "vendor.conf"), "v1.2.0  release=30.0.1 patch=1 nat="+hash+" "))
}

func TestOlderVersionIsRefused(t *testing.T) {
	root, _ := checkout(t, upstream(t, "package nat\n", "", ""))
	for _, version := range []string{"v1.1.0", "v1.0.0", "master", ""} {
		err := Rebase{Root: root, Version: version}.Run(t.Context())
		assert.ErrorContains(t, err, "want a version of example.com/base that is newer than v1.1.0")
	}
}

func TestReleaseIsUpstreamsOwn(t *testing.T) {
	for text, want := range map[string]string{
		"docker:\n  current: \"29.5.1\"\n  next: \"29.5.2\"\n": "29.5.1",
		"docker:\n  last: \"29.8.0\"\n":                        "29.8.0",
	} {
		got, err := releaseOf(gofs.NewDir(t, "m", gofs.WithDir("releases", gofs.WithFile("versions.yaml", text))).Path())
		assert.NilError(t, err)
		assert.Equal(t, got, want)
	}
	_, err := releaseOf(t.TempDir())
	assert.ErrorContains(t, err, "say it with --release")
}
