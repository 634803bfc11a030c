package main

import (
	"bytes"
	"compress/gzip"
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"text/template"
	"time"
)

//go:embed nfpm.yaml
var nfpmConfig string

// deb has nfpm make a package of what is staged for the archive. It lies beside Docker's own, and replaces nothing of it.
func (r release) deb(ctx context.Context, stage, arch string) error {
	extra := stage + ".deb" // what the archive has not
	if err := os.MkdirAll(filepath.Join(extra, "man"), 0o755); err != nil {
		return err
	}
	notice, err := os.ReadFile(filepath.Join(stage, "NOTICE"))
	if err != nil {
		return err
	}
	changes, err := os.ReadFile(filepath.Join(stage, "CHANGELOG.md"))
	if err != nil {
		return err
	}
	changelog := fmt.Sprintf("berth (%s) unstable; urgency=medium\n\n  * See CHANGELOG.md.gz.\n\n -- Berth <berth@berth.invalid>  %s\n",
		r.Version, r.Time.Format(time.RFC1123Z))
	pages, err := filepath.Glob(filepath.Join(stage, "man", "*.1"))
	if err != nil {
		return err
	}
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			return err
		}
		if err := zip(filepath.Join(extra, "man", filepath.Base(page)+".gz"), text); err != nil {
			return err
		}
	}
	for name, text := range map[string][]byte{"NOTICE.gz": notice, "CHANGELOG.md.gz": changes, "changelog.gz": []byte(changelog)} {
		if err := zip(filepath.Join(extra, name), text); err != nil {
			return err
		}
	}

	tmpl, err := template.New("nfpm.yaml").Parse(nfpmConfig)
	if err != nil {
		return err
	}
	var config bytes.Buffer
	if err := tmpl.Execute(&config, struct {
		release
		Arch, Stage, Extra, Packaging string
	}{r, arch, stage, extra, filepath.Join(r.root, "hack", "dist")}); err != nil {
		return err
	}
	name := filepath.Join(extra, "nfpm.yaml")
	if err := os.WriteFile(name, config.Bytes(), 0o644); err != nil {
		return err
	}
	file := filepath.Join(r.out, fmt.Sprintf("berth_%s_%s.deb", r.Version, arch))
	if _, err := r.tool(ctx, "nfpm", "package", "--config", name, "--packager", "deb", "--target", file); err != nil {
		return err
	}
	if _, err := exec.LookPath("lintian"); err != nil {
		fmt.Println("    lintian is not here to check it")
		return nil
	}
	fmt.Println("    lintian")
	_, err = output(ctx, stage, "lintian", "--fail-on", "error", "--allow-root", file)
	return err
}

// zip is as gzip -9n.
func zip(file string, text []byte) error {
	var b bytes.Buffer
	zw, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		return err
	}
	if _, err := zw.Write(text); err != nil {
		return err
	}
	if err := zw.Close(); err != nil {
		return err
	}
	return os.WriteFile(file, b.Bytes(), 0o644)
}
