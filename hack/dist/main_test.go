package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// Two copies of the checkout, in folders of different names and made at different times, come out as the same archive.
func TestArchiveIsTheSameFromTwoFolders(t *testing.T) {
	files, err := exec.Command("git", "-C", "../..", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", "go.mod", "go.sum", "hack", "integration", "README.md").Output()
	assert.NilError(t, err)
	var archives [][]byte
	for i, name := range []string{"a", "a-longer-name"} {
		top := t.TempDir()
		root, stage := filepath.Join(top, name), filepath.Join(top, "berth-1")
		for file := range strings.SplitSeq(strings.TrimSuffix(string(files), "\x00"), "\x00") {
			data, err := os.ReadFile(filepath.Join("../..", file))
			if os.IsNotExist(err) { // removed, and not committed yet
				continue
			}
			assert.NilError(t, err)
			to := filepath.Join(root, file)
			assert.NilError(t, os.MkdirAll(filepath.Dir(to), 0o755))
			assert.NilError(t, os.WriteFile(to, data, 0o644))
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
