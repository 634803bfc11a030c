package tree

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"berth/hack/pins"
)

// Debian makes build/tree/<name>/<version> of the upstream archive of a Debian source package, and returns its path. The archive
// is beside it, and is fetched only when the right one is not there: whoever has no Debian mirror can put it there.
func Debian(ctx context.Context, root string, pin pins.Pin) (string, error) {
	dir := filepath.Join(root, "build", "tree", pin.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	archive, err := upstreamArchive(dir, pin)
	if err != nil {
		if archive, err = fetch(ctx, pin, dir); err != nil {
			return "", fmt.Errorf("fetch %s: %w\nor put it into %s; its sha256 is in vendor.conf", archiveName(pin), err, dir)
		}
	}
	dst := filepath.Join(dir, pin.Version)
	tmp := dst + ".tmp"
	for _, old := range []string{tmp, dst} {
		if err := os.RemoveAll(old); err != nil {
			return "", err
		}
	}
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return "", err
	}
	if _, err := run(ctx, tmp, "tar", "-xf", archive, "--strip-components=1", "--no-same-owner"); err != nil {
		return "", err
	}
	return dst, os.Rename(tmp, dst)
}

// archiveName is the name of the upstream archive in a Debian source package, whose ending says how upstream has compressed it.
func archiveName(pin pins.Pin) string {
	return fmt.Sprintf("%s_%s.orig.tar.*", pin.Module, pin.Version)
}

// upstreamArchive finds the archive in dir. One that is not the right one is named, too.
func upstreamArchive(dir string, pin pins.Pin) (string, error) {
	found, err := fs.Glob(os.DirFS(dir), archiveName(pin))
	if err != nil || len(found) == 0 {
		return "", cmp.Or(err, fs.ErrNotExist)
	}
	archive := filepath.Join(dir, found[0])
	return archive, checkSum(archive, pin.SHA256)
}

// fetch has apt fetch the archive into dir, as it fetches all else for this machine: from the same Debian mirror, through the same proxy, and
// checked with the archive's keys. Its lists and caches are put elsewhere for that: the machine's own stay as they are.
func fetch(ctx context.Context, pin pins.Pin, dir string) (string, error) {
	mirrors, err := run(ctx, "", "apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian", "Label: Debian", "Created-By: Packages")
	if err != nil {
		return "", err
	}
	if mirrors == "" {
		return "", errors.New("apt knows no Debian mirror here: its lists may be missing, then `apt-get update` makes them, or this is another system")
	}
	var sources strings.Builder
	for _, mirror := range slices.Compact(strings.Fields(mirrors)) {
		fmt.Fprintf(&sources, "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n", mirror, pin.Debian)
	}

	apt, err := os.MkdirTemp("", "berth-apt-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(apt)
	// Root's apt works as a user of its own, who must be able to enter.
	if err := os.Chmod(apt, 0o755); err != nil {
		return "", err
	}
	for file, text := range map[string]string{
		"sources.list": sources.String(),
		// What the machine runs after an update is about its own lists and caches.
		"apt.conf": fmt.Sprintf(`Dir::State "%[1]s/state"; Dir::Cache "%[1]s/cache";
Dir::Etc::sourcelist "%[1]s/sources.list"; Dir::Etc::sourceparts "/dev/null";
APT::Update::Error-Mode "any";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
`, apt),
	} {
		if err := os.WriteFile(filepath.Join(apt, file), []byte(text), 0o644); err != nil {
			return "", err
		}
	}
	for _, d := range []string{"state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(apt, d), 0o755); err != nil {
			return "", err
		}
	}
	conf := "--config-file=" + filepath.Join(apt, "apt.conf")
	if _, err := run(ctx, apt, "apt-get", "-q", conf, "update"); err != nil {
		return "", err
	}
	if _, err := run(ctx, apt, "apt-get", "-q", conf, "source", "--download-only", "--tar-only", pin.Module); err != nil {
		return "", err
	}
	fetched, err := upstreamArchive(apt, pin)
	if fetched == "" {
		return "", fmt.Errorf("%s has another version of %s: %w", pin.Debian, pin.Module, err)
	}
	if err != nil {
		return "", err
	}
	archive := filepath.Join(dir, filepath.Base(fetched))
	return archive, CopyFile(archive, fetched, 0o644)
}

func checkSum(file, want string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if have := fmt.Sprintf("%x", h.Sum(nil)); have != want {
		return fmt.Errorf("the sha256 of %s is %s, in vendor.conf %s", filepath.Base(file), have, want)
	}
	return nil
}

// run returns the command's output; the error has all that it said.
func run(ctx context.Context, dir, name string, arg ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, arg...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stdout, all strings.Builder
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&stdout, &all), &all
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, all.String())
	}
	return strings.TrimSpace(stdout.String()), nil
}
