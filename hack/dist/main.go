// Command dist makes a release of what was built: archives, Debian packages, bills of materials, and their checksums. The same
// sources come out the same, byte for byte, wherever and whenever it is done.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"berth/hack/checkout"
	"berth/hack/pins"
	"berth/hack/tree"
)

func main() {
	out := flag.String("o", filepath.Join("build", "dist"), "the `FOLDER` for the release; what is there is replaced")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: dist [-o FOLDER] ARCH...\nFor each, `GOARCH=ARCH berth build dockerd docker-proxy` comes first.")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *out, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "dist:", err)
		os.Exit(1)
	}
}

// release is what the parts of one release have in common.
type release struct {
	root    string
	base    pins.Pin
	Version string
	Time    time.Time // of all files in it
	out     string
}

func run(ctx context.Context, out string, archs []string) error {
	root, err := checkout.Root()
	if err != nil {
		return err
	}
	if out, err = filepath.Abs(out); err != nil {
		return err
	}
	r := release{root: root, out: out + ".tmp"}
	list, err := pins.Load(filepath.Join(root, "vendor.conf"))
	if err != nil {
		return err
	}
	if r.base, err = pins.Base(list, ""); err != nil {
		return err
	}
	r.Version = fmt.Sprintf("%s+berth.%d", r.base.Release, r.base.Patch)
	if r.Time, err = sourceTime(ctx, root); err != nil {
		return err
	}
	// It appears as a whole, or not at all.
	if err := os.RemoveAll(r.out); err != nil {
		return err
	}
	defer os.RemoveAll(r.out)
	for _, arch := range archs {
		fmt.Printf("berth %s for %s\n", r.Version, arch)
		if err := r.pack(ctx, arch); err != nil {
			return err
		}
	}
	fmt.Println("the patched sources")
	if err := r.sources(ctx); err != nil {
		return err
	}
	if err := sums(r.out); err != nil {
		return err
	}
	if err := os.RemoveAll(out); err != nil {
		return err
	}
	if err := os.Rename(r.out, out); err != nil {
		return err
	}
	fmt.Printf("%s has it\n", out)
	return nil
}

// sourceTime is when the sources were as they are, by what reproducible builds have agreed on.
func sourceTime(ctx context.Context, root string) (time.Time, error) {
	text := os.Getenv("SOURCE_DATE_EPOCH")
	if text == "" {
		out, err := output(ctx, root, "git", "log", "-1", "--format=%ct")
		if err != nil {
			return time.Time{}, fmt.Errorf("of when is this? set SOURCE_DATE_EPOCH outside of a git repository: %w", err)
		}
		text = strings.TrimSpace(out)
	}
	seconds, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
	}
	return time.Unix(seconds, 0).UTC(), nil
}

// programs are what a release has for one architecture; berth is made here, the others were before.
var programs = []string{"berth", "dockerd", "docker-proxy"}

// pack makes the files of the release that are for one architecture.
func (r release) pack(ctx context.Context, arch string) error {
	stages := filepath.Join(r.out, "stage")
	defer os.RemoveAll(stages)
	name := fmt.Sprintf("berth-%s-linux-%s", r.Version, arch)
	stage := filepath.Join(stages, name)
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"programs", func() error { return r.stagePrograms(ctx, stage, arch) }},
		{"licences", func() error { return r.notice(ctx, filepath.Join(stage, "NOTICE"), arch) }},
		{"completions and manual pages", func() error { return r.generated(ctx, stage) }},
		{"archive", func() error { return archive(filepath.Join(r.out, name+".tar.gz"), stage, r.Time) }},
		{"Debian package", func() error { return r.deb(ctx, stage, arch) }},
		{"bills of materials", func() error { return r.boms(ctx, stage, name) }},
	} {
		fmt.Printf("  %s\n", step.what)
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return nil
}

// sources packs what dockerd is built from, for those who build it themselves: the base with the patch in it.
func (r release) sources(ctx context.Context) error {
	stages, err := os.MkdirTemp("", "berth-dist-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(stages)
	module, err := tree.Module(ctx, r.root, r.base)
	if err != nil {
		return err
	}
	dir, err := tree.Berth(r.root, r.base, module)
	if err != nil {
		return err
	}
	name := fmt.Sprintf("berth-%s-source", r.Version)
	if err := os.CopyFS(filepath.Join(stages, name), os.DirFS(dir)); err != nil {
		return err
	}
	return archive(filepath.Join(r.out, name+".tar.gz"), filepath.Join(stages, name), r.Time)
}

func (r release) stagePrograms(ctx context.Context, stage, arch string) error {
	for _, name := range []string{"README.md", "CHANGELOG.md", "LICENSE"} {
		if err := tree.CopyFile(filepath.Join(stage, name), filepath.Join(r.root, name), 0o644); err != nil {
			return err
		}
	}
	if err := tree.CopyFile(filepath.Join(stage, "stress.sh"), filepath.Join(r.root, "hack", "stress.sh"), 0o755); err != nil {
		return err
	}
	if err := buildBerth(ctx, r.root, arch, filepath.Join(stage, "berth")); err != nil {
		return err
	}
	built := filepath.Join(r.root, "build", "bin")
	if arch != runtime.GOARCH {
		built = filepath.Join(built, arch)
	}
	for _, name := range programs[1:] {
		from := filepath.Join(built, name)
		info, err := buildinfo.ReadFile(from)
		if err != nil {
			return fmt.Errorf("%w: run `GOARCH=%s berth build dockerd docker-proxy` first", err, arch)
		}
		for _, s := range info.Settings {
			if s.Key == "GOARCH" && s.Value != arch {
				return fmt.Errorf("%s is for %s", from, s.Value)
			}
		}
		if err := tree.CopyFile(filepath.Join(stage, name), from, 0o755); err != nil {
			return err
		}
	}
	dockerd, err := os.ReadFile(filepath.Join(stage, "dockerd"))
	if err != nil {
		return err
	}
	if !bytes.Contains(dockerd, []byte(r.Version)) {
		return fmt.Errorf("%s is not %s: run `GOARCH=%s berth build dockerd docker-proxy` first", filepath.Join(built, "dockerd"), r.Version, arch)
	}
	return nil
}

// berthArgs are for what berth is made of, not for where: the same wherever the checkout is.
var berthArgs = []string{"build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w"}

func buildBerth(ctx context.Context, root, arch, out string) error {
	_, err := output(ctx, root, "env", append(append(goEnv(arch), "go"), append(berthArgs, "-o", out, "./hack/berth")...)...)
	return err
}

// goEnv is what makes a build independent of the caller's environment.
func goEnv(arch string) []string {
	return []string{"GOOS=linux", "GOARCH=" + arch, "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=-mod=readonly", "GOAMD64=v1", "GOARM64=v8.0"}
}

// generated has cobra write what it knows of the commands: completions and manual pages.
func (r release) generated(ctx context.Context, stage string) error {
	native := filepath.Join(filepath.Dir(stage), "berth")
	if err := buildBerth(ctx, r.root, runtime.GOARCH, native); err != nil {
		return err
	}
	completions := filepath.Join(stage, "completions")
	if err := os.MkdirAll(completions, 0o755); err != nil {
		return err
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		text, err := output(ctx, r.root, native, "completion", shell)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(completions, "berth."+shell), []byte(text), 0o644); err != nil {
			return err
		}
	}
	_, err := output(ctx, r.root, "env", r.epoch(), native, "man", filepath.Join(stage, "man"))
	return err
}

// epoch tells tools what to date things by.
func (r release) epoch() string { return "SOURCE_DATE_EPOCH=" + strconv.FormatInt(r.Time.Unix(), 10) }

// boms lists the modules of each program, as CycloneDX.
func (r release) boms(ctx context.Context, stage, name string) error {
	for _, program := range programs {
		file := filepath.Join(r.out, strings.Replace(name, "berth", program, 1)+".cdx.json")
		if _, err := r.tool(ctx, "cyclonedx-gomod", "bin", "-json", "-std", "-noserial", "-notimestamp", "-version", r.Version, "-output", file, filepath.Join(stage, program)); err != nil {
			return err
		}
	}
	return nil
}

// tool runs one of tools.mod's.
func (r release) tool(ctx context.Context, name string, args ...string) (string, error) {
	args = append([]string{r.epoch(), "GOWORK=off", "GOFLAGS=-trimpath", "go", "tool", "-modfile=" + filepath.Join("hack", "dist", "tools.mod"), name}, args...)
	return output(ctx, r.root, "env", args...)
}

// sums writes SHA256SUMS of all files in dir, as sha256sum does.
func sums(dir string) error {
	var list bytes.Buffer
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		fmt.Fprintf(&list, "%x  %s\n", sha256.Sum256(data), d.Name())
		return err
	})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "SHA256SUMS"), list.Bytes(), 0o644)
}

func output(ctx context.Context, dir, name string, arg ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, arg...)
	cmd.Dir = dir
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if ctx.Err() != nil {
		return "", errors.New("stopped")
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s%s", strings.Join(cmd.Args, " "), err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.String(), nil
}
