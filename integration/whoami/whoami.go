// Package whoami is the test image, whose containers answer with their own id, and what asks them. The image is one static
// program (see the hostname folder), and comes from no registry.
package whoami

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/moby/client"
)

// Image is the image's name in a daemon that has imported it.
const Image = "berth-hostname"

// Import builds the image's program, below the repository's build folder, and imports the image into the daemon.
func Import(ctx context.Context, repository string, daemon *client.Client) error {
	program := filepath.Join(repository, "build", "image", "hostname")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "./integration/whoami/hostname")
	build.Dir = repository
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the test image's program: %w: %s", err, out)
	}
	layer, err := pack(program)
	if err != nil {
		return fmt.Errorf("pack the test image: %w", err)
	}
	if err := importLayer(ctx, daemon, layer); err != nil {
		return fmt.Errorf("import the test image: %w", err)
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

func importLayer(ctx context.Context, daemon *client.Client, layer []byte) error {
	source := client.ImageImportSource{SourceName: "-", Source: bytes.NewReader(layer)}
	said, err := daemon.ImageImport(ctx, source, Image, client.ImageImportOptions{
		Changes: []string{`ENTRYPOINT ["/hostname"]`, "EXPOSE 80/tcp", "EXPOSE 80/udp"},
	})
	if err != nil {
		return err
	}
	defer said.Close()
	// Once the daemon has begun to answer, it can only tell here that it failed.
	for messages := json.NewDecoder(said); ; {
		var m struct{ Error string }
		switch err := messages.Decode(&m); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case m.Error != "":
			return errors.New(m.Error)
		}
	}
}

// Reachable is where one asks what is published at an address, which may be all of a family.
func Reachable(at netip.AddrPort) netip.AddrPort {
	switch at.Addr() {
	case netip.IPv4Unspecified():
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), at.Port())
	case netip.IPv6Unspecified():
		return netip.AddrPortFrom(netip.IPv6Loopback(), at.Port())
	}
	return at
}

// Await asks at the address until the container answers, for as long as limit. A stranger that answers in its place is an
// error at once. network is tcp or udp.
func Await(network string, at netip.AddrPort, id string, limit time.Duration) error {
	for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		answer, err := ask(network, Reachable(at))
		switch {
		case err == nil && strings.HasSuffix(answer, id[:12]+"\n"):
			return nil
		case err == nil && answer != "":
			return fmt.Errorf("%s %v answered %q, want container %.12s", network, at, answer, id)
		case time.Now().After(end):
			return fmt.Errorf("%s %v, container %.12s: no answer within %v: %w", network, at, id, limit, err)
		}
	}
}

// ask returns all that comes back from the address.
func ask(network string, at netip.AddrPort) (string, error) {
	conn, err := net.DialTimeout(network, at.String(), time.Second)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return "", err
	}
	if network == "udp" {
		buf := make([]byte, 100)
		n, err := conn.Read(buf)
		return string(buf[:n]), err
	}
	answer, err := io.ReadAll(conn)
	return string(answer), err
}
