//go:build integration

package upstream

import (
	"debug/buildinfo"
	"go/types"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/exp/apidiff"
	"golang.org/x/tools/go/packages"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/tree"
)

// sameAPI compares what the two trees' nat packages export. Whatever is written against upstream's compiles with the patch.
func sameAPI(t *testing.T, b *base) {
	stock := load(t, b.stock)
	assert.Assert(t, stock.Scope().Lookup("NewPortMapper") != nil, "this is not the package: it has %s", stock.Scope().Names())
	var incompatible, compatible []string
	for _, change := range apidiff.Changes(stock, load(t, b.berth)).Changes {
		if change.Compatible {
			compatible = append(compatible, change.Message)
		} else {
			incompatible = append(incompatible, change.Message)
		}
	}
	t.Logf("%d compatible changes: %s", len(compatible), strings.Join(compatible, "; "))
	assert.Assert(t, is.Len(incompatible, 0))
	if len(compatible) == 0 {
		b.tell("same")
	} else {
		b.tell("compatible: %s", strings.Join(compatible, "; "))
	}
}

func load(t *testing.T, dir string) *types.Package {
	t.Helper()
	list, err := packages.Load(&packages.Config{
		Context: t.Context(), Dir: dir, Env: goEnv(), BuildFlags: []string{"-trimpath"}, Mode: packages.LoadTypes,
	}, "./"+tree.PatchDir)
	assert.NilError(t, err)
	assert.Assert(t, is.Len(list, 1))
	assert.Assert(t, is.Len(list[0].Errors, 0))
	return list[0].Types
}

// sameModules compares what the two daemons say that they are made of, as `go version -m` does.
func sameModules(t *testing.T, b *base) {
	stock, berth := modules(t, filepath.Join(b.bin, "dockerd-stock")), modules(t, filepath.Join(b.bin, "dockerd"))
	assert.Assert(t, len(stock) > 100, "these are not a dockerd's: %s", stock)
	assert.DeepEqual(t, berth, stock)
	b.tell("same %d", len(stock))
}

func modules(t *testing.T, binary string) []string {
	t.Helper()
	info, err := buildinfo.ReadFile(binary)
	assert.NilError(t, err)
	list := []string{info.GoVersion, info.Path}
	for _, m := range info.Deps {
		list = append(list, strings.Join([]string{m.Path, m.Version, m.Sum}, " "))
		assert.Check(t, m.Replace == nil, "%s is replaced", m.Path)
	}
	return list
}
