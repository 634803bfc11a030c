package pins

import (
	"errors"
	"os"
	"strings"
	"testing"
	"testing/iotest"

	"golang.org/x/mod/modfile"
	"gotest.tools/v3/assert"
)

const (
	vendorConf = "../../vendor.conf"
	goMod      = "../../go.mod"
)

func TestParse(t *testing.T) {
	list, err := Parse("vendor.conf", strings.NewReader(`
# a comment, and an empty line

  base	example.com/base/v2  v2.0.0-beta.1 release=29.0.0 patch=3 packages=./cmd/a,./cmd/b files=contrib/c.sh version-var=v.V commit-var=v.C
tool example.com/tool v1.2.3+incompatible packages=. cgo=yes tags=x,y optional=yes h1=0123456789abcdef0123456789abcdef0123456789+=
made libmade++ 1.0~git20250503 debian=trixie sha256=0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef make=config,X=-y files=a,b
`))
	assert.NilError(t, err)
	assert.DeepEqual(t, list, []Pin{
		{
			Name: "base", Module: "example.com/base/v2", Version: "v2.0.0-beta.1", Release: "29.0.0", Patch: 3,
			Packages: []string{"./cmd/a", "./cmd/b"}, Files: []string{"contrib/c.sh"}, VersionVar: "v.V", CommitVar: "v.C",
		},
		{
			Name: "tool", Module: "example.com/tool", Version: "v1.2.3+incompatible", Release: "1.2.3",
			Packages: []string{"."}, Tags: []string{"x", "y"}, CGO: true, Optional: true,
			Sum: "h1:0123456789abcdef0123456789abcdef0123456789+=",
		},
		{
			Name: "made", Module: "libmade++", Version: "1.0~git20250503", Release: "1.0~git20250503", Files: []string{"a", "b"},
			Debian: "trixie", SHA256: strings.Repeat("0123456789abcdef", 4), Make: []string{"config", "X=-y"},
		},
	})
}

func TestParseSaysLineAndMistake(t *testing.T) {
	const good = "good example.com/good v1.0.0 packages=. patch=1\n"
	for _, tc := range []struct{ name, in, want string }{
		{"too short", "x example.com/x", `vendor.conf:1: want a name, a module and a version, got "x example.com/x"`},
		{"module path", "x nodot v1.0.0 packages=.", "vendor.conf:1: malformed module path"},
		{"version", "x example.com/x 1.0.0 packages=.", "vendor.conf:1: example.com/x@1.0.0: invalid version"},
		{"major version", "x example.com/x v2.0.0 packages=.", "vendor.conf:1: example.com/x@v2.0.0: invalid version"},
		{"no value", good + "x example.com/x v1.0.0 packages", `vendor.conf:2: want key=value, got "packages"`},
		{"empty value", good + "x example.com/x v1.0.0 packages=", `vendor.conf:2: want key=value, got "packages="`},
		{"unknown key", good + "\n# comment\nx example.com/x v1.0.0 package=.", `vendor.conf:4: unknown key "package"`},
		{"key twice", "x example.com/x v1.0.0 packages=. packages=./y", "vendor.conf:1: packages is given twice"},
		{"name twice", good + "good example.com/x v1.0.0 packages=.", `vendor.conf:2: name "good" is already used on line 1`},
		{"second base", good + "x example.com/x v1.0.0 packages=. patch=2", "vendor.conf:2: a second base (patch=2): the first is on line 1"},
		{"nothing to build", "x example.com/x v1.0.0 cgo=yes", "vendor.conf:1: nothing to build"},
		{"package", "x example.com/x v1.0.0 packages=cmd/x", `vendor.conf:1: package "cmd/x": want`},
		{"cgo", "x example.com/x v1.0.0 packages=. cgo=1", "vendor.conf:1: cgo=1: want cgo=yes"},
		{"sha256 of a Go module", "x example.com/x v1.0.0 packages=. sha256=1", "vendor.conf:1: sha256= and make= are for lines with debian="},
		{"make of a Go module", "x example.com/x v1.0.0 packages=. make=x", "vendor.conf:1: sha256= and make= are for lines with debian="},
		{"h1", "x example.com/x v1.0.0 packages=. h1=1", "vendor.conf:1: h1:1: want h1= and the 44 characters"},
		{"h1 of a Debian package", "x x 1.0 debian=trixie files=x h1=1", "vendor.conf:1: h1= is for Go modules"},
		{"Go package in a Debian package", "x x 1.0 debian=trixie packages=.", "vendor.conf:1: packages= is for Go modules"},
		{"Debian package", "x ../x 1.0 debian=trixie files=x", `vendor.conf:1: malformed Debian source package "../x"`},
		{"Debian revision", "x x 1.0-2 debian=trixie files=x", "vendor.conf:1: x 1.0-2: want an upstream version"},
		{"no sha256", "x x 1.0 debian=trixie files=x", "vendor.conf:1: sha256=: want the 64 hexadecimal digits"},
		{"patch", "x example.com/x v1.0.0 packages=. patch=0", "vendor.conf:1: patch=0: want a number"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Parse("vendor.conf", strings.NewReader(tc.in))
			assert.ErrorContains(t, err, tc.want)
		})
	}
}

func TestParseReportsReadErrors(t *testing.T) {
	broken := errors.New("disk gone")
	_, err := Parse("vendor.conf", iotest.ErrReader(broken))
	assert.ErrorIs(t, err, broken)
	_, err = Load(t.TempDir() + "/none")
	assert.ErrorIs(t, err, os.ErrNotExist)
}

// The patch is compiled and tested against go.mod's modules and shipped in vendor.conf's: they must be the same.
func TestVendorConfAgreesWithGoMod(t *testing.T) {
	list, err := Load(vendorConf)
	assert.NilError(t, err)
	data, err := os.ReadFile(goMod)
	assert.NilError(t, err)
	mod, err := modfile.Parse(goMod, data, nil)
	assert.NilError(t, err)
	required := map[string]string{}
	for _, r := range mod.Require {
		required[r.Mod.Path] = r.Mod.Version
	}

	both := map[string]bool{}
	for _, pin := range list {
		if v, ok := required[pin.Module]; ok {
			both[pin.Module] = true
			assert.Check(t, v == pin.Version, "%s: vendor.conf has %s, go.mod has %s", pin.Module, pin.Version, v)
		}
	}
	for _, path := range []string{"github.com/moby/moby/v2", "github.com/rootless-containers/rootlesskit/v2", "github.com/rootless-containers/rootlesskit/v3"} {
		assert.Check(t, both[path], "%s must be in vendor.conf and in go.mod", path)
	}
}

// In one place, so that a new version is never held against the old one's.
func TestEverySourceHasOneChecksum(t *testing.T) {
	list, err := Load(vendorConf)
	assert.NilError(t, err)
	goSum, err := os.ReadFile("../../go.sum")
	assert.NilError(t, err)
	for _, pin := range list {
		if pin.Debian == "" {
			listed := strings.Contains("\n"+string(goSum), "\n"+pin.Module+" "+pin.Version+" h1:")
			assert.Check(t, listed != (pin.Sum != ""), "%s %s: in go.sum: %v, h1= in vendor.conf: %q", pin.Module, pin.Version, listed, pin.Sum)
		}
	}
}
