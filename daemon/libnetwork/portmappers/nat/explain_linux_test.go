package nat

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"

	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// What people are told, to the letter: one line, of 300 characters where the cause leaves room for it.
func TestWhatPeopleAreTold(t *testing.T) {
	const (
		dial       = `Post "http://rootlesskit/v1/ports": dial unix /run/user/1000/dockerd-rootless/api.sock: connect: connection refused`
		privileged = "cannot expose privileged port 80, you can add 'net.ipv4.ip_unprivileged_port_start=80' to /etc/sysctl.conf (currently 1024), or set CAP_NET_BIND_SERVICE on rootlesskit binary, or choose a larger port number (>= 1024): listen tcp4 0.0.0.0:80: bind: permission denied"
	)
	any4, any6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	on := func(port int, text string) error {
		return &hostRefusal{any4, port, types.TCP, errors.New(answerPrefix + text)}
	}
	for _, tc := range []struct {
		first, last int
		f           failure
		want        string
	}{
		{8080, 8080, failure{last: on(8080, "listen tcp4 0.0.0.0:8080: bind: address already in use"), limit: 1024, holder: "another user's process"}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: error while calling RootlessKit PortManager.AddPort(): listen tcp4 0.0.0.0:8080: bind: address already in use; another user's process has it; stop what holds it (sudo ss -ltnp 'sport = :8080'), or publish another (0: any)"},
		{8080, 8080, failure{last: on(8080, "conflict with ID 7")}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: host port 0.0.0.0:8080/tcp: error while calling RootlessKit PortManager.AddPort(): conflict with ID 7; stop the container that has it (if none: restart the rootless daemon, whose RootlessKit has it), or publish another (0: any)"},
		{8080, 8080, failure{last: &childRefusal{8080, errors.New("Bind for 0.0.0.0:8080 failed: port is already allocated")}}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: child namespace: Bind for 0.0.0.0:8080 failed: port is already allocated; stop the container that has it, or publish another host port, or 0 for any free one"},
		{80, 80, failure{last: on(80, privileged)}, "cannot publish container port 80/tcp on host port 80 of 0.0.0.0, [::]: error while calling RootlessKit PortManager.AddPort(): cannot expose privileged port 80, you can add 'net.ipv4.ip_unprivileged_port_start=80' to /etc/sysctl.conf (currently 1024), or set CAP_NET_BIND_SERVICE on rootlesskit binary, or choose a larger port number (>= 1024): listen tcp4 0.0.0.0:80: bind: permission denied; publish a port from 1024 up, or sudo setcap cap_net_bind_service=ep /usr/bin/rootlesskit and restart the daemon"},
		{80, 80, failure{last: on(80, slirpShrug)}, "cannot publish container port 80/tcp on host port 80 of 0.0.0.0, [::]: host port 0.0.0.0:80/tcp: error while calling RootlessKit PortManager.AddPort(): bad request: add_hostfwd: slirp_add_hostfwd failed; publish a port from 1024 up, or sudo sysctl -w net.ipv4.ip_unprivileged_port_start=80"},
		{80, 80, failure{last: on(80, "failed to expose port: listen tcp 0.0.0.0:80: bind: permission denied")}, "cannot publish container port 80/tcp on host port 80 of 0.0.0.0, [::]: error while calling RootlessKit PortManager.AddPort(): failed to expose port: listen tcp 0.0.0.0:80: bind: permission denied; publish a port from 1024 up, or sudo sysctl -w net.ipv4.ip_unprivileged_port_start=80"},
		{8080, 8080, failure{last: on(8080, slirpShrug)}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: host port 0.0.0.0:8080/tcp: error while calling RootlessKit PortManager.AddPort(): bad request: add_hostfwd: slirp_add_hostfwd failed; see who has it (sudo ss -ltnp 'sport = :8080'), or publish another (0: any)"},
		{8080, 8080, failure{last: on(8080, "listen tcp4 0.0.0.0:8080: bind: permission denied"), limit: 1024}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: error while calling RootlessKit PortManager.AddPort(): listen tcp4 0.0.0.0:8080: bind: permission denied; it takes no privilege: a policy denies it (SELinux, AppArmor: sudo journalctl -k)"},
		{8080, 8080, failure{last: &hostRefusal{any4, 8080, types.TCP, fmt.Errorf("%s%s: %w", answerPrefix, slirpShrug, listenError(types.TCP, any4, 8080, syscall.EADDRINUSE))}, limit: 1024}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: error while calling RootlessKit PortManager.AddPort(): bad request: add_hostfwd: slirp_add_hostfwd failed: listen tcp4 0.0.0.0:8080: bind: address already in use; stop what holds it (sudo ss -ltnp 'sport = :8080'), or publish another (0: any)"},
		{8080, 8080, failure{last: on(8080, "listen tcp4 0.0.0.0:8080: bind: operation not permitted"), limit: 1024}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: error while calling RootlessKit PortManager.AddPort(): listen tcp4 0.0.0.0:8080: bind: operation not permitted; it takes no privilege: a policy denies it (SELinux, AppArmor: sudo journalctl -k)"},
		{8080, 8080, failure{last: &childRefusal{8080, fmt.Errorf("failed to bind host port 0.0.0.0:8080/tcp: %w", syscall.EACCES)}, limit: 1024}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: child namespace: failed to bind host port 0.0.0.0:8080/tcp: permission denied; it takes no privilege: a policy denies it (SELinux, AppArmor: sudo journalctl -k)"},
		{8080, 8080, failure{last: on(8080, "listen tcp4 192.0.2.9:8080: bind: cannot assign requested address")}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: host port 0.0.0.0:8080/tcp: error while calling RootlessKit PortManager.AddPort(): listen tcp4 192.0.2.9:8080: bind: cannot assign requested address; publish on an address that the host has (ip address)"},
		{8080, 8080, failure{last: on(8080, "listen tcp 0.0.0.0:8080: bind: An attempt was made to access a socket in a way forbidden by its access permissions.")}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: error while calling RootlessKit PortManager.AddPort(): listen tcp 0.0.0.0:8080: bind: An attempt was made to access a socket in a way forbidden by its access permissions.; publish a port that the host does not reserve"},
		{8080, 8080, failure{last: on(8080, "unsupported port protocol sctp4")}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: host port 0.0.0.0:8080/tcp: error while calling RootlessKit PortManager.AddPort(): unsupported port protocol sctp4; use another protocol or host address, or another port driver (DOCKERD_ROOTLESS_ROOTLESSKIT_PORT_DRIVER)"},
		{8080, 8080, failure{last: on(8080, "socket: too many open files")}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: host port 0.0.0.0:8080/tcp: error while calling RootlessKit PortManager.AddPort(): socket: too many open files; raise the limits of the daemon (ulimit -n)"},
		{8080, 8080, failure{last: &hostRefusal{any4, 8080, types.TCP, fmt.Errorf("%w (10s)", errNoAnswer)}}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: host port 0.0.0.0:8080/tcp: RootlessKit's port driver did not answer in time (10s); see whether RootlessKit is running, and restart the rootless daemon"},
		{8080, 8080, failure{last: &hostRefusal{any4, 8080, types.TCP, fmt.Errorf("%w to others: not asked", errNoAnswer)}}, "cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: host port 0.0.0.0:8080/tcp: RootlessKit's port driver did not answer in time to others: not asked; see whether RootlessKit is running, and restart the rootless daemon"},
		{8080, 8080, failure{last: on(8080, dial)}, `cannot publish container port 80/tcp on host port 8080 of 0.0.0.0, [::]: host port 0.0.0.0:8080/tcp: error while calling RootlessKit PortManager.AddPort(): Post "http://rootlesskit/v1/ports": dial unix /run/user/1000/dockerd-rootless/api.sock: connect: connection refused; see whether RootlessKit is running, and restart the rootless daemon`},
		{0, 0, failure{how: "and none can be had", tried: 28232, last: on(60999, "listen tcp4 0.0.0.0:60999: bind: address already in use")}, "cannot publish container port 80/tcp on a dynamic host port (32768-60999) of 0.0.0.0, [::]: 28232 tried, and none can be had: host port 0.0.0.0:60999/tcp: error while calling RootlessKit PortManager.AddPort(): listen tcp4 0.0.0.0:60999: bind: address already in use; publish other ports"},
		{0, 0, failure{how: "and none can be had", last: errors.New("all of them are reserved (net.ipv4.ip_local_reserved_ports)")}, "cannot publish container port 80/tcp on a dynamic host port (32768-60999) of 0.0.0.0, [::]: 0 tried, and none can be had: all of them are reserved (net.ipv4.ip_local_reserved_ports); have the host reserve fewer, or publish a port by its number"},
		{0, 0, failure{how: "64 refusals do not say why", tried: 64, last: on(60999, slirpShrug)}, "cannot publish container port 80/tcp on a dynamic host port (32768-60999) of 0.0.0.0, [::]: 64 tried, 64 refusals do not say why: host port 0.0.0.0:60999/tcp: error while calling RootlessKit PortManager.AddPort(): bad request: add_hostfwd: slirp_add_hostfwd failed; publish others, or use the port driver builtin"},
		{8000, 8010, failure{how: "and none can be had", tried: 11, last: &hostRefusal{any4, 8010, types.TCP, listenError(types.TCP, any4, 8010, syscall.EADDRINUSE)}}, "cannot publish container port 80/tcp on a host port in 8000-8010 of 0.0.0.0, [::]: 11 tried, and none can be had: host port 0.0.0.0:8010/tcp: listen tcp4 0.0.0.0:8010: bind: address already in use; stop what holds it (sudo ss -ltnp 'sport = :8010'), or publish another (0: any)"},
		{80, 90, failure{how: "and none can be had", tried: 11, last: on(90, privileged)}, "cannot publish container port 80/tcp on a host port in 80-90 of 0.0.0.0, [::]: 11 tried, and none can be had: host port 0.0.0.0:90/tcp: error while calling RootlessKit PortManager.AddPort(): cannot expose privileged port 80, you can add 'net.ipv4.ip_unprivileged_port_start=80' to /etc/sysctl.conf (currently 1024), or set CAP_NET_BIND_SERVICE on rootlesskit binary, or choose a larger port number (>= 1024): listen tcp4 0.0.0.0:80: bind: permission denied; publish a port from 1024 up, or sudo setcap cap_net_bind_service=ep /usr/bin/rootlesskit and restart the daemon"},
		{8000, 8010, failure{how: "none was had in 2s", tried: 5, last: &childRefusal{8010, fmt.Errorf("failed to bind host port 0.0.0.0:8010/tcp: %w", syscall.EADDRINUSE)}}, "cannot publish container port 80/tcp on a host port in 8000-8010 of 0.0.0.0, [::]: 5 tried, none was had in 2s: child namespace: failed to bind host port 0.0.0.0:8010/tcp: address already in use; publish another host port, or 0 for any free one"},
	} {
		err := &tc.f
		err.req = &request{proto: types.TCP, container: 80, first: tc.first, last: tc.last, addrs: []address{{host: any4}, {host: any6}}}
		if err.first, err.end = tc.first, tc.last; tc.first == 0 {
			err.first, err.end = 32768, 60999
		}
		err.rootlessKit = "/usr/bin/rootlesskit"
		assert.Check(t, is.Equal(err.Error(), tc.want))
		assert.Check(t, errors.Is(err, tc.f.last))
		if len(tc.f.last.Error()) < 140 { // RootlessKit's own words may take up more.
			assert.Check(t, len(err.Error()) <= 300, err)
		}
	}
}

// What is said depends on the protocol, on the limit of this very host, and on whether anything can be done.
func TestAdvice(t *testing.T) {
	at := func(port int, text string) error { return &hostRefusal{port: port, err: errors.New(text)} }
	one := &request{proto: types.TCP, first: 1, last: 1}
	for _, tc := range []struct {
		err  error
		r    *request
		f    failure
		want string
	}{
		{at(80, "bind: address already in use"), &request{proto: types.UDP, first: 80, last: 80}, failure{}, "(sudo ss -lunp 'sport = :80')"},
		{at(443, "(currently 500): permission denied"), one, failure{}, "from 500 up"},
		{at(443, "(currently 80): permission denied"), one, failure{}, "a policy denies it"},
		{at(1040, "permission denied"), one, failure{limit: 1050}, "from 1050 up"},
		{at(1040, "permission denied"), one, failure{limit: 1040}, "a policy denies it"},
		{at(60999, "bind: address already in use"), &request{proto: types.TCP}, failure{first: 32768, end: 60999, limit: 1024}, "ip_local_port_range='16384 65535'"},
		{at(1999, "bind: address already in use"), &request{proto: types.TCP}, failure{first: 1500, end: 1999, limit: 1024}, "ip_local_port_range='1024 65535'"},
		{errors.New("invalid port range: 0-65535"), one, failure{}, ""},
		{at(8080, "invalid IP: 1.2.3"), one, failure{}, ""},
		{context.Canceled, one, failure{}, ""},
	} {
		tc.f.last, tc.f.req = tc.err, tc.r
		got := tc.f.advice()
		assert.Check(t, is.Contains(got, tc.want), tc.err)
		assert.Check(t, is.Equal(got == "", tc.want == ""), "%v: %q", tc.err, got)
	}
	err := &failure{req: one, last: at(8080, "pesto failed: exit status 1\n\tno such rule\n")}
	assert.Check(t, is.Contains(err.Error(), "exit status 1 no such rule"))
}
