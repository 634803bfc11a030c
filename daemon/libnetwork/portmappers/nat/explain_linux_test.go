package nat

import (
	"context"
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

func TestAdvice(t *testing.T) {
	for _, tc := range []struct {
		text  string
		port  int
		proto types.Protocol
		want  string
	}{
		{"address already in use", 8080, types.TCP, "sudo ss -ltnp 'sport = :8080'"},
		{"address already in use", 8080, types.UDP, "sudo ss -lunp 'sport = :8080'"},
		{"conflict with ID 7", 8080, types.TCP, "stop the container that has it"},
		{"permission denied", 443, types.TCP, "net.ipv4.ip_unprivileged_port_start=443"},
		{"(currently 500): permission denied", 443, types.TCP, "from 500 up"},
		{"(currently 80): permission denied", 443, types.TCP, ""},
		{"permission denied", 1024, types.TCP, ""},
		{slirpShrug, 443, types.TCP, "net.ipv4.ip_unprivileged_port_start=443"},
		{slirpShrug, 8080, types.TCP, ""},
		{"forbidden by its access permissions", 8080, types.TCP, "does not reserve"},
		{"cannot assign requested address", 8080, types.TCP, "an address that the host has"},
		{"unsupported protocol", 8080, types.TCP, "another port driver"},
		{"dial unix", 8080, types.TCP, "whether RootlessKit is running"},
		{"invalid IP: 1.2.3", 8080, types.TCP, ""},
		{"too many open files", 8080, types.TCP, "ulimit -n"},
	} {
		got := advice(&hostRefusal{port: tc.port, proto: tc.proto, err: errors.New(tc.text)}, &request{proto: tc.proto}, facts{first: 1})
		assert.Check(t, is.Contains(got, tc.want))
		assert.Check(t, is.Equal(got == "", tc.want == ""), "%q: %q", tc.text, got)
		assert.Check(t, got == "" || strings.HasPrefix(got, "; "))
	}
	r := &request{proto: types.TCP}
	assert.Check(t, is.Contains(advice(&hostRefusal{port: 1040, err: syscall.EACCES}, r, facts{limit: 1050}), "from 1050 up"))
	assert.Check(t, is.Equal(advice(&hostRefusal{port: 1040, err: syscall.EACCES}, r, facts{limit: 1040}), ""))
	inChild := advice(&childRefusal{err: syscall.EADDRINUSE}, r, facts{first: 8080})
	assert.Check(t, is.Equal(inChild, "; publish another host port, or 0 for any free one"))
	assert.Check(t, is.Equal(advice(errors.New("invalid port range: 0-65535"), r, facts{}), ""))
	assert.Check(t, is.Equal(advice(context.Canceled, r, facts{first: 80}), ""))
}
