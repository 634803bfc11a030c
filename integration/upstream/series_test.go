//go:build integration

package upstream

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/patch"
	"berth/hack/tree"
)

// seriesHolds applies the mails that `berth patch` writes to the base, as whoever gets them does. After each, the package compiles and vets and,
// on the oldest and on the default base of a run with -bases, passes its tests and upstream's. After the last, the package is the patched one,
// and nothing is left when all are taken back.
func seriesHolds(t *testing.T, b *base) {
	// The user who signs it off is none of this machine's.
	for name, value := range map[string]string{
		"GIT_CONFIG_COUNT": "2", "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "Berth's tests",
		"GIT_CONFIG_KEY_1": "user.email", "GIT_CONFIG_VALUE_1": "tests@berth.invalid",
	} {
		t.Setenv(name, value)
	}
	mails := writeTwice(t, b)
	repo := filepath.Join(t.TempDir(), "repo")
	assert.NilError(t, os.CopyFS(repo, os.DirFS(b.stock)))
	git(t, repo, "init", "-q")
	git(t, repo, "add", "--all", "--force")
	git(t, repo, "commit", "-q", "-m", b.Version)
	before := git(t, repo, "rev-parse", "HEAD^{tree}")

	for _, mail := range mails[1:] { // the first one is the cover letter
		git(t, repo, "am", "-q", mail)
		goTool(t, repo, "vet", "./"+tree.PatchDir)
		if b.stepsTested {
			goTool(t, repo, "test", "-count=1", "./"+tree.PatchDir)
		}
	}
	goTool(t, repo, "vet", "./daemon/libnetwork/...", "./integration/networking")
	assert.DeepEqual(t, packageIn(t, repo), packageIn(t, b.berth))
	assert.Equal(t, git(t, repo, "status", "--porcelain"), "")

	for i := len(mails) - 1; i > 0; i-- {
		git(t, repo, "apply", "--index", "--reverse", mails[i])
	}
	assert.Equal(t, git(t, repo, "write-tree"), before)
	if b.stepsTested {
		b.tell("%d commits, each tested", len(mails)-1)
	} else {
		b.tell("%d commits apply", len(mails)-1)
	}
}

// writeTwice returns the mails' files, in order.
func writeTwice(t *testing.T, b *base) []string {
	t.Helper()
	contents := make([]map[string]string, 2)
	var files []string
	for i := range contents {
		s := patch.Series{Root: b.root, Base: b.Pin, Module: b.stock, Dir: filepath.Join(t.TempDir(), "mails")}
		assert.NilError(t, s.Write(t.Context()))
		var err error
		files, err = filepath.Glob(filepath.Join(s.Dir, "*.patch"))
		assert.NilError(t, err)
		contents[i] = map[string]string{}
		for _, file := range files {
			data, err := os.ReadFile(file)
			assert.NilError(t, err)
			contents[i][filepath.Base(file)] = string(data)
		}
	}
	assert.DeepEqual(t, contents[0], contents[1])
	assert.Assert(t, len(files) > 1)
	assert.Check(t, is.Contains(contents[0], "0000-cover-letter.patch"))
	return files
}

// packageIn is what the patch's folder of a tree holds.
func packageIn(t *testing.T, dir string) map[string]string {
	t.Helper()
	files, err := os.ReadDir(filepath.Join(dir, tree.PatchDir))
	assert.NilError(t, err)
	contents := map[string]string{}
	for _, file := range files {
		data, err := os.ReadFile(filepath.Join(dir, tree.PatchDir, file.Name()))
		assert.NilError(t, err)
		contents[file.Name()] = string(data)
	}
	return contents
}

func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...)
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1")
	return output(t, dir, cmd)
}

func goTool(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{args[0], "-trimpath"}, args[1:]...)...)
	cmd.Env = goEnv()
	output(t, dir, cmd)
}

func output(t *testing.T, dir string, cmd *exec.Cmd) string {
	t.Helper()
	var out, stderr bytes.Buffer
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &stderr
	assert.NilError(t, cmd.Run(), "%s: %s%s", strings.Join(cmd.Args, " "), out.String(), stderr.String())
	return strings.TrimSpace(out.String())
}
