// Package image makes the test image: one static program that answers with its hostname
// (see the hostname folder). It comes from no registry.
package image

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Name is the image's name in a daemon that has imported it.
const Name = "berth-hostname"

// Import builds the image's program, below the repository's build folder, and imports the
// image into the daemon at host, with the docker CLI.
func Import(ctx context.Context, repository, docker, host string) error {
	program := filepath.Join(repository, "build", "image", "hostname")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "./integration/image/hostname")
	build.Dir = repository
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the test image's program: %w: %s", err, out)
	}
	layer, err := pack(program)
	if err != nil {
		return fmt.Errorf("pack the test image: %w", err)
	}
	load := exec.CommandContext(ctx, docker, "import",
		"--change", `ENTRYPOINT ["/hostname"]`, "--change", "EXPOSE 80/tcp 80/udp", "-", Name)
	load.Env = append(os.Environ(), "DOCKER_HOST="+host)
	load.Stdin = bytes.NewReader(layer)
	if out, err := load.CombinedOutput(); err != nil {
		return fmt.Errorf("import the test image: %w: %s", err, out)
	}
	return nil
}

// pack returns a tar archive with the program in its root.
func pack(program string) ([]byte, error) {
	data, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	if err := w.WriteHeader(&tar.Header{Name: filepath.Base(program), Mode: 0o755, Size: int64(len(data))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(data); err != nil {
		return nil, err
	}
	return archive.Bytes(), w.Close()
}
