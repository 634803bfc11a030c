package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	msuser "github.com/moby/sys/user"

	"berth/hack/stack"
)

// machine is what rootless Docker needs of a machine, for one user.
type machine struct {
	user       string
	uid        int
	distro     string // ID and ID_LIKE of os-release(5)
	programs   map[string]bool
	uids, gids int64
	nextID     int64 // behind all ranges of /etc/subuid and /etc/subgid
	tun        error
	maxUserns  int // -1: there is no such limit
	noClone    bool
	restricted bool
	cgroup2    bool
	bus        bool     // the user has a D-Bus, by which runc asks systemd
	controls   []string // cgroup controllers that the user has
	uncontrols []string // and those that limits of containers need besides
	runtimeDir string
	policies   []string
}

func lookAtMachine(uid int) machine {
	m := machine{uid: uid, user: userName(uint32(uid)), programs: map[string]bool{}, maxUserns: -1, runtimeDir: os.Getenv("XDG_RUNTIME_DIR")}
	if data, err := os.ReadFile("/etc/os-release"); err == nil {
		for line := range strings.Lines(string(data)) {
			if name, value, _ := strings.Cut(strings.TrimSpace(line), "="); name == "ID" || name == "ID_LIKE" {
				m.distro += " " + strings.Trim(value, `"`)
			}
		}
	}
	for _, name := range []string{"newuidmap", "newgidmap"} {
		_, err := exec.LookPath(name)
		m.programs[name] = err == nil
	}
	m.uids, m.gids = m.countIDs("/etc/subuid"), m.countIDs("/etc/subgid", "-g")
	m.nextID = nextID("/etc/subuid", "/etc/subgid")
	m.tun = m.openTun()
	if n, err := number("/proc/sys/user/max_user_namespaces"); err == nil {
		m.maxUserns = n
	}
	n, err := number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") // Ubuntu's
	m.restricted = err == nil && n == 1
	n, err = number("/proc/sys/kernel/unprivileged_userns_clone") // Debian's and Arch's
	m.noClone = err == nil && n == 0
	_, err = os.Stat("/sys/fs/cgroup/cgroup.controllers")
	m.cgroup2 = err == nil
	_, err = os.Stat(fmt.Sprintf("/run/user/%d/bus", m.uid))
	m.bus = err == nil
	m.controls, m.uncontrols = stack.Delegated("/", m.uid)
	if data, err := os.ReadFile("/sys/fs/selinux/enforce"); err == nil && strings.TrimSpace(string(data)) == "1" {
		m.policies = append(m.policies, "SELinux")
	}
	if data, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err == nil && strings.TrimSpace(string(data)) == "Y" {
		m.policies = append(m.policies, "AppArmor")
	}
	return m
}

// openTun tells why the user can't open /dev/net/tun. Of another user's rights, root sees the mode.
func (m machine) openTun() error {
	const file = "/dev/net/tun"
	if m.uid != os.Getuid() {
		info, err := os.Stat(file)
		if err == nil && info.Mode().Perm()&0o006 != 0o006 {
			err = &os.PathError{Op: "open", Path: file, Err: os.ErrPermission}
		}
		return err
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// countIDs asks getsubids, which knows also those of a directory service; without it, the file.
func (m machine) countIDs(file string, flags ...string) (n int64) {
	if out, err := exec.Command("getsubids", append(flags, m.user)...).Output(); err == nil {
		for line := range strings.Lines(string(out)) { // 0: USER FIRST COUNT
			if f := strings.Fields(line); len(f) == 4 {
				count, _ := strconv.ParseInt(f[3], 10, 64)
				n += count
			}
		}
		return n
	}
	list, _ := msuser.ParseSubIDFileFilter(file, func(s msuser.SubID) bool { return s.Name == m.user || s.Name == strconv.Itoa(m.uid) })
	for _, s := range list {
		n += s.Count
	}
	return n
}

// nextID is the first one that nobody has, of those that useradd gives (login.defs(5), SUB_UID_MIN).
func nextID(files ...string) int64 {
	next := int64(100000)
	for _, file := range files {
		list, _ := msuser.ParseSubIDFile(file)
		for _, s := range list {
			next = max(next, s.SubID+s.Count)
		}
	}
	return next
}

// packages are what has a program, in the distributions that others are like (os-release(5)): Ubuntu is like Debian.
var packages = map[string]map[string]string{
	"newuidmap":         {"debian": "apt-get install -y uidmap", "fedora": "dnf install -y shadow-utils", "arch": "pacman -S --noconfirm shadow"},
	"a D-Bus for users": {"debian": "apt-get install -y dbus-user-session", "fedora": "dnf install -y dbus-daemon", "arch": "pacman -S --noconfirm dbus"},
}

// install is what root types to have a program.
func (m machine) install(program string) string {
	for _, id := range strings.Fields(m.distro) {
		if id == "ubuntu" {
			id = "debian"
		}
		if command := packages[program][id]; command != "" {
			return command
		}
	}
	return "# install the package that has " + program
}

// Preconditions has what is not in order of what a user's rootless Docker needs of this machine. It is for when something has failed.
func Preconditions(uid int, ignore ...string) (r Report, _ error) {
	h, err := Look(nil, false)
	if err != nil {
		return r, err
	}
	h.machine = lookAtMachine(uid)
	checks, err := Find(append(ignore, "daemon", "cgroups", "room", "policy")) // those keep nothing from starting
	if err != nil {
		return r, err
	}
	r = Examine(h, checks, nil)
	r.Findings = slices.DeleteFunc(r.Findings, func(f Finding) bool { return f.Mark == OK })
	return r, nil
}

// rootless tells whether it is a user's own Docker that is looked at.
func (h *Host) rootless() bool { return !h.rootful && h.machine.uid != 0 }

func patched(h *Host) []Finding {
	switch d := h.daemon; {
	case d == nil, d.version == "":
		return []Finding{{Mark: Note, Says: "no daemon answers: what depends on its port driver is not checked"}}
	case !d.patched():
		return []Finding{{Mark: Note, Says: d.version + ", stock: it may fail to find a free port on a busy host", Do: "`berth install` installs the patched one"}}
	default:
		return []Finding{{Mark: OK, Says: d.version + ", patched"}}
	}
}

func newuidmap(h *Host) []Finding {
	if !h.rootless() {
		return nil
	}
	if h.machine.programs["newuidmap"] && h.machine.programs["newgidmap"] {
		return []Finding{{Mark: OK, Says: "newuidmap and newgidmap are there"}}
	}
	return []Finding{{Mark: Fail, Says: "newuidmap or newgidmap is missing", Do: "install them", Root: []string{h.machine.install("newuidmap")}}}
}

// wantIDs is what an image may need, and what useradd gives.
const wantIDs = 65536

func subids(h *Host) []Finding {
	m := h.machine
	if !h.rootless() {
		return nil
	}
	if m.uids >= wantIDs && m.gids >= wantIDs {
		return []Finding{{Mark: OK, Says: fmt.Sprintf("%d subordinate uids, %d gids", m.uids, m.gids)}}
	}
	return []Finding{{
		Mark: Fail, Says: fmt.Sprintf("user %s has %d subordinate uids and %d gids, of %d", m.user, m.uids, m.gids, wantIDs),
		Do: "get a range that nobody else has (/etc/subuid, /etc/subgid)",
		// usermod(8) knows neither a user of a directory service, nor what to do without the files.
		Root: []string{fmt.Sprintf("echo %s:%d:%d | tee -a /etc/subuid /etc/subgid", m.user, m.nextID, wantIDs)},
	}}
}

func tun(h *Host) []Finding {
	switch err := h.machine.tun; {
	case !h.rootless():
		return nil
	case err == nil:
		return []Finding{{Mark: OK, Says: "/dev/net/tun can be opened"}}
	case errors.Is(err, os.ErrNotExist):
		return []Finding{{Mark: Fail, Says: err.Error(), Do: "load its module", Root: []string{"modprobe tun"}}}
	default:
		return []Finding{{Mark: Fail, Says: err.Error(), Do: "let everyone open it", Root: []string{"chmod 666 /dev/net/tun"}}}
	}
}

func userns(h *Host) []Finding {
	switch m := h.machine; {
	case !h.rootless():
		return nil
	case m.maxUserns == 0:
		return []Finding{{Mark: Fail, Says: "user.max_user_namespaces is 0", Do: "allow some", Root: []string{"sysctl -w user.max_user_namespaces=28633"}}}
	case m.noClone:
		return []Finding{{Mark: Fail, Says: "kernel.unprivileged_userns_clone is 0", Do: "let users make them", Root: []string{"sysctl -w kernel.unprivileged_userns_clone=1"}}}
	case m.restricted:
		return []Finding{{
			Mark: Note, Says: "AppArmor restricts user namespaces (kernel.apparmor_restrict_unprivileged_userns): rootlesskit needs a profile",
			Do: "apparmor's package has one for /usr/bin/rootlesskit; or lift it for all", Root: []string{"sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"},
		}}
	}
	return []Finding{{Mark: OK, Says: "a user may make user namespaces"}}
}

func cgroups(h *Host) []Finding {
	switch m := h.machine; {
	case !h.rootless():
		return nil
	case !m.cgroup2:
		return []Finding{{Mark: Note, Says: "this machine has no cgroup v2: limits of containers (--memory) have no effect", Do: "boot Linux with systemd.unified_cgroup_hierarchy=1"}}
	case len(m.controls) == 0:
		return []Finding{{Mark: Note, Says: "systemd has no cgroup for this user: limits of containers (--memory) have no effect", Do: "log in through systemd, or linger", Root: []string{"loginctl enable-linger " + m.user}}}
	case !m.bus:
		return []Finding{{Mark: Note, Says: "this user has no D-Bus: limits of containers (--memory) have no effect", Do: "install it, and log in again", Root: []string{m.install("a D-Bus for users")}}}
	case len(m.uncontrols) == 0:
		return []Finding{{Mark: OK, Says: "delegated: " + strings.Join(m.controls, " ")}}
	default:
		return []Finding{{
			Mark: Note, Says: "not delegated: " + strings.Join(m.uncontrols, ", ") + "; limits of containers that need them have no effect", Do: "have systemd delegate them, and log in again",
			Root: []string{
				"mkdir -p /etc/systemd/system/user@.service.d",
				`printf '[Service]\nDelegate=cpu cpuset io memory pids\n' >/etc/systemd/system/user@.service.d/delegate.conf`,
				"systemctl daemon-reload",
			},
		}}
	}
}

func runtimeDir(h *Host) []Finding {
	if !h.rootless() {
		return nil
	}
	if info, err := os.Stat(h.machine.runtimeDir); h.machine.runtimeDir != "" && err == nil && info.IsDir() {
		return []Finding{{Mark: OK, Says: h.machine.runtimeDir}}
	}
	return []Finding{{Mark: Fail, Says: "XDG_RUNTIME_DIR is not set, or is no folder", Do: "log in through systemd, not with su; so that it stays, let the user linger", Root: []string{"loginctl enable-linger " + h.machine.user}}}
}

// room counts what a connection of this host could not get: ports that are held, whoever holds them.
func room(h *Host) (list []Finding) {
	all := len(h.portsOf(Ask{}))
	for _, proto := range []string{"tcp", "udp"} {
		taken, users := map[int]bool{}, map[uint32]int{}
		for _, s := range h.sockets() {
			if s.proto == proto && h.dynamic.has(s.port) && !h.isReserved(s.port) && !taken[s.port] {
				taken[s.port] = true
				users[s.uid]++
			}
		}
		f := Finding{Mark: OK, Says: fmt.Sprintf("%s: of %v, %d are held, %d reserved, %d free", proto, h.dynamic, len(taken), h.dynamic.last-h.dynamic.first+1-all, all-len(taken))}
		byCount := slices.SortedFunc(maps.Keys(users), func(a, b uint32) int { return cmp.Or(users[b]-users[a], int(a)-int(b)) })
		for i, uid := range byCount[:min(len(byCount), 3)] {
			f.Says += fmt.Sprintf("%s %s %d", []string{"; most by", ",", ","}[i], userName(uid), users[uid])
		}
		if all-len(taken) == 0 {
			f.Mark, f.Do = Fail, "widen the range"
			f.Root = []string{"sysctl -w net.ipv4.ip_local_port_range='15000 60999'"}
		} else if len(taken)*10 > all*9 {
			f.Mark = Note
		}
		list = append(list, f)
	}
	return list
}

func policy(h *Host) []Finding {
	if h.machine.policies == nil {
		return []Finding{{Mark: OK, Says: "neither SELinux nor AppArmor is seen to be on"}}
	}
	return []Finding{{Mark: Note, Says: strings.Join(h.machine.policies, " and ") + " is on: that was checked, and not what the rules deny"}}
}
