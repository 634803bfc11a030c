package checkout

import (
	"os"
	"path/filepath"
	"testing"

	"gotest.tools/v3/assert"
)

func TestAboveIsTheModulesOwnFolder(t *testing.T) {
	dir := t.TempDir()
	deep := filepath.Join(dir, "a", "b")
	assert.NilError(t, os.MkdirAll(deep, 0o755))
	write := func(folder, text string) {
		t.Helper()
		assert.NilError(t, os.WriteFile(filepath.Join(dir, folder, "go.mod"), []byte(text), 0o644))
	}
	_, ok := above(deep)
	assert.Assert(t, !ok)
	write(".", "// Berth's\nmodule berth\n")
	write("a", "module other\n") // as a module of test clients
	root, ok := above(deep)
	assert.Assert(t, ok)
	assert.Equal(t, root, dir)
}

func TestRootHasWhatIsBuiltFrom(t *testing.T) {
	root, err := Root()
	assert.NilError(t, err)
	_, err = os.Stat(filepath.Join(root, "vendor.conf"))
	assert.NilError(t, err)
	assert.Equal(t, Bin(root, "dockerd"), filepath.Join(root, "build", "bin", "dockerd"))
	assert.Equal(t, Bin(root), filepath.Dir(Bin(root, "dockerd")))
}
