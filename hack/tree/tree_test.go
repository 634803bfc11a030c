package tree

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
	gofs "gotest.tools/v3/fs"

	"berth/hack/pins"
)

var base = pins.Pin{Name: "base", Module: "example.com/base", Version: "v1.0.0"}

// published is a small base, read-only as in the module cache.
func published(t *testing.T) string {
	return gofs.NewDir(t, "module",
		gofs.WithFile("go.mod", "module example.com/base\n", gofs.WithMode(0o444)),
		gofs.WithDir("daemon/libnetwork/portmappers/nat",
			gofs.WithFile("mapper_linux.go", "package nat // upstream's\n", gofs.WithMode(0o444)),
			gofs.WithFile("mapper_linux_test.go", "package nat // upstream's test\n", gofs.WithMode(0o444)),
		),
	).Path()
}

// checkout is a small Berth.
func checkout(t *testing.T) string {
	return gofs.NewDir(t, "root",
		gofs.WithFile("vendor.conf", ""),
		gofs.WithDir(PatchDir,
			gofs.WithFile("mapper_linux.go", "package nat // ours\n"),
			gofs.WithFile("search_linux.go", "package nat // ours too\n"),
			gofs.WithFile(".search_linux.go.swp", "an editor's"),
			gofs.WithDir("testdata", gofs.WithFile("seed", "1")),
		),
	).Path()
}

func TestTreesDifferInThePatchOnly(t *testing.T) {
	root, module := checkout(t), published(t)
	stock, err := Stock(root, base, module)
	assert.NilError(t, err)
	assert.Equal(t, stock, filepath.Join(root, "build/tree/v1.0.0/stock"))
	assert.DeepEqual(t, contents(t, stock), contents(t, module))

	berth, err := Berth(root, base, module)
	assert.NilError(t, err)
	assert.Equal(t, berth, filepath.Join(root, "build/tree/v1.0.0/berth"))
	want := contents(t, module)
	want[PatchDir+"/mapper_linux.go"] = "package nat // ours\n"
	want[PatchDir+"/search_linux.go"] = "package nat // ours too\n"
	want[PatchDir+"/testdata/seed"] = "1"
	assert.DeepEqual(t, contents(t, berth), want)
}

func TestUnchangedFilesAreLeftAlone(t *testing.T) {
	root, module := checkout(t), published(t)
	dir, err := Berth(root, base, module)
	assert.NilError(t, err)
	then := time.Now().Add(-time.Hour).Truncate(time.Second)
	old := filepath.Join(dir, "go.mod")
	assert.NilError(t, os.Chtimes(old, then, then))

	assert.NilError(t, os.WriteFile(filepath.Join(root, PatchDir, "search_linux.go"), []byte("package nat // more\n"), 0o600))
	_, err = Berth(root, base, module)
	assert.NilError(t, err)
	assert.Equal(t, contents(t, dir)[PatchDir+"/search_linux.go"], "package nat // more\n")
	info, err := os.Stat(old)
	assert.NilError(t, err)
	assert.Check(t, info.ModTime().Equal(then))
}

func TestFilesGoneFromThePatchLeaveTheTree(t *testing.T) {
	root, module := checkout(t), published(t)
	_, err := Berth(root, base, module)
	assert.NilError(t, err)

	assert.NilError(t, os.Remove(filepath.Join(root, PatchDir, "mapper_linux.go")))
	assert.NilError(t, os.RemoveAll(filepath.Join(root, PatchDir, "testdata")))
	dir, err := Berth(root, base, module)
	assert.NilError(t, err)
	want := contents(t, module) // upstream's own mapper_linux.go is back
	want[PatchDir+"/search_linux.go"] = "package nat // ours too\n"
	assert.DeepEqual(t, contents(t, dir), want)
	_, err = os.Stat(filepath.Join(dir, PatchDir, "testdata"))
	assert.ErrorIs(t, err, fs.ErrNotExist)
}

func TestDamagedTreeIsPutRight(t *testing.T) {
	root, module := checkout(t), published(t)
	dir, err := Stock(root, base, module)
	assert.NilError(t, err)
	inTree := func(rel string) string { return filepath.Join(dir, rel) }
	assert.NilError(t, os.WriteFile(inTree("go.mod.tmp"), []byte("modul"), 0o600)) // as an interrupted copy leaves it
	assert.NilError(t, os.Remove(inTree("go.mod")))
	assert.NilError(t, os.WriteFile(inTree(PatchDir+"/mapper_linux.go"), []byte("package nat // edited"), 0o644))
	assert.NilError(t, os.Remove(inTree(PatchDir+"/mapper_linux_test.go")))
	assert.NilError(t, os.MkdirAll(inTree(PatchDir+"/mapper_linux_test.go/now/a/folder"), 0o755))
	assert.NilError(t, os.Symlink("go.mod", inTree("link")))

	_, err = Stock(root, base, module)
	assert.NilError(t, err)
	assert.DeepEqual(t, contents(t, dir), contents(t, module))
}

func TestMissingPatchIsAnError(t *testing.T) {
	root, module := t.TempDir(), published(t)
	_, err := Berth(root, base, module)
	assert.ErrorContains(t, err, PatchDir)
	assert.NilError(t, os.MkdirAll(filepath.Join(root, PatchDir), 0o755))
	_, err = Berth(root, base, module)
	assert.ErrorContains(t, err, "the patch is missing")
}

func TestNATHashIsOfWhatIsCompiled(t *testing.T) {
	was, module := published(t), published(t)
	before, err := NATHash(was)
	assert.NilError(t, err)
	change := func(name, text string) string {
		t.Helper()
		name = filepath.Join(module, PatchDir, name)
		assert.NilError(t, os.Chmod(name, 0o644))
		assert.NilError(t, os.WriteFile(name, []byte(text), 0o644))
		hash, err := NATHash(module)
		assert.NilError(t, err)
		return hash
	}
	assert.Equal(t, change("mapper_linux_test.go", "package nat // another test\n"), before)
	assert.Check(t, change("mapper_linux.go", "package nat // changed\n") != before)

	diff, err := Diff(t.Context(), was, module, PatchDir)
	assert.NilError(t, err)
	assert.Check(t, is.Contains(diff, "\n--- a/"+PatchDir+"/mapper_linux.go\n"))
	assert.Check(t, is.Contains(diff, "\n-package nat // upstream's\n+package nat // changed\n"))
	diff, err = Diff(t.Context(), was, was, PatchDir)
	assert.NilError(t, err)
	assert.Equal(t, diff, "")
	_, err = Diff(t.Context(), was, module, "gone")
	assert.ErrorContains(t, err, "compare gone")
}

func TestVendoredModuleGetsItsGoMod(t *testing.T) {
	module := gofs.NewDir(t, "module",
		gofs.WithFile("vendor.mod", "module example.com/cli\n"),
		gofs.WithFile("vendor.sum", "sums\n"),
		gofs.WithFile("main.go", "package main\n"),
		gofs.WithDir("vendor", gofs.WithFile("modules.txt", "# a list\n")),
	).Path()
	pin := pins.Pin{Name: "cli", Version: "v1.0.0+incompatible"}
	root := t.TempDir()
	dir, err := Vendored(root, pin, module)
	assert.NilError(t, err)
	assert.Equal(t, dir, filepath.Join(root, "build/tree/cli/v1.0.0+incompatible"))
	assert.DeepEqual(t, contents(t, dir), map[string]string{
		"go.mod":  "module example.com/cli\n",
		"go.sum":  "sums\n",
		"main.go": "package main\n",
	})
}

func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	files, err := list(dir)
	assert.NilError(t, err)
	for rel, path := range files {
		data, err := os.ReadFile(path)
		assert.NilError(t, err)
		files[rel] = string(data)
	}
	return files
}
