// Package patch writes the patch as upstream takes patches: a series of mails, one for each room of the house, from the ground up.
package patch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"berth/hack/pins"
	"berth/hack/tree"
)

// step is one commit of the series.
type step struct {
	subject  string   // with upstream's prefix, 50 characters or so
	body     string   // what it does, and why
	verified string   // how, beside what every step passes
	reason   string   // in a line, for whoever asks years later why this is carried
	canGo    string   // when upstream will not need it any more
	files    []string // of the patch; each file is of one step, the door of the first one, too
	mark     string   // what the lines have, and no others, that come with this step into earlier steps' files; "" if none do
}

// door is the file that the first step takes the port driver's interface out of, and that a later one replaces.
const door = "mapper_linux.go"

// own is the folder, in the checkout, of what the step without files of the patch adds elsewhere in upstream's tree: its paths are upstream's.
const own = "hack/patch/testdata/upstream"

// Series is where to write the mails of one base to, and what they are made of.
type Series struct {
	Root   string   // Berth's checkout
	Base   pins.Pin // the version of upstream that it is for
	Module string   // the folder of that
	Dir    string   // for the mails: all others there are removed
}

// Write writes the series, and a cover letter. Whoever git knows as the user signs it off. What it writes is the same each time,
// until the patch, its words or the user change.
func (s Series) Write(ctx context.Context) error {
	return s.write(ctx, steps)
}

func (s Series) write(ctx context.Context, steps []step) (retErr error) {
	files, err := tree.Patch(s.Root)
	if err != nil {
		return err
	}
	if err := checkTable(steps, files); err != nil {
		return err
	}
	who, err := newSigner(ctx, s.Root)
	if err != nil {
		return err
	}
	letter, err := s.cover()
	if err != nil {
		return err
	}

	tmp, err := os.MkdirTemp("", "berth-patch-")
	if err != nil {
		return err
	}
	defer func() { retErr = errors.Join(retErr, os.RemoveAll(tmp)) }()
	repo := repository{dir: filepath.Join(tmp, "repo"), who: who}
	if err := os.CopyFS(filepath.Join(repo.dir, tree.PatchDir), os.DirFS(filepath.Join(s.Module, tree.PatchDir))); err != nil {
		return err
	}
	if err := repo.init(ctx, s.Base); err != nil {
		return err
	}
	for i, step := range steps {
		if err := s.lay(repo, files, steps, i); err != nil {
			return err
		}
		if err := repo.commit(ctx, step.message(who)); err != nil {
			return err
		}
	}
	mails := filepath.Join(tmp, "mails")
	if err := repo.formatPatch(ctx, mails); err != nil {
		return err
	}
	first := filepath.Join(mails, "0000-cover-letter.patch")
	data, err := os.ReadFile(first)
	if err != nil {
		return err
	}
	if err := os.WriteFile(first, []byte(letter.into(string(data), s.Base)), 0o644); err != nil {
		return err
	}
	if err := os.RemoveAll(s.Dir); err != nil {
		return err
	}
	return os.CopyFS(s.Dir, os.DirFS(mails))
}

// checkTable tells whether each file of the patch is of one step, and each step's files are there.
func checkTable(steps []step, files map[string]string) error {
	var errs []error
	seen := map[string]string{}
	for _, step := range steps {
		for _, file := range step.files {
			path := filepath.Join(tree.PatchDir, file)
			if other, ok := seen[path]; ok {
				errs = append(errs, fmt.Errorf("%s is of two steps: %q and %q", file, other, step.subject))
			}
			if files[path] == "" {
				errs = append(errs, fmt.Errorf("%q has no file %s", step.subject, file))
			}
			seen[path] = step.subject
		}
	}
	for path := range files {
		if seen[path] == "" {
			errs = append(errs, fmt.Errorf("%s is of no step: add it to hack/patch/series.go", path))
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

// lay lays the files of the i-th step over the repository's.
func (s Series) lay(repo repository, files map[string]string, steps []step, i int) error {
	if i == 0 {
		name := filepath.Join(repo.dir, tree.PatchDir, door)
		src, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if src, err = withoutType(src, "PortDriverClient"); err != nil {
			return fmt.Errorf("%s of %s: %w", door, s.Base.Version, err)
		}
		if err := os.WriteFile(name, src, 0o644); err != nil {
			return err
		}
	}
	lines := slices.Clone(steps[i].files) // Its own files, and those that lines of it come into.
	for _, earlier := range steps[:i] {
		if steps[i].mark != "" {
			lines = append(lines, earlier.files...)
		}
	}
	marked := false
	for _, file := range lines {
		path := filepath.Join(tree.PatchDir, file)
		src, err := os.ReadFile(files[path])
		if err != nil {
			return err
		}
		marked = marked || !slices.Contains(steps[i].files, file) && bytes.Contains(src, []byte(steps[i].mark))
		for _, later := range steps[i+1:] {
			if src, err = withoutLines(src, later.mark); err != nil {
				return fmt.Errorf("%s before %q: %w", file, later.subject, err)
			}
		}
		if err := os.WriteFile(filepath.Join(repo.dir, path), src, 0o644); err != nil {
			return err
		}
	}
	if steps[i].mark != "" && !marked {
		return fmt.Errorf("%q: no line has %q", steps[i].subject, steps[i].mark)
	}
	if len(steps[i].files) > 0 {
		return nil
	}
	elsewhere := filepath.Join(s.Root, own)
	if _, err := os.Stat(elsewhere); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return os.CopyFS(repo.dir, os.DirFS(elsewhere))
}

// withoutLines is the Go source without the lines that have the mark. What is left is formatted as Go is.
func withoutLines(src []byte, mark string) ([]byte, error) {
	if mark == "" || !bytes.Contains(src, []byte(mark)) {
		return src, nil
	}
	var rest []byte
	for line := range bytes.Lines(src) {
		if !bytes.Contains(line, []byte(mark)) {
			rest = append(rest, line...)
		}
	}
	formatted, err := format.Source(rest)
	if err == nil && !bytes.Equal(formatted, rest) {
		err = fmt.Errorf("without the lines that have %q, it isn't formatted", mark)
	}
	return rest, err
}

// withoutType is the Go source without its declaration of the type.
func withoutType(src []byte, name string) ([]byte, error) {
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, "", src, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	for _, decl := range file.Decls {
		gen, ok := decl.(*ast.GenDecl)
		if !ok || len(gen.Specs) != 1 {
			continue
		}
		if spec, ok := gen.Specs[0].(*ast.TypeSpec); !ok || spec.Name.Name != name {
			continue
		}
		from, to := gen.Pos(), gen.End()
		if gen.Doc != nil {
			from = gen.Doc.Pos()
		}
		rest := slices.Concat(src[:set.Position(from).Offset], src[set.Position(to).Offset:])
		return format.Source(rest)
	}
	return nil, fmt.Errorf("there is no type %s", name)
}

func (s step) message(who signer) string {
	trailers := []string{"Reason: " + s.reason, "Can-go-when: " + s.canGo, "Signed-off-by: " + who.String()}
	verified := "How to verify it: the package compiles, vets, and passes its tests;\n" + s.verified + "."
	return strings.Join([]string{s.subject, strings.TrimSpace(s.body), verified, strings.Join(trailers, "\n")}, "\n\n") + "\n"
}

// signer is who signs the series off, and when.
type signer struct{ name, email, date string }

func (w signer) String() string { return w.name + " <" + w.email + ">" }

// newSigner asks git, in the checkout. The date is that of the last commit to what the series is made of.
func newSigner(ctx context.Context, root string) (signer, error) {
	ask := func(args ...string) string {
		out, _ := git(ctx, root, nil, args...) // nothing: there is no answer
		return strings.TrimSpace(out)
	}
	who := signer{name: ask("config", "user.name"), email: ask("config", "user.email")}
	if who.name == "" || who.email == "" {
		return signer{}, errors.New("git knows no user to sign the patch off: set user.name and user.email with git config")
	}
	who.date = ask("log", "-1", "--format=%cI", "--", tree.PatchDir, "hack/patch")
	if who.date == "" {
		who.date = "2000-01-01T00:00:00Z" // a checkout without its history
	}
	return who, nil
}

// repository is where the series is made: it knows nothing but the package, and nobody's settings of git.
type repository struct {
	dir string
	who signer
}

func (r repository) init(ctx context.Context, base pins.Pin) error {
	if _, err := r.git(ctx, "init", "-q", "-b", "series"); err != nil {
		return err
	}
	if err := r.commit(ctx, base.Version); err != nil {
		return err
	}
	_, err := r.git(ctx, "tag", "base")
	return err
}

func (r repository) commit(ctx context.Context, message string) error {
	if _, err := r.git(ctx, "add", "--all", "--force"); err != nil {
		return err
	}
	_, err := r.git(ctx, "commit", "-q", "--cleanup=verbatim", "-m", message)
	return err
}

func (r repository) formatPatch(ctx context.Context, dir string) error {
	_, err := r.git(ctx, "format-patch", "-q", "--zero-commit", "--no-signature", "--no-renames", "--cover-letter", "--numbered", "--stat=80",
		"-o", dir, "base..series")
	return err
}

func (r repository) git(ctx context.Context, args ...string) (string, error) {
	return git(ctx, r.dir, []string{
		"GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_COUNT=0",
		"GIT_AUTHOR_NAME=" + r.who.name, "GIT_AUTHOR_EMAIL=" + r.who.email, "GIT_AUTHOR_DATE=" + r.who.date,
		"GIT_COMMITTER_NAME=" + r.who.name, "GIT_COMMITTER_EMAIL=" + r.who.email, "GIT_COMMITTER_DATE=" + r.who.date,
	}, args...)
}

// git runs git in dir, which a git above us, as that of a hook, does not lead elsewhere.
func git(ctx context.Context, dir string, env []string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Dir = dir
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "GIT_") || strings.HasPrefix(v, "GIT_CONFIG") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(append(cmd.Env, "LC_ALL=C"), env...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("git %s: %w: %s", args[0], err, strings.TrimSpace(stderr.String()))
	}
	return string(out), err
}
