package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/user"
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
	restricted bool
	controls   []string // cgroup controllers that the user has
	uncontrols []string // and those that limits of containers need besides
	runtimeDir string
	policies   []string
}

func lookAtMachine() machine {
	m := machine{uid: os.Getuid(), programs: map[string]bool{}, maxUserns: -1, runtimeDir: os.Getenv("XDG_RUNTIME_DIR")}
	m.user = strconv.Itoa(m.uid)
	if u, err := user.Current(); err == nil {
		m.user = u.Username
	}
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
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if m.tun = err; err == nil {
		f.Close()
	}
	if n, err := number("/proc/sys/user/max_user_namespaces"); err == nil {
		m.maxUserns = n
	}
	n, err := number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
	m.restricted = err == nil && n == 1
	m.controls, m.uncontrols = stack.Delegated("/", m.uid)
	if data, err := os.ReadFile("/sys/fs/selinux/enforce"); err == nil && strings.TrimSpace(string(data)) == "1" {
		m.policies = append(m.policies, "SELinux")
	}
	if data, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err == nil && strings.TrimSpace(string(data)) == "Y" {
		m.policies = append(m.policies, "AppArmor")
	}
	return m
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

// packages installs what has newuidmap.
func (m machine) packages() string {
	has := func(id string) bool { return slices.Contains(strings.Fields(m.distro), id) }
	switch {
	case has("fedora"):
		return "dnf install -y shadow-utils"
	case has("arch"):
		return "pacman -S --noconfirm shadow"
	case has("debian"), has("ubuntu"):
		return "apt-get install -y uidmap"
	}
	return "install the package that has newuidmap"
}

// Preconditions has what is not in order of what a rootless Docker needs of this machine. It is for when something has failed.
func Preconditions(ignore ...string) (r Report, _ error) {
	h, err := Look(nil, false)
	if err != nil {
		return r, err
	}
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
	case d == nil:
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
	return []Finding{{Mark: Fail, Says: "newuidmap or newgidmap is missing", Do: "install them", Root: []string{h.machine.packages()}}}
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
		Do:   "get a range that nobody else has (/etc/subuid, /etc/subgid)",
		Root: []string{fmt.Sprintf("usermod --add-subuids %[1]d-%[2]d --add-subgids %[1]d-%[2]d %[3]s", m.nextID, m.nextID+wantIDs-1, m.user)},
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
	case m.restricted:
		return []Finding{{
			Mark: Note, Says: "AppArmor restricts user namespaces (kernel.apparmor_restrict_unprivileged_userns): rootlesskit needs a profile",
			Do: "Docker's packages have one for /usr/bin/rootlesskit; or lift it for all", Root: []string{"sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"},
		}}
	}
	return []Finding{{Mark: OK, Says: "a user may make user namespaces"}}
}

func cgroups(h *Host) []Finding {
	switch m := h.machine; {
	case !h.rootless():
		return nil
	case len(m.controls) == 0:
		return []Finding{{Mark: Note, Says: "systemd has no cgroup for this user: limits of containers (--memory) have no effect"}}
	case len(m.uncontrols) == 0:
		return []Finding{{Mark: OK, Says: "delegated: " + strings.Join(m.controls, " ")}}
	default:
		return []Finding{{
			Mark: Note, Says: "not delegated: " + strings.Join(m.uncontrols, ", ") + "; limits of containers that need them have no effect", Do: "have systemd delegate them",
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
