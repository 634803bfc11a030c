package nat

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"syscall"
	"testing"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// answers has what RootlessKit's port drivers were seen to send.
var answers = []struct {
	text string
	want verdict
}{
	{"listen tcp4 0.0.0.0:45000: bind: address already in use", taken},
	{"failed to expose port: listen tcp 0.0.0.0:45000: bind: address already in use", taken},
	{"failed to expose port: expose request failed with status 500: listen udp 0.0.0.0:45000: bind: address already in use", taken},
	{"pesto failed: exit status 1: Failed to bind port 80: Address already in use", taken},

	{"listen tcp4 0.0.0.0:80: bind: permission denied", forbidden},
	{"cannot expose privileged port 80, you can add 'net.ipv4.ip_unprivileged_port_start=80' to /etc/sysctl.conf (currently 1024), or set CAP_NET_BIND_SERVICE on rootlesskit binary, or choose a larger port number (>= 1024): listen tcp4 0.0.0.0:80: bind: permission denied", forbidden},
	{"failed to expose port: listen tcp 0.0.0.0:80: bind: permission denied", forbidden},
	{"listen tcp4 0.0.0.0:50000: bind: An attempt was made to access a socket in a way forbidden by its access permissions.", forbidden},
	{"conflict with ID 7", forbidden},
	{"failed to expose port: proxy already running", forbidden},

	{"listen tcp4 10.1.2.3:45000: bind: cannot assign requested address", no},
	{"failed to expose port: listen tcp 10.1.2.3:45000: bind: cannot assign requested address", no},
	{"failed to expose port: listen tcp: address :::45000: too many colons in address", no},
	{`unsupported protocol "tcp6"`, no},
	{"unsupported port protocol sctp4", no},
	{"unsupported protocol: sctp4", no},
	{"bad request: add_hostfwd: bad arguments.proto", no},
	{`unknown proto: "quic"`, no},
	{"invalid ParentPort: 65536", no},
	{"accept4: too many open files", no},
	{`protocol "tcp6" is not supported by the RootlessKit port driver "slirp4netns"`, no},

	{"pesto failed: fork/exec /usr/bin/pesto: permission denied", no},
	{"dial unix /run/user/1000/dockerd-rootless/.s4nn.sock: connect: permission denied", no},

	{slirpShrug, maybe},
	{"pesto failed: exit status 1", maybe},
	{"unexpected HTTP status Internal Server Error, body=\"\"", maybe},
	{"", maybe},
}

func TestAnswersOfPortDrivers(t *testing.T) {
	for _, a := range answers {
		for _, text := range []string{answerPrefix + a.text, strings.ToUpper(a.text)} {
			assert.Check(t, is.Equal(driverVerdict(errors.New(text)), a.want), text)
		}
	}
}

// An errno counts only when it is about a port.
func TestVerdictBySource(t *testing.T) {
	dial := &net.OpError{Op: "dial", Net: "unix", Err: syscall.EACCES}
	for _, tc := range []struct {
		err  error
		want verdict
	}{
		{syscall.EADDRINUSE, taken},
		{&net.OpError{Op: "listen", Net: "tcp", Err: syscall.EACCES}, forbidden},
		{syscall.EADDRNOTAVAIL, no},
		{syscall.EMFILE, no},
		{syscall.EAFNOSUPPORT, no},
		{syscall.EIO, maybe},

		{dial, no},
		{&url.Error{Op: "Post", URL: "http://rootlesskit/v1/ports", Err: dial}, no},
		{&url.Error{Op: "Post", URL: "http://rootlesskit/v1/ports", Err: syscall.EADDRINUSE}, no},
		{&net.OpError{Op: "read", Net: "unix", Err: syscall.ECONNRESET}, no},
		{io.ErrUnexpectedEOF, no},
		{&json.SyntaxError{}, no},
		{context.DeadlineExceeded, no},
		{errNoAnswer, no},
	} {
		err := fmt.Errorf("%s%w", answerPrefix, tc.err)
		assert.Check(t, is.Equal(driverVerdict(&hostRefusal{err: err}), tc.want), "%v", err)
	}

	assert.Check(t, is.Equal(childVerdict(syscall.EADDRINUSE), taken))
	assert.Check(t, is.Equal(childVerdict(syscall.EACCES), forbidden))
	assert.Check(t, is.Equal(childVerdict(syscall.EIO), no))
	assert.Check(t, is.Equal(childVerdict(errors.New("invalid port range: 8000-0")), no))
}

// The API's socket is gone, or forbidden: one attempt, and the cause stays.
func TestUnreachableAPI(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.ENOENT, syscall.ECONNREFUSED, syscall.EACCES} {
		f := newFake(t)
		f.answer = func(int, mapping) error {
			return fmt.Errorf("%s%w", answerPrefix, &url.Error{Op: "Post", URL: "http://rootlesskit/v1/ports", Err: &net.OpError{Op: "dial", Net: "unix", Err: errno}})
		}
		err := refused(t, f, context.Background(), request(types.TCP, 0, 0, "0.0.0.0"))
		assert.Check(t, is.ErrorIs(err, errno))
		assert.Check(t, is.ErrorContains(err, errno.Error()+"; see whether RootlessKit is running"))
		assert.Check(t, is.Equal(f.calls, 1))
	}
}

func TestAdvice(t *testing.T) {
	for _, tc := range []struct {
		text  string
		port  int
		proto types.Protocol
		want  string
	}{
		{"address already in use", 8080, types.TCP, "sudo ss -ltnp 'sport = :8080'"},
		{"address already in use", 8080, types.UDP, "sudo ss -lunp 'sport = :8080'"},
		{"permission denied", 443, types.TCP, "net.ipv4.ip_unprivileged_port_start=443"},
		{slirpShrug, 443, types.TCP, "net.ipv4.ip_unprivileged_port_start=443"},
		{slirpShrug, 8080, types.TCP, ""},
		{"currently ip_unprivileged_port_start=1024: permission denied", 443, types.TCP, ""},
		{"invalid IP: 1.2.3", 8080, types.TCP, ""},
		{"too many open files", 8080, types.TCP, "ulimit -n"},
	} {
		got := advice(&hostRefusal{port: tc.port, proto: tc.proto, err: errors.New(tc.text)}, 1, tc.proto)
		assert.Check(t, is.Contains(got, tc.want))
		assert.Check(t, is.Equal(got == "", tc.want == ""), "%q: %q", tc.text, got)
	}
	inChild := advice(&childRefusal{syscall.EADDRINUSE}, 8080, types.TCP)
	assert.Check(t, is.Equal(inChild, "; publish another host port, or 0 for any free one"))
	assert.Check(t, is.Equal(advice(errors.New("invalid port range: 0-65535"), 0, types.TCP), ""))
	assert.Check(t, is.Equal(advice(context.Canceled, 80, types.TCP), ""))
}

// FuzzVerdict joins two answers: no > another port > maybe.
func FuzzVerdict(f *testing.F) {
	for i, a := range answers {
		f.Add(a.text, answers[len(answers)-1-i].text)
		f.Add(answerPrefix+a.text, "")
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		va, vb := driverVerdict(errors.New(a)), driverVerdict(errors.New(b))
		assert.Check(t, va >= maybe && va <= no)
		assert.Check(t, is.Equal(driverVerdict(errors.New(a)), va), "the same text, another verdict")
		// Only ASCII is folded the same way up and down.
		if strings.IndexFunc(a, func(r rune) bool { return r >= 0x80 }) < 0 {
			assert.Check(t, is.Equal(driverVerdict(errors.New(strings.ToUpper(a))), va), "case matters")
		}
		for _, joined := range []string{a + ": " + b, b + ": " + a} {
			// Joining may make a phrase across the seam, never lose one.
			assert.Check(t, driverVerdict(errors.New(joined)) >= max(va, vb))
		}
		assert.Check(t, is.Equal(driverVerdict(errors.New(a+"\n\n"+b)), max(va, vb)))
		_ = advice(errors.New(a), 80, types.TCP)
	})
}
