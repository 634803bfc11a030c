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
	{"listen tcp4 0.0.0.0:45000: bind: address already in use", another},
	{"failed to expose port: listen tcp 0.0.0.0:45000: bind: address already in use", another},
	{"failed to expose port: expose request failed with status 500: listen udp 0.0.0.0:45000: bind: address already in use", another},

	{"listen tcp4 0.0.0.0:80: bind: permission denied", another},
	{"cannot expose privileged port 80, you can add 'net.ipv4.ip_unprivileged_port_start=80' to /etc/sysctl.conf (currently 1024), or set CAP_NET_BIND_SERVICE on rootlesskit binary, or choose a larger port number (>= 1024): listen tcp4 0.0.0.0:80: bind: permission denied", another},
	{"failed to expose port: listen tcp 0.0.0.0:80: bind: permission denied", another},
	{"listen tcp4 0.0.0.0:50000: bind: An attempt was made to access a socket in a way forbidden by its access permissions.", another},
	{"conflict with ID 7", another},
	{"failed to expose port: proxy already running", another},
	{"pesto failed: exit status 1\noutput: Forwarding configuration conflict: TCP [0.0.0.0]:45000  =>  45000  versus TCP [127.0.0.2]:45000  =>  45000 \nUnable to add rule TCP [0.0.0.0]:45000  =>  45000 \n", another},

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
	{"pesto failed: exit status 1\noutput: Too many rules (maximum 255)\nUnable to add rule TCP [127.0.0.1]:20255  =>  20255 \n", no},
	{`protocol "tcp6" is not supported by the RootlessKit port driver "slirp4netns"`, no},

	{"pesto failed: fork/exec /usr/bin/pesto: permission denied", no},
	{"dial unix /run/user/1000/dockerd-rootless/.s4nn.sock: connect: permission denied", no},

	{slirpShrug, maybe},
	{"pesto failed: exit status 1", maybe},
	{"unexpected HTTP status Internal Server Error, body=\"\"", maybe},
	{"", maybe},
}

func driverVerdict(err error) verdict { return causeOf(err, 0).verdict() }

func childVerdict(first int, err error) verdict {
	return causeOf(&childRefusal{first: first, err: err}, 0).verdict()
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
		{syscall.EADDRINUSE, another},
		{&net.OpError{Op: "listen", Net: "tcp", Err: syscall.EACCES}, another},
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

	assert.Check(t, is.Equal(childVerdict(0, syscall.EADDRINUSE), another))
	assert.Check(t, is.Equal(childVerdict(1000, syscall.EACCES), another))
	assert.Check(t, is.Equal(childVerdict(0, syscall.EACCES), no), "a dynamic port takes no privilege")
	assert.Check(t, is.Equal(childVerdict(1023, syscall.EACCES), another))
	assert.Check(t, is.Equal(childVerdict(1024, syscall.EACCES), no))
	assert.Check(t, is.Equal(childVerdict(33000, syscall.EACCES), no), "nor does one that was chosen of them")
	assert.Check(t, is.Equal(childVerdict(80, syscall.EIO), no))
	assert.Check(t, is.Equal(childVerdict(8000, errors.New("invalid port range: 8000-0")), no))
}

// The API's socket is gone, or forbidden: one attempt, and the cause stays.
func TestUnreachableAPI(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.ENOENT, syscall.ECONNREFUSED, syscall.EACCES} {
		f := newFake(t)
		f.answer = func(int, mapping) error {
			return fmt.Errorf("%s%w", answerPrefix, &url.Error{Op: "Post", URL: "http://rootlesskit/v1/ports", Err: &net.OpError{Op: "dial", Net: "unix", Err: errno}})
		}
		err := refused(t, f, context.Background(), ask(types.TCP, 0, 0, "0.0.0.0"))
		assert.Check(t, is.ErrorIs(err, errno))
		assert.Check(t, is.ErrorContains(err, errno.Error()+"; see whether RootlessKit is running"))
		assert.Check(t, is.Equal(f.calls, 1))
	}
}

// FuzzCause joins two answers: no > another port > maybe.
func FuzzCause(f *testing.F) {
	for i, a := range answers {
		f.Add(a.text, answers[len(answers)-1-i].text)
		f.Add(answerPrefix+a.text, "")
	}
	of := func(text string) cause { return causeOf(errors.New(text), 0) }
	f.Fuzz(func(t *testing.T, a, b string) {
		ca, cb := of(a), of(b)
		assert.Check(t, ca >= unclear && ca <= unreached)
		assert.Check(t, is.Equal(of(a), ca), "the same text, another cause")
		// Only ASCII is folded the same way up and down.
		if strings.IndexFunc(a, func(r rune) bool { return r >= 0x80 }) < 0 {
			assert.Check(t, is.Equal(of(strings.ToUpper(a)), ca), "case matters")
		}
		for _, joined := range []string{a + ": " + b, b + ": " + a} {
			// Joining may make a phrase across the seam, never lose one.
			assert.Check(t, of(joined) >= max(ca, cb))
		}
		assert.Check(t, is.Equal(of(a+"\n\n"+b), max(ca, cb)))
	})
}
