package doctor

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/stack"
)

// host is one as data: what is in taken cannot be bound.
func host(taken ...int) *Host {
	return &Host{
		unprivileged: 1024,
		dynamic:      span{32768, 60999},
		addresses:    []netip.Addr{netip.MustParseAddr("192.0.2.1")},
		machine:      machine{uid: 1000, user: "u", maxUserns: -1},
		processes:    func() map[uint32]string { return nil },
		sockets:      func() []socket { return []socket{{"tcp", netip.IPv4Unspecified(), 8080, true, 0, 1}} },
		bind: func(_ string, _ netip.Addr, port int) error {
			for _, t := range taken {
				if t == port {
					return unix.EADDRINUSE
				}
			}
			return nil
		},
	}
}

func examine(t *testing.T, h *Host, args ...string) Report {
	t.Helper()
	var asks []Ask
	for _, arg := range args {
		a, err := ParseAsk(arg)
		assert.NilError(t, err)
		asks = append(asks, a)
	}
	return Examine(h, Checks, asks)
}

func TestWhatIsSaidOfAPort(t *testing.T) {
	kit := func(change func(*Daemon)) func(*Host) {
		return func(h *Host) {
			h.daemon = &Daemon{driver: "builtin", protos: []string{"tcp", "tcp4", "tcp6", "udp", "udp4", "udp6"}, rootlessKit: "/usr/bin/rootlesskit"}
			change(h.daemon)
		}
	}
	for _, tt := range []struct {
		ask   string
		taken []int
		host  func(*Host)
		check string
		mark  Mark
		says  string
		root  string
	}{
		{ask: "8080", check: "port", mark: OK, says: "can be published"},
		{ask: "8080", taken: []int{8080}, check: "held", mark: Fail, says: "of user root has it"},
		{ask: "8080", taken: []int{8080}, host: kit(func(d *Daemon) { d.ports = map[string]string{"8080/tcp": "web"} }), check: "held", mark: Fail, says: "container web of this daemon"},
		{ask: "80", check: "privileged", mark: Fail, says: "below 1024", root: "sysctl -w net.ipv4.ip_unprivileged_port_start=80"},
		{ask: "80", host: kit(func(*Daemon) {}), check: "privileged", mark: Fail, root: "setcap cap_net_bind_service=ep /usr/bin/rootlesskit"},
		{ask: "80", host: kit(func(d *Daemon) { d.privileged = true }), check: "port", mark: OK},
		{ask: "80", host: kit(func(d *Daemon) { d.driver, d.privileged = "slirp4netns", true }), check: "privileged", mark: Fail, root: "sysctl -w net.ipv4.ip_unprivileged_port_start=80"},
		{ask: "8080", host: kit(func(d *Daemon) { d.silent = true }), check: "rootlesskit", mark: Fail, says: "does not answer"},
		{ask: "8080", host: kit(func(d *Daemon) { d.silent, d.files, d.maxFiles = true, 1023, 1024 }), check: "rootlesskit", mark: Fail, says: "has 1023 descriptors open, of 1024"},
		{ask: "8080", host: kit(func(d *Daemon) { d.files, d.maxFiles = 1022, 1024 }), check: "port", mark: OK},
		{ask: "8080", host: func(h *Host) { h.bind = func(string, netip.Addr, int) error { return unix.EPERM } }, check: "held", mark: Fail, says: "a process of user root"},
		{ask: "8081", host: func(h *Host) { h.bind = func(string, netip.Addr, int) error { return unix.EPERM } }, check: "held", mark: Fail, says: "a policy denies it"},
		{ask: "80", host: func(h *Host) { h.unprivileged = 80 }, check: "port", mark: OK},
		{ask: "80", host: func(h *Host) { h.rootful = true }, check: "port", mark: OK},
		{ask: "81", taken: []int{81}, host: func(h *Host) {
			h.sockets = func() []socket { return []socket{{"tcp", netip.IPv4Unspecified(), 81, true, 0, 1}} }
		}, check: "privileged", mark: Fail, says: "below 1024; and a process of user root has it", root: "sysctl -w net.ipv4.ip_unprivileged_port_start=81"},
		{ask: "8081", host: func(h *Host) {
			h.ipv6, h.bind = true, func(_ string, addr netip.Addr, _ int) error {
				if addr.Is6() {
					return unix.EADDRINUSE
				}
				return nil
			}
		}, check: "families", mark: Fail, says: "is taken on ::"},
		{ask: "40000", check: "dynamic", mark: Note, says: "32768-60999", root: "sysctl -w net.ipv4.ip_local_reserved_ports=40000"},
		{ask: "40000", host: func(h *Host) { h.reserved = []span{{1, 1}} }, check: "dynamic", mark: Note, root: "sysctl -w net.ipv4.ip_local_reserved_ports=1,40000"},
		{ask: "40000", host: func(h *Host) { h.reserved = []span{{39999, 40001}} }, check: "reserved", mark: Note},
		{ask: "192.0.2.9:80", check: "address", mark: Fail, says: "no address 192.0.2.9"},
		{ask: "192.0.2.1:8080", check: "port", mark: OK},
		{ask: "8080/sctp", host: kit(func(*Daemon) {}), check: "protocol", mark: Fail, says: "drivers supports sctp"},
		{ask: "[::1]:0", host: kit(func(d *Daemon) { d.protos = []string{"tcp"} }), check: "address", mark: Fail},
		{ask: "9000-9002", taken: []int{9000, 9001}, check: "port", mark: OK, says: "at 9002, behind 2 that can't"},
		{ask: "9000-9001", taken: []int{9000, 9001}, check: "held", mark: Fail, says: "none of 2 ports is free"},
		{ask: "1000-1100", check: "port", mark: OK, says: "at 1024, behind 24 that can't"},
		{ask: "0", taken: []int{32769}, host: func(h *Host) { h.reserved = []span{{32768, 32768}} }, check: "port", mark: OK, says: "at 32770"},
		{ask: "0", host: func(h *Host) { h.reserved = []span{h.dynamic} }, check: "port", mark: Fail, says: "all are reserved"},
	} {
		h := host(tt.taken...)
		if tt.host != nil {
			tt.host(h)
		}
		r := examine(t, h, tt.ask)
		f := r.Findings[0]
		assert.Check(t, is.Equal(f.Check, tt.check), "%s: %+v", tt.ask, f)
		assert.Check(t, is.Equal(f.Mark, tt.mark), "%s: %+v", tt.ask, f)
		assert.Check(t, is.Contains(f.Says, tt.says), tt.ask)
		assert.Check(t, is.Equal(strings.Join(f.Root, ";"), tt.root), tt.ask)
		assert.Check(t, is.Equal(r.Failed(), tt.mark == Fail), tt.ask)
	}
}

// slirp4netns does not say why: after 64 refusals the daemon gives up, unless it can look.
func TestPortDriverThatDoesNotSayWhy(t *testing.T) {
	var taken []int
	for port := 20500; port < 20600; port++ {
		taken = append(taken, port)
	}
	h := host(taken...)
	h.daemon = &Daemon{driver: "slirp4netns", protos: []string{"tcp"}}
	assert.Assert(t, examine(t, h, "20500-20600").Failed())
	h.daemon.view = true
	assert.Assert(t, !examine(t, h, "20500-20600").Failed())
}

// What root does about each precondition, by distribution: most of it is the same on all, and only packages differ.
func TestRemedies(t *testing.T) {
	for _, tt := range []struct {
		name     string
		check    func(*Host) []Finding
		ailing   func(*machine)
		mark     Mark
		says     string
		remedy   []string            // on all of them
		byDistro map[string][]string // or by os-release's ID and ID_LIKE
	}{
		{name: "newuidmap", check: newuidmap, ailing: func(m *machine) { m.programs = nil }, mark: Fail, says: "newuidmap or newgidmap is missing", byDistro: map[string][]string{
			"debian": {"apt-get install -y uidmap"}, "ubuntu debian": {"apt-get install -y uidmap"},
			"fedora": {"dnf install -y shadow-utils"}, "rocky rhel centos fedora": {"dnf install -y shadow-utils"},
			"arch": {"pacman -S --noconfirm shadow"}, "alpine": {"# install the package that has newuidmap"},
		}},
		{name: "newgidmap alone", check: newuidmap, ailing: func(m *machine) { m.programs["newgidmap"] = false }, mark: Fail, says: "is missing", byDistro: map[string][]string{
			"linuxmint ubuntu debian": {"apt-get install -y uidmap"},
		}},
		{name: "subids", check: subids, ailing: func(m *machine) { m.gids-- }, mark: Fail, says: "user u has 65536 subordinate uids and 65535 gids, of 65536", remedy: []string{"echo u:200000:65536 | tee -a /etc/subuid /etc/subgid"}},
		{name: "no tun", check: tun, ailing: func(m *machine) { m.tun = os.ErrNotExist }, mark: Fail, says: "not exist", remedy: []string{"modprobe tun"}},
		{name: "tun", check: tun, ailing: func(m *machine) { m.tun = os.ErrPermission }, mark: Fail, says: "permission denied", remedy: []string{"chmod 666 /dev/net/tun"}},
		{name: "userns", check: userns, ailing: func(m *machine) { m.maxUserns = 0 }, mark: Fail, says: "max_user_namespaces is 0", remedy: []string{"sysctl -w user.max_user_namespaces=28633"}},
		{name: "userns of Debian and Arch", check: userns, ailing: func(m *machine) { m.noClone = true }, mark: Fail, says: "unprivileged_userns_clone is 0", remedy: []string{"sysctl -w kernel.unprivileged_userns_clone=1"}},
		{name: "userns of Ubuntu", check: userns, ailing: func(m *machine) { m.restricted = true }, mark: Note, says: "AppArmor restricts", remedy: []string{"sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"}},
		{name: "cgroup v1", check: cgroups, ailing: func(m *machine) { m.cgroup2 = false }, mark: Note, says: "no cgroup v2"},
		{name: "no systemd of the user's", check: cgroups, ailing: func(m *machine) { m.controls = nil }, mark: Note, says: "systemd has no cgroup for this user", remedy: []string{"loginctl enable-linger u"}},
		{name: "bus", check: cgroups, ailing: func(m *machine) { m.bus = false }, mark: Note, says: "no D-Bus", byDistro: map[string][]string{
			"debian": {"apt-get install -y dbus-user-session"}, "ubuntu debian": {"apt-get install -y dbus-user-session"},
			"fedora": {"dnf install -y dbus-daemon"}, "arch": {"pacman -S --noconfirm dbus"},
		}},
		{name: "delegation", check: cgroups, ailing: func(m *machine) { m.uncontrols = []string{"cpu"} }, mark: Note, says: "not delegated: cpu;", remedy: []string{
			"mkdir -p /etc/systemd/system/user@.service.d",
			`printf '[Service]\nDelegate=cpu cpuset io memory pids\n' >/etc/systemd/system/user@.service.d/delegate.conf`,
			"systemctl daemon-reload",
		}},
		{name: "runtime-dir", check: runtimeDir, ailing: func(m *machine) { m.runtimeDir = "" }, mark: Fail, says: "XDG_RUNTIME_DIR is not set", remedy: []string{"loginctl enable-linger u"}},
	} {
		for _, distro := range []string{"debian", "ubuntu debian", "fedora", "arch", "linuxmint ubuntu debian", "rocky rhel centos fedora", "alpine"} {
			remedy := tt.remedy
			if tt.byDistro != nil {
				if remedy = tt.byDistro[distro]; remedy == nil {
					continue
				}
			}
			h := host()
			h.machine = machine{
				uid: 1000, user: "u", distro: distro, programs: map[string]bool{"newuidmap": true, "newgidmap": true}, uids: wantIDs, gids: wantIDs, nextID: 200000,
				maxUserns: -1, cgroup2: true, bus: true, controls: []string{"memory", "pids"}, runtimeDir: t.TempDir(),
			}
			before := tt.check(h)[0]
			assert.Check(t, is.Equal(before.Mark, OK), "%s: %+v", tt.name, before)
			tt.ailing(&h.machine)
			f := tt.check(h)[0]
			assert.Check(t, is.Equal(f.Mark, tt.mark), "%s on %s", tt.name, distro)
			assert.Check(t, is.Contains(f.Says, tt.says), "%s on %s", tt.name, distro)
			assert.Check(t, is.DeepEqual(f.Root, remedy), "%s on %s", tt.name, distro)
			h.machine.uid = 0 // root's Docker needs none of it
			assert.Check(t, is.Len(tt.check(h), 0), tt.name)
		}
	}
}

func TestHowFullTheRangeIs(t *testing.T) {
	h := host()
	h.dynamic, h.reserved = span{40000, 40009}, []span{{40000, 40003}}
	hold := func(n int) Finding {
		h.sockets = func() (list []socket) {
			for port := 40009; port > 40009-n; port-- {
				list = append(list, socket{"tcp", netip.IPv4Unspecified(), port, true, uint32(4000000000 + port%2), 1})
			}
			return list
		}
		return room(h)[0]
	}
	assert.Check(t, is.DeepEqual(hold(0), Finding{Mark: OK, Says: "tcp: of 40000-40009, 0 are held, 4 reserved, 6 free"}))
	assert.Check(t, is.DeepEqual(hold(3), Finding{Mark: OK, Says: "tcp: of 40000-40009, 3 are held, 4 reserved, 3 free; most by 4000000001 2, 4000000000 1"}))
	f := hold(6)
	assert.Check(t, is.Equal(f.Mark, Fail))
	assert.Check(t, is.Contains(f.Root[0], "ip_local_port_range"))
}

func TestCgroupsPolicyAndRuntimeDir(t *testing.T) {
	h := host()
	h.machine.controls, h.machine.uncontrols, h.machine.cgroup2, h.machine.bus = []string{"cpu", "memory", "pids"}, nil, true, true
	assert.Check(t, is.Equal(cgroups(h)[0].Mark, OK))
	h.machine.controls, h.machine.uncontrols = []string{"memory", "pids"}, []string{"cpu"}
	assert.Check(t, is.Contains(cgroups(h)[0].Says, "not delegated: cpu;"))
	assert.Check(t, is.Len(cgroups(h)[0].Root, 3))
	h.machine.controls, h.machine.uncontrols = stack.Delegated(t.TempDir(), 1000)
	assert.Check(t, is.Equal(cgroups(h)[0].Mark, Note))
	assert.Check(t, is.Contains(cgroups(h)[0].Says, "systemd has no cgroup for this user"))

	assert.Check(t, is.Equal(policy(h)[0].Mark, OK))
	h.machine.policies = []string{"SELinux", "AppArmor"}
	assert.Check(t, is.Contains(policy(h)[0].Says, "SELinux and AppArmor is on: that was checked"))

	for dir, want := range map[string]Mark{"": Fail, "/nowhere": Fail, "/proc/self/status": Fail, t.TempDir(): OK} {
		h.machine.runtimeDir = dir
		assert.Check(t, is.Equal(runtimeDir(h)[0].Mark, want), dir)
	}
}

// The range that is proposed is nobody's, in either file.
func TestSubIDsToPropose(t *testing.T) {
	dir := t.TempDir()
	uids, gids := filepath.Join(dir, "subuid"), filepath.Join(dir, "subgid")
	assert.Check(t, is.Equal(nextID(uids, gids), int64(100000)))
	assert.NilError(t, os.WriteFile(uids, []byte("a:524288:65536\nb:100000:65536\n"), 0o600))
	assert.NilError(t, os.WriteFile(gids, []byte("a:600000:10\n"), 0o600))
	h := host()
	h.machine.nextID = nextID(uids, gids)
	assert.Check(t, is.DeepEqual(subids(h)[0].Root, []string{"echo u:600010:65536 | tee -a /etc/subuid /etc/subgid"}))
}

// What root pastes serves all that was asked for, in the order in which it has to be done.
func TestBlockForRoot(t *testing.T) {
	r := examine(t, host(), "443", "80", "40000", "40001", "40000/udp")
	assert.Check(t, is.DeepEqual(r.block(), []string{
		"sysctl -w net.ipv4.ip_unprivileged_port_start=80 | tee -a /etc/sysctl.d/99-rootless.conf",
		"sysctl -w net.ipv4.ip_local_reserved_ports=40000,40001 | tee -a /etc/sysctl.d/99-rootless.conf",
	}))
	list := ParseExcluded(english)
	r = Report{Findings: []Finding{*excluded(list, "ipv4", "tcp", 1433), *excluded(list, "ipv4", "tcp", 51600)}}
	assert.Check(t, is.DeepEqual(r.block(), []string{
		"net stop winnat", "netsh int ipv4 add excludedportrange protocol=tcp startport=1433 numberofports=1", "net start winnat",
		"net stop winnat", "netsh int ipv4 add excludedportrange protocol=tcp startport=51600 numberofports=1", "net start winnat",
	}))
}

func TestIgnoredAndUnknownChecks(t *testing.T) {
	checks, err := Find([]string{"privileged"})
	assert.NilError(t, err)
	a, err := ParseAsk("80")
	assert.NilError(t, err)
	assert.Assert(t, !Examine(host(), checks, []Ask{a}).Failed())
	_, err = Find([]string{"nosuch"})
	assert.ErrorContains(t, err, `no check "nosuch"`)
}

func TestComposeFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "compose.yaml")
	assert.NilError(t, os.WriteFile(file, []byte(`
services:
  web: {image: x, ports: ["8080:80", "127.0.0.1:${DB:-5432}:5432", "53:53/udp", "80"]}
  api: {image: x, ports: ["9000-9010:80", "8080:8080"]}
`), 0o600))
	asks, err := FromCompose(t.Context(), file)
	assert.NilError(t, err)
	var got []string
	for _, a := range asks {
		got = append(got, a.String())
	}
	assert.DeepEqual(t, got, []string{"api 9000-9010/tcp", "api 8080/tcp", "web 8080/tcp", "web 127.0.0.1:5432/tcp", "web 53/udp", "web 0/tcp"})
	r := Examine(host(), Checks, asks)
	assert.Check(t, is.Equal(r.Findings[2].Check, "twice"))
	assert.Check(t, is.Contains(r.Findings[2].Says, "service api"))
}

func TestParseAsk(t *testing.T) {
	for _, bad := range []string{"", "x", "65536", "-1", "20-10", "0-10", "80/icmp", "nohost:80", "1.2.3.4:", "::1:80"} {
		_, err := ParseAsk(bad)
		assert.Check(t, err != nil, bad)
	}
}

// The settings below /proc/sys/net are those of the reading thread's namespace.
func TestARealHost(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("a network namespace takes root")
	}
	runtime.LockOSThread() // for good: the thread and its namespace end with the test
	ns, err := netns.New()
	assert.NilError(t, err)
	defer ns.Close()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	assert.NilError(t, err)
	defer unix.Close(fd)
	assert.NilError(t, unix.Bind(fd, &unix.SockaddrInet4{Port: 8080}))
	assert.NilError(t, unix.Listen(fd, 1))
	for name, value := range map[string]string{"ip_unprivileged_port_start": "500", "ip_local_port_range": "40000 40999", "ip_local_reserved_ports": "40000-40998"} {
		assert.NilError(t, os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0))
	}
	h, err := Look(nil, false)
	assert.NilError(t, err)
	r := examine(t, h, "8080")
	assert.Check(t, r.Failed())
	assert.Check(t, is.Contains(r.Findings[0].Says, "process "+strconv.Itoa(os.Getpid())+" (doctor.test) of user root has it"))
	assert.Check(t, !examine(t, h, "500").Failed())
	assert.Check(t, examine(t, h, "499").Failed())
	assert.Check(t, is.Contains(examine(t, h, "0").Findings[0].Says, "at 40999"))
	assert.Check(t, !examine(t, h, "8080/udp").Failed())
}

// A hundred ports, all of them taken by a process that is looked for. They should take less than 300 ms.
func BenchmarkHundredPorts(b *testing.B) {
	var asks []Ask
	for range 100 {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		assert.NilError(b, err)
		defer l.Close()
		port := l.Addr().(*net.TCPAddr).Port
		asks = append(asks, Ask{First: port, Last: port, Proto: "tcp"})
	}
	for b.Loop() {
		h, err := Look(nil, false)
		assert.NilError(b, err)
		assert.Assert(b, Examine(h, Checks, asks).Failed())
	}
}

// The kernel's IPv4 addresses are found by what people write.
func TestListedSocketsHaveTheAddressTheyAreBoundTo(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.2:0")
	assert.NilError(t, err)
	defer l.Close()
	at := l.Addr().(*net.TCPAddr).AddrPort()
	found := slices.ContainsFunc(listSockets(), func(s socket) bool {
		return s.proto == "tcp" && netip.AddrPortFrom(s.addr, uint16(s.port)) == at && s.listening
	})
	assert.Check(t, found, "%s is not listed", at)
}
