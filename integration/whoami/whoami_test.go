package whoami

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	"github.com/moby/moby/client"
	"gotest.tools/v3/assert"
)

func TestAwaitTellsAStranger(t *testing.T) {
	const id = "0123456789abcdef"
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, id[:12]) }))
	at := netip.MustParseAddrPort(s.Listener.Addr().String())
	all := netip.AddrPortFrom(netip.IPv4Unspecified(), at.Port())
	assert.NilError(t, Await("tcp", at, id, time.Minute))
	assert.NilError(t, Await("tcp", all, id, time.Minute))
	assert.ErrorContains(t, Await("tcp", at, "fedcba9876543210", time.Minute), "want container fedcba987654")
	s.Close()
	assert.ErrorContains(t, Await("tcp", at, id, 0), "connection refused")
}

// The daemon answers 200 before it knows whether it can.
func TestImportFailsByWhatTheDaemonSaysLast(t *testing.T) {
	said := `{"status":"sha256:0123"}`
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			fmt.Fprintln(w, said)
		}
	}))
	t.Cleanup(s.Close)
	c, err := client.New(client.WithHost("tcp://" + s.Listener.Addr().String()))
	assert.NilError(t, err)
	assert.NilError(t, importLayer(t.Context(), c, nil))
	said += `{"error":"no space left on device"}`
	assert.Error(t, importLayer(t.Context(), c, nil), "no space left on device")
}
