// Package faultproxy stands between dockerd and RootlessKit's API, and does to its requests
// what a bad day does: delays them, cuts connections, spoils answers.
//
//	p, err := faultproxy.Start(s.RootlessKitSocket(), s.UID())
//	s.Up(ctx, stack.Options{Env: stacktest.Behind(t, p.Socket), ...})
//	p.Inject(faultproxy.At(faultproxy.AddPort, 2, faultproxy.CutAfter))
package faultproxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/rootless-containers/rootlesskit/v3/pkg/port"
)

// Op is what a request asks of RootlessKit.
type Op string

const (
	AddPort    Op = "AddPort"
	RemovePort Op = "RemovePort"
)

// Kind is what is done to a request.
type Kind string

const (
	Pass      Kind = ""                  // nothing
	CutBefore Kind = "cut before"        // the connection is cut, RootlessKit has not seen the request
	CutAfter  Kind = "cut after"         // RootlessKit has served the request, its answer is lost
	Status500 Kind = "500"               // RootlessKit has not seen the request, 500 is the answer
	Half      Kind = "half the document" // RootlessKit has served the request, its answer breaks off
)

// Message is what [Status500] answers with.
const Message = "an injected fault"

// Fault is what happens to one request: first the delay, then the rest.
type Fault struct {
	Delay time.Duration
	Kind  Kind
}

// Faults has each of them once, with a delay that nobody gives up at.
var Faults = []Fault{
	{Delay: 300 * time.Millisecond},
	{Kind: CutBefore},
	{Kind: CutAfter},
	{Kind: Status500},
	{Kind: Half},
}

// Call is a request to add or to remove a port.
type Call struct {
	Op    Op
	N     int // it is the N-th of its Op since the last Inject, from 1
	Body  []byte
	Fault Fault
	// Refused is set when RootlessKit has served the request, and its answer was an error.
	Refused bool
}

// IsLost tells whether the caller can't know what became of an [AddPort]. Half of an error is
// an answer, too.
func (c Call) IsLost() bool {
	switch c.Fault.Kind {
	case CutBefore, CutAfter:
		return true
	case Half:
		return !c.Refused
	}
	return false
}

// Spec returns what an [AddPort] asks for.
func (c Call) Spec() (port.Spec, error) {
	var spec port.Spec
	err := json.Unmarshal(c.Body, &spec)
	return spec, err
}

// Plan chooses the fault of a call, whose own Fault is not set yet. It is called by one
// goroutine at a time.
type Plan func(Call) Fault

// At is the plan with one fault, at the n-th call of that Op.
func At(op Op, n int, f Fault) Plan {
	return func(c Call) Fault {
		if c.Op == op && c.N == n {
			return f
		}
		return Fault{}
	}
}

// All is the plan with all the faults of others. Of two faults for one call, the first holds.
func All(plans ...Plan) Plan {
	return func(c Call) Fault {
		for _, p := range plans {
			if f := p(c); f != (Fault{}) {
				return f
			}
		}
		return Fault{}
	}
}

// Proxy is a running proxy. It injects nothing before [Proxy.Inject].
type Proxy struct {
	Socket string // where it listens for the user's dockerd

	server    *http.Server
	transport *http.Transport
	closed    chan struct{}

	mu    sync.Mutex
	plan  Plan
	calls []*Call
	n     map[Op]int // how many of calls there are of each
}

// Start starts a proxy for the user's RootlessKit that serves its API at socket, now or later.
func Start(socket string, uid int) (*Proxy, error) {
	dir, err := os.MkdirTemp("", "berth-faultproxy-")
	if err != nil {
		return nil, err
	}
	p := &Proxy{Socket: filepath.Join(dir, "api.sock"), closed: make(chan struct{}), n: map[Op]int{}}
	p.transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	p.server = &http.Server{Handler: p}
	l, err := listen(p.Socket, uid)
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	go p.server.Serve(l) // until Close
	return p, nil
}

// listen makes a socket that nobody but the user can connect to, in a folder that nobody but us can change: whoever may
// connect can publish ports of the host.
func listen(socket string, uid int) (net.Listener, error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(os.Chmod(socket, 0o600), os.Chown(socket, uid, -1), os.Chmod(filepath.Dir(socket), 0o755)); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Close ends the proxy and cuts its connections.
func (p *Proxy) Close() error {
	close(p.closed)
	err := p.server.Close()
	p.transport.CloseIdleConnections()
	return errors.Join(err, os.RemoveAll(filepath.Dir(p.Socket)))
}

// Inject has plan choose the faults from now on, nil for none, and counts calls anew. Requests
// that are being served keep the fault they have.
func (p *Proxy) Inject(plan Plan) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.plan, p.calls, p.n = plan, nil, map[Op]int{}
}

// Calls returns the calls since the last Inject, in the order they came.
func (p *Proxy) Calls() (calls []Call) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.calls {
		calls = append(calls, *c)
	}
	return calls
}

// ServeHTTP is one request to the proxy.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	call := p.record(r, body)
	fault := call.Fault
	select {
	case <-time.After(fault.Delay):
	case <-p.closed:
		panic(http.ErrAbortHandler)
	}
	switch fault.Kind {
	case CutBefore:
		panic(http.ErrAbortHandler) // net/http cuts the connection
	case Status500:
		http.Error(w, fmt.Sprintf(`{"message":%q}`, Message), http.StatusInternalServerError)
		return
	}
	status, header, answer, err := p.pass(r, body)
	p.mu.Lock()
	call.Refused = err == nil && status >= http.StatusBadRequest
	p.mu.Unlock()
	if err != nil || fault.Kind == CutAfter {
		panic(http.ErrAbortHandler)
	}
	if fault.Kind == Half && len(answer) == 0 {
		// There is nothing to halve in the answer to a removal: half an error it is.
		status, answer = http.StatusInternalServerError, fmt.Appendf(nil, `{"message":%q}`, Message)
	}
	if t := header.Get("Content-Type"); t != "" {
		w.Header().Set("Content-Type", t)
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(answer)))
	w.WriteHeader(status)
	if fault.Kind == Half {
		w.Write(answer[:len(answer)/2])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	w.Write(answer)
}

// record takes note of a request, and chooses its fault.
func (p *Proxy) record(r *http.Request, body []byte) *Call {
	var op Op
	switch {
	case r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/ports"):
		op = AddPort
	case r.Method == http.MethodDelete && strings.Contains(r.URL.Path, "/ports/"):
		op = RemovePort
	default:
		return &Call{}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.n[op]++
	c := &Call{Op: op, N: p.n[op], Body: body}
	if p.plan != nil {
		c.Fault = p.plan(*c)
	}
	p.calls = append(p.calls, c)
	return c
}

// pass has RootlessKit serve the request, and returns its whole answer.
func (p *Proxy) pass(r *http.Request, body []byte) (status int, _ http.Header, answer []byte, _ error) {
	// RootlessKit does not heed a caller that has gone.
	ctx := context.WithoutCancel(r.Context())
	req, err := http.NewRequestWithContext(ctx, r.Method, "http://rootlesskit"+r.URL.RequestURI(), bytes.NewReader(body))
	if err != nil {
		return 0, nil, nil, err
	}
	req.Header = r.Header.Clone()
	resp, err := p.transport.RoundTrip(req)
	if err != nil {
		return 0, nil, nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, answer, err
}
