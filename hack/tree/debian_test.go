package tree

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	gofs "gotest.tools/v3/fs"

	"berth/hack/pins"
)

// fakeApt is an apt-get of a machine with the mirrors in $FAKE/mirrors. It fetches what is in $FAKE/pool, and notes what
// it was asked for, and with which sources.
const fakeApt = `#!/bin/sh
set -eu
echo "$@" >>"$FAKE/asked"
case $* in
indextargets*) cat "$FAKE/mirrors" ;;
*update) cp sources.list "$FAKE/sources" ;;
*source*)
	[ ! -e "$FAKE/broken" ] || { echo "E: mirror gone" >&2; exit 100; }
	cp "$FAKE"/pool/* .
	;;
esac
`

// debian is a machine with a fake apt and its one source package.
func debian(t *testing.T) (fake string, pin pins.Pin) {
	t.Helper()
	fake = gofs.NewDir(t, "fake",
		gofs.WithFile("apt-get", fakeApt, gofs.WithMode(0o755)),
		gofs.WithFile("mirrors", "http://mirror.example/debian/\nhttp://mirror.example/debian/\n"),
		gofs.WithDir("pool"),
		gofs.WithDir("src/tool-1.0", gofs.WithFile("Makefile", "tool:\n"), gofs.WithFile("tool.c", "int main() {}\n")),
	).Path()
	t.Setenv("FAKE", fake)
	t.Setenv("PATH", fake+":"+os.Getenv("PATH"))
	archive := filepath.Join(fake, "pool", "libtool_1.0.orig.tar.xz")
	out, err := exec.Command("tar", "-cJf", archive, "-C", filepath.Join(fake, "src"), "tool-1.0").CombinedOutput()
	assert.NilError(t, err, "%s", out)
	data, err := os.ReadFile(archive)
	assert.NilError(t, err)
	sum := fmt.Sprintf("%x", sha256.Sum256(data))
	return fake, pins.Pin{Name: "tool", Module: "libtool", Version: "1.0", Debian: "trixie", SHA256: sum, Files: []string{"tool"}}
}

func TestDebianSourceIsFetchedOnce(t *testing.T) {
	fake, pin := debian(t)
	root := t.TempDir()
	asked := func() string {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(fake, "asked"))
		assert.NilError(t, err)
		return string(data)
	}
	want := map[string]string{"Makefile": "tool:\n", "tool.c": "int main() {}\n"}

	dir, err := Debian(t.Context(), root, pin)
	assert.NilError(t, err)
	assert.Equal(t, dir, filepath.Join(root, "build/tree/tool/1.0"))
	assert.DeepEqual(t, contents(t, dir), want)
	assert.Equal(t, strings.Count(asked(), "\n"), 3, asked())
	sources, err := os.ReadFile(filepath.Join(fake, "sources"))
	assert.NilError(t, err)
	assert.Equal(t, string(sources), "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian/ trixie main\n")

	// What was made in the tree is gone, what was damaged is right again.
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "tool"), nil, 0o755))
	assert.NilError(t, os.Remove(filepath.Join(dir, "tool.c")))
	_, err = Debian(t.Context(), root, pin)
	assert.NilError(t, err)
	assert.DeepEqual(t, contents(t, dir), want)
	assert.Equal(t, strings.Count(asked(), "\n"), 3, asked())

	assert.NilError(t, os.WriteFile(filepath.Join(root, "build/tree/tool/libtool_1.0.orig.tar.xz"), []byte("half"), 0o644))
	_, err = Debian(t.Context(), root, pin)
	assert.NilError(t, err)
	assert.Equal(t, strings.Count(asked(), "\n"), 6, asked())
}

func TestDebianSourceThatCannotBeHad(t *testing.T) {
	for _, tc := range []struct {
		name, want string
		spoil      func(t *testing.T, fake string, pin *pins.Pin)
	}{
		{"no mirror", "apt knows no Debian mirror here", func(t *testing.T, fake string, _ *pins.Pin) {
			assert.NilError(t, os.WriteFile(filepath.Join(fake, "mirrors"), nil, 0o644))
		}},
		{"apt fails", "E: mirror gone", func(t *testing.T, fake string, _ *pins.Pin) {
			assert.NilError(t, os.WriteFile(filepath.Join(fake, "broken"), nil, 0o644))
		}},
		{"another version", "trixie has another version of libtool", func(_ *testing.T, _ string, pin *pins.Pin) {
			pin.Version = "0.9"
		}},
		{"another archive", "the sha256 of libtool_1.0.orig.tar.xz is ", func(_ *testing.T, _ string, pin *pins.Pin) {
			pin.SHA256 = strings.Repeat("0", 64)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fake, pin := debian(t)
			tc.spoil(t, fake, &pin)
			root := t.TempDir()
			_, err := Debian(t.Context(), root, pin)
			assert.ErrorContains(t, err, tc.want)
			assert.ErrorContains(t, err, "or put it into "+filepath.Join(root, "build/tree/tool"))
			assert.DeepEqual(t, contents(t, root), map[string]string{})
		})
	}
}
