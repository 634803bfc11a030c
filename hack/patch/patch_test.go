package patch

import (
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

const (
	upstreams = `package nat

import "context"

// PortDriverClient is upstream's.
type PortDriverClient interface {
	AddPort(context.Context) error
}

// NewPortMapper is upstream's.
func NewPortMapper(PortDriverClient) {}
`
	moved = `package nat

import "context"

// NewPortMapper is upstream's.
func NewPortMapper(PortDriverClient) {}
`
	counting = `package nat

func ours() {
	defer counter()
	println()
}
`
	uncounted = `package nat

func ours() {
	println()
}
`
)

var small = []step{
	{subject: "nat: move", body: "\nWhy.\n", verified: "run it", reason: "so", canGo: "never", files: []string{"driver_linux.go"}},
	{subject: "nat: search", body: "Why not.", canGo: "soon", files: []string{"mapper_linux.go", "search_linux.go"}},
	{subject: "integration: test", body: "Because.", canGo: "never"},
	{subject: "nat: count", body: "Whoever wants to.", canGo: "any time", files: []string{"count_linux.go"}, mark: "counter"},
}

// series is a small Berth, and a small base of it.
func series(t *testing.T) Series {
	t.Helper()
	for name, value := range map[string]string{
		"GIT_CONFIG_COUNT": "2", "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "Some Body",
		"GIT_CONFIG_KEY_1": "user.email", "GIT_CONFIG_VALUE_1": "some@example.com",
	} {
		t.Setenv(name, value)
	}
	root := gofs.NewDir(t, "root",
		gofs.WithDir(tree.PatchDir,
			gofs.WithFile("driver_linux.go", "package nat // driver\n"),
			gofs.WithFile("count_linux.go", "package nat // count\n"),
			gofs.WithFile("mapper_linux.go", counting),
			gofs.WithFile("search_linux.go", "package nat // search\n"),
		),
		gofs.WithDir(own+"/integration", gofs.WithFile("ours_test.go", "package integration\n")),
		gofs.WithDir("docs", gofs.WithFile("bases.md", "# Bases\n\nThey are:\n\n| base |\n| --- |\n| v1.0.0 |\n\n| another |\n")),
	)
	module := gofs.NewDir(t, "module", gofs.WithDir(tree.PatchDir,
		gofs.WithFile("mapper_linux.go", upstreams, gofs.WithMode(0o444)),
		gofs.WithFile("mapper_linux_test.go", "package nat\n", gofs.WithMode(0o444)),
	))
	return Series{
		Root: root.Path(), Base: pins.Pin{Module: "example.com/base", Version: "v1.0.0"}, Module: module.Path(),
		Dir: filepath.Join(t.TempDir(), "a", "patch"),
	}
}

func mails(t *testing.T, dir string) map[string]string {
	t.Helper()
	files, err := os.ReadDir(dir)
	assert.NilError(t, err)
	texts := map[string]string{}
	for _, file := range files {
		data, err := os.ReadFile(filepath.Join(dir, file.Name()))
		assert.NilError(t, err)
		texts[file.Name()] = string(data)
	}
	return texts
}

func TestSeriesGivesThePatchedTree(t *testing.T) {
	s := series(t)
	assert.NilError(t, s.write(t.Context(), small))
	got := mails(t, s.Dir)
	names := []string{"0000-cover-letter.patch", "0001-nat-move.patch", "0002-nat-search.patch", "0003-integration-test.patch", "0004-nat-count.patch"}
	assert.Assert(t, is.Len(got, len(names)))

	// As whoever gets it does.
	repo := repository{dir: t.TempDir(), who: signer{"Up Stream", "up@example.com", "2001-01-01T00:00:00Z"}}
	assert.NilError(t, os.CopyFS(repo.dir, os.DirFS(s.Module)))
	assert.NilError(t, repo.init(t.Context(), s.Base))
	mapper := func() string {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(repo.dir, tree.PatchDir, door))
		assert.NilError(t, err)
		return string(data)
	}
	for i, name := range names[1:] {
		_, err := repo.git(t.Context(), "am", "-q", filepath.Join(s.Dir, name))
		assert.NilError(t, err)
		assert.Equal(t, mapper(), []string{moved, uncounted, uncounted, counting}[i])
	}
	files, err := repo.git(t.Context(), "ls-files")
	assert.NilError(t, err)
	assert.DeepEqual(t, strings.Fields(files), []string{
		tree.PatchDir + "/count_linux.go", tree.PatchDir + "/driver_linux.go", tree.PatchDir + "/mapper_linux.go", tree.PatchDir + "/mapper_linux_test.go",
		tree.PatchDir + "/search_linux.go", "integration/ours_test.go",
	})
	message, err := repo.git(t.Context(), "log", "-1", "--format=%an <%ae>%n%B", "HEAD~3")
	assert.NilError(t, err)
	assert.Equal(t, strings.TrimSpace(message), "Some Body <some@example.com>\nnat: move\n\nWhy.\n\nHow to verify it: the package compiles, vets, and passes its tests;\nrun it.\n\nReason: so\nCan-go-when: never\nSigned-off-by: Some Body <some@example.com>")
}

func TestCoverLetter(t *testing.T) {
	s := series(t)
	assert.NilError(t, s.write(t.Context(), small))
	cover := mails(t, s.Dir)["0000-cover-letter.patch"]
	subject, _, _ := strings.Cut(coverText, "\n")
	assert.Check(t, is.Contains(cover, "\nFrom: Some Body <some@example.com>\n"))
	assert.Check(t, is.Contains(cover, "\nSubject: [PATCH 0/4] "+subject+"\n"))
	assert.Check(t, is.Contains(cover, "\n| base |\n| --- |\n| v1.0.0 |\n"))
	assert.Check(t, !strings.Contains(cover, "| another"))
	assert.Check(t, is.Contains(cover, "(not measured)")) // docs/upstream.md is not there
	assert.Check(t, is.Contains(cover, "\n  nat: search\n"))
	assert.Check(t, strings.HasSuffix(cover, "\nbase-commit: v1.0.0\n"))
	for _, left := range []string{"***", "{{"} {
		assert.Check(t, !strings.Contains(cover, left), "%s is left in %s", left, cover)
	}

	upstream := "| all |\n| --- |\n| 704 |\n\n## With ports of the host held\n\n| held |\n| --- |\n| 100 |\n"
	assert.NilError(t, os.WriteFile(filepath.Join(s.Root, "docs", "upstream.md"), []byte(upstream), 0o644))
	assert.NilError(t, s.write(t.Context(), small))
	cover = mails(t, s.Dir)["0000-cover-letter.patch"]
	assert.Check(t, is.Contains(cover, "for one test):\n\n| all |\n| --- |\n| 704 |\n\n"))
	assert.Check(t, is.Contains(cover, "held by another process:\n\n| held |\n| --- |\n| 100 |\n\n"))
	assert.Check(t, !strings.Contains(cover, "(not measured)"))
}

func TestWrittenAgainItIsTheSame(t *testing.T) {
	s := series(t)
	assert.NilError(t, s.write(t.Context(), small))
	first := mails(t, s.Dir)
	assert.NilError(t, os.WriteFile(filepath.Join(s.Dir, "0005-older.patch"), nil, 0o644))
	t.Setenv("GIT_AUTHOR_DATE", "2005-05-05T05:05:05Z") // nor does the machine matter
	t.Setenv("GIT_DIR", "/nowhere")
	assert.NilError(t, s.write(t.Context(), small))
	assert.DeepEqual(t, mails(t, s.Dir), first)
}

func TestTableAndFilesMustAgree(t *testing.T) {
	s := series(t)
	assert.NilError(t, os.WriteFile(filepath.Join(s.Root, tree.PatchDir, "new_linux.go"), []byte("package nat\n"), 0o644))
	assert.NilError(t, os.Remove(filepath.Join(s.Root, tree.PatchDir, "search_linux.go")))
	twice := append([]step{{subject: "nat: twice", files: []string{"driver_linux.go"}}}, small...)
	assert.Error(t, s.write(t.Context(), twice), `"nat: search" has no file search_linux.go
daemon/libnetwork/portmappers/nat/new_linux.go is of no step: add it to hack/patch/series.go
driver_linux.go is of two steps: "nat: twice" and "nat: move"`)
	_, err := os.Stat(s.Dir)
	assert.ErrorIs(t, err, os.ErrNotExist)
}

func TestBaseWithoutTheInterface(t *testing.T) {
	s := series(t)
	s.Module = gofs.NewDir(t, "module", gofs.WithDir(tree.PatchDir, gofs.WithFile("mapper_linux.go", moved))).Path()
	assert.Error(t, s.write(t.Context(), small), "mapper_linux.go of v1.0.0: there is no type PortDriverClient")
}

func TestNobodyToSignOff(t *testing.T) {
	s := series(t)
	t.Setenv("GIT_CONFIG_COUNT", "0")
	t.Setenv("GIT_CONFIG_GLOBAL", "/dev/null")
	t.Setenv("GIT_CONFIG_SYSTEM", "/dev/null")
	assert.ErrorContains(t, s.write(t.Context(), small), "set user.name and user.email with git config")
}

func TestEveryFileOfThePatchIsOfOneStep(t *testing.T) {
	files, err := tree.Patch("../..")
	assert.NilError(t, err)
	assert.NilError(t, checkTable(steps, files))
}

func TestDoorWithoutALaterStep(t *testing.T) {
	s := series(t)
	err := s.write(t.Context(), append(small[:3:3], step{subject: "nat: count", canGo: "any time", files: []string{"count_linux.go"}, mark: "abacus"}))
	assert.ErrorContains(t, err, `"nat: count": no line has "abacus"`)
	_, err = withoutLines([]byte("package nat\n\nvar a = 1\n\nvar counter = 2\n"), "counter")
	assert.Error(t, err, `without the lines that have "counter", it isn't formatted`)
	_, err = withoutLines([]byte("package nat\n\nfunc f() { // counter\n}\n"), "counter")
	assert.ErrorContains(t, err, "expected declaration")
}

// What upstream's rules for commit messages ask for.
func TestSteps(t *testing.T) {
	for _, step := range steps {
		assert.Check(t, len(step.subject) <= 72, step.subject)
		assert.Check(t, step.verified != "" && step.reason != "" && step.canGo != "", step.subject)
		for line := range strings.Lines(step.body) {
			assert.Check(t, len(line) <= 76, "%s: %s", step.subject, line)
		}
	}
}
