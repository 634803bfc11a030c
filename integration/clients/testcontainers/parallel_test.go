// Package testcontainers starts containers side by side, as the tests of its users do. What it asks of the daemon is a module of
// its own: the project needs none of it otherwise.
package testcontainers

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/testcontainers/testcontainers-go"
	"github.com/testcontainers/testcontainers-go/wait"
)

// TestParallel starts COUNT containers of IMAGE at once, each with its port 80 at any host port. It fails for each that does not
// start, or whose port does not answer with its own id.
func TestParallel(t *testing.T) {
	count, err := strconv.Atoi(os.Getenv("COUNT"))
	if err != nil {
		t.Fatal("COUNT:", err)
	}
	for i := range count {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			c, err := testcontainers.Run(t.Context(), os.Getenv("IMAGE"),
				testcontainers.WithExposedPorts("80/tcp"),
				// A port that takes connections says nothing of the container: what forwards takes them before it listens.
				testcontainers.WithWaitStrategy(wait.ForHTTP("/").WithPort("80/tcp")))
			testcontainers.CleanupContainer(t, c)
			if err != nil {
				t.Fatal(err)
			}
			at, err := c.PortEndpoint(t.Context(), "80/tcp", "")
			if err != nil {
				t.Fatal(err)
			}
			if answer, err := ask(at); err != nil || !strings.HasSuffix(answer, c.GetContainerID()[:12]+"\n") {
				t.Errorf("%s answers %q, want %.12s: %v", at, answer, c.GetContainerID(), err)
			}
		})
	}
}

func ask(at string) (string, error) {
	conn, err := net.DialTimeout("tcp", at, 5*time.Second)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(conn)
	return string(answer), err
}
