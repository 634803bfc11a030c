package main

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// Two copies of the checkout, in folders of different names and made at different times, come out as the same archive.
func TestArchiveIsTheSameFromTwoFolders(t *testing.T) {
	var archives [][]byte
	for i, name := range []string{"a", "a-longer-name"} {
		top := t.TempDir()
		root, stage := filepath.Join(top, name), filepath.Join(top, "berth-1")
		for _, dir := range []string{"hack", "integration"} {
			assert.NilError(t, os.CopyFS(filepath.Join(root, dir), os.DirFS(filepath.Join("../..", dir))))
		}
		for _, name := range []string{"go.mod", "go.sum"} {
			data, err := os.ReadFile(filepath.Join("../..", name))
			assert.NilError(t, err)
			assert.NilError(t, os.WriteFile(filepath.Join(root, name), data, 0o644))
		}
		assert.NilError(t, os.MkdirAll(stage, 0o700+os.FileMode(i)))
		assert.NilError(t, os.WriteFile(filepath.Join(stage, "README.md"), []byte("read me"), 0o600+os.FileMode(i)<<2))
		old := time.Unix(int64(i)*1e6, 0)
		assert.NilError(t, os.Chtimes(filepath.Join(stage, "README.md"), old, old))
		assert.NilError(t, buildBerth(t.Context(), root, runtime.GOARCH, filepath.Join(stage, "berth")))

		file := filepath.Join(top, "berth.tar.gz")
		assert.NilError(t, archive(file, stage, time.Unix(1e9, 0).UTC()))
		data, err := os.ReadFile(file)
		assert.NilError(t, err)
		archives = append(archives, data)
	}
	assert.Assert(t, len(archives[0]) > 1<<20, "berth is not in it")
	assert.Assert(t, bytes.Equal(archives[0], archives[1]))
}
