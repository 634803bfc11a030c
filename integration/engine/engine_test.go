package engine

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

// daemon is a daemon that answers each "METHOD /path" with a status and a text, and adds what it
// was asked for to the list.
func daemon(t *testing.T, status int, text string) (c *Client, asked *[]string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "docker.sock")
	l, err := net.Listen("unix", socket)
	assert.NilError(t, err)
	asked = new([]string)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		*asked = append(*asked, strings.TrimSpace(fmt.Sprintf("%s %s %s", r.Method, r.URL, body)))
		w.WriteHeader(status)
		io.WriteString(w, text)
	}))
	s.Listener.Close()
	s.Listener = l
	s.Start()
	t.Cleanup(s.Close)
	c = New("unix://" + socket)
	t.Cleanup(c.Close)
	return c, asked
}

func TestCreateAsksForThePorts(t *testing.T) {
	c, asked := daemon(t, http.StatusCreated, `{"Id":"0123"}`)
	id, err := c.Create(t.Context(), Port{Container: "80/tcp"}, Port{Container: "80/tcp", HostIP: "127.0.0.1", Host: "20000-20010"})
	assert.NilError(t, err)
	assert.Equal(t, id, "0123")
	assert.DeepEqual(t, *asked, []string{`POST /containers/create {"HostConfig":{"PortBindings":{"80/tcp":[` +
		`{"HostIp":"","HostPort":""},{"HostIp":"127.0.0.1","HostPort":"20000-20010"}]}},"Image":"berth-hostname"}`})
}

func TestPublishedAreTheHostAddresses(t *testing.T) {
	c, _ := daemon(t, http.StatusOK, `{"NetworkSettings":{"Ports":{"80/udp":null,
		"80/tcp":[{"HostIp":"0.0.0.0","HostPort":"32768"},{"HostIp":"::","HostPort":"32768"}]}}}`)
	published, err := c.Published(t.Context(), "0123")
	assert.NilError(t, err)
	assert.Equal(t, len(published), 1)
	assert.Equal(t, published["80/tcp"][0], netip.MustParseAddrPort("0.0.0.0:32768"))
	assert.Equal(t, published["80/tcp"][1], netip.MustParseAddrPort("[::]:32768"))
}

func TestErrorIsWhatTheDaemonSays(t *testing.T) {
	c, _ := daemon(t, http.StatusInternalServerError, `{"message":"address already in use"}`)
	assert.Error(t, c.Start(t.Context(), "0123"), "POST /containers/0123/start: address already in use")
	c, _ = daemon(t, http.StatusBadGateway, "not JSON")
	assert.Error(t, c.Start(t.Context(), "0123"), "POST /containers/0123/start: 502 Bad Gateway")
	assert.ErrorContains(t, New("unix:///nowhere").Start(t.Context(), "0123"), "POST /containers/0123/start: dial unix /nowhere")
}

func TestStoppedAlreadyIsNoError(t *testing.T) {
	c, asked := daemon(t, http.StatusNotModified, "")
	assert.NilError(t, c.Stop(t.Context(), "0123", 10*time.Second))
	assert.DeepEqual(t, *asked, []string{"POST /containers/0123/stop?t=10"})
}
