package faultproxy_test

import (
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/api/client"
	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
	"gotest.tools/v3/assert"

	"berth/integration/faultproxy"
)

func TestFaults(t *testing.T) {
	cases := []struct {
		fault              faultproxy.Fault
		addSays, removeSay string // "" is no error
		served             bool   // RootlessKit has served the request
	}{
		{fault: faultproxy.Fault{}, served: true},
		{fault: faultproxy.Fault{Delay: time.Millisecond}, served: true},
		{fault: faultproxy.Fault{Kind: faultproxy.CutBefore}, addSays: "EOF", removeSay: "EOF"},
		{fault: faultproxy.Fault{Kind: faultproxy.CutAfter}, addSays: "EOF", removeSay: "EOF", served: true},
		{fault: faultproxy.Fault{Kind: faultproxy.Status500}, addSays: faultproxy.Message, removeSay: faultproxy.Message},
		{fault: faultproxy.Fault{Kind: faultproxy.Half}, addSays: "unexpected EOF", removeSay: "Internal Server Error", served: true},
	}
	for _, c := range cases {
		t.Run(string(c.fault.Kind), func(t *testing.T) {
			p, served := start(t)
			p.Inject(faultproxy.All(
				faultproxy.At(faultproxy.AddPort, 2, c.fault),
				faultproxy.At(faultproxy.RemovePort, 1, c.fault)))
			rlk, err := client.New(p.Socket)
			assert.NilError(t, err)
			defer rlk.Close()

			_, err = rlk.PortManager().AddPort(t.Context(), port.Spec{ParentPort: 1})
			assert.NilError(t, err)
			assert.Equal(t, served.Swap(0), int32(1))
			_, err = rlk.PortManager().AddPort(t.Context(), port.Spec{ParentPort: 2})
			check(t, err, c.addSays)
			assert.Equal(t, served.Swap(0) == 1, c.served)
			check(t, rlk.PortManager().RemovePort(t.Context(), 7), c.removeSay)
			assert.Equal(t, served.Swap(0) == 1, c.served)
			assert.NilError(t, rlk.PortManager().RemovePort(t.Context(), 7))

			calls := p.Calls()
			assert.Equal(t, len(calls), 4)
			assert.DeepEqual(t, calls[1].Fault, c.fault)
			assert.Equal(t, calls[1].IsLost(), strings.HasSuffix(c.addSays, "EOF"))
			assert.Equal(t, calls[3].N, 2)
		})
	}
}

// Half of a refusal is one: nothing is lost.
func TestHalfOfARefusal(t *testing.T) {
	p, _ := start(t)
	p.Inject(faultproxy.At(faultproxy.AddPort, 1, faultproxy.Fault{Kind: faultproxy.Half}))
	rlk, err := client.New(p.Socket)
	assert.NilError(t, err)
	defer rlk.Close()
	_, err = rlk.PortManager().AddPort(t.Context(), port.Spec{ParentPort: takenPort})
	assert.ErrorContains(t, err, "Bad Request")
	calls := p.Calls()
	assert.Equal(t, len(calls), 1)
	assert.Assert(t, calls[0].Refused && !calls[0].IsLost())
}

// takenPort is refused.
const takenPort = 99

// start starts a proxy before a RootlessKit that says yes, except to takenPort, and counts what that serves.
func start(t *testing.T) (*faultproxy.Proxy, *atomic.Int32) {
	t.Helper()
	var served atomic.Int32
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/ports", func(w http.ResponseWriter, r *http.Request) {
		served.Add(1)
		var spec port.Spec
		if err := json.NewDecoder(r.Body).Decode(&spec); err != nil || spec.ParentPort == takenPort {
			http.Error(w, `{"message":"listen tcp4 0.0.0.0:99: bind: address already in use"}`, http.StatusBadRequest)
			return
		}
		w.WriteHeader(http.StatusCreated)
		w.Write([]byte(`{"id":7,"spec":{}}`))
	})
	mux.HandleFunc("DELETE /v1/ports/7", func(http.ResponseWriter, *http.Request) { served.Add(1) })
	socket := filepath.Join(t.TempDir(), "api.sock")
	l, err := net.Listen("unix", socket)
	assert.NilError(t, err)
	server := &http.Server{Handler: mux}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })

	p, err := faultproxy.Start(socket, os.Getuid())
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, p.Close()) })
	return p, &served
}

func TestSocketIsItsUsersAlone(t *testing.T) {
	p, err := faultproxy.Start("/nowhere", os.Getuid())
	assert.NilError(t, err)
	defer func() { assert.NilError(t, p.Close()) }()
	info, err := os.Lstat(p.Socket)
	assert.NilError(t, err)
	assert.Equal(t, info.Mode(), os.ModeSocket|0o600)
	assert.Equal(t, int(info.Sys().(*syscall.Stat_t).Uid), os.Getuid())
	info, err = os.Lstat(filepath.Dir(p.Socket))
	assert.NilError(t, err)
	assert.Equal(t, info.Mode(), os.ModeDir|0o755) // the user need not be us
}

func check(t *testing.T, err error, says string) {
	t.Helper()
	if says == "" {
		assert.NilError(t, err)
		return
	}
	assert.ErrorContains(t, err, says)
}
