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
		{"name twice", "x example.com/x v1.0.0 packages=.\n" + good + "x example.com/x v1.0.0 packages=.", `vendor.conf:3: name "x" is already used on line 1`},
		{"base twice", good + "good example.com/good v1.0.0", `vendor.conf:2: name "good v1.0.0" is already used on line 1`},
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
		{"another base's settings", good + "good example.com/good v1.1.0 packages=.", "vendor.conf:2: packages=: another base takes it from the default one's line"},
		{"another base's module", good + "good example.com/x v1.1.0", `vendor.conf:2: name "good" is already that of example.com/good`},
		{"another base's version", good + "good example.com/good 1.1.0", "vendor.conf:2: example.com/good@1.1.0: invalid version"},
		{"patch", "x example.com/x v1.0.0 packages=. patch=0", "vendor.conf:1: patch=0: want a number"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Parse("vendor.conf", strings.NewReader(tc.in))
			assert.ErrorContains(t, err, tc.want)
		})
	}
}

func TestBases(t *testing.T) {
	list, err := Parse("vendor.conf", strings.NewReader(`
tool example.com/tool v1.2.3 packages=.
base example.com/base v1.3.0 release=30.0.1 patch=2 nat=h1:new= packages=./cmd/a tags=x version-var=v.V
base example.com/base v1.2.0 release=30.0.0 nat=h1:old=
base example.com/base v1.1.0
`))
	assert.NilError(t, err)
	newest := Pin{
		Name: "base", Module: "example.com/base", Version: "v1.3.0", Release: "30.0.1", Patch: 2, NAT: "h1:new=",
		Packages: []string{"./cmd/a"}, Tags: []string{"x"}, VersionVar: "v.V",
	}
	older, oldest := newest, newest
	older.Version, older.Release, older.NAT = "v1.2.0", "30.0.0", "h1:old="
	oldest.Version, oldest.Release, oldest.NAT = "v1.1.0", "1.1.0", ""
	assert.DeepEqual(t, Bases(list), []Pin{newest, older, oldest})

	base, err := Base(list, "")
	assert.NilError(t, err)
	assert.DeepEqual(t, base, newest)
	base, err = Base(list, "v1.2.0")
	assert.NilError(t, err)
	assert.DeepEqual(t, base, older)
	_, err = Base(list, "v1.0.0")
	assert.Error(t, err, "no base v1.0.0 in vendor.conf: there are v1.3.0, v1.2.0, v1.1.0")
	_, err = Base(list[:1], "")
	assert.ErrorContains(t, err, "vendor.conf has no base")
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

	base, err := Base(list, "")
	assert.NilError(t, err)
	both := map[string]bool{}
	for _, pin := range list {
		if pin.Patch != 0 && pin.Version != base.Version {
			continue // an older base
		}
		// Another version beside go.mod's is for tests that name it.
		if v, ok := required[pin.Module]; ok && (v == pin.Version || !pin.Optional) {
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
