package doctor

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Checks are all of them, in the order in which they are run. Their names stay.
var Checks = []Check{
	{Name: "daemon", Looks: "whether the daemon answers, and is patched", machine: patched},
	{Name: "rootlesskit", Looks: "whether RootlessKit answers, and has descriptors left", machine: kits, ask: kit},
	{Name: "newuidmap", Looks: "newuidmap and newgidmap, which give a user more ids", machine: newuidmap},
	{Name: "subids", Looks: "this user's subordinate ids", machine: subids},
	{Name: "tun", Looks: "/dev/net/tun, for RootlessKit's network drivers", machine: tun},
	{Name: "userns", Looks: "whether a user may make user namespaces", machine: userns},
	{Name: "cgroups", Looks: "which limits of containers this user may set", machine: cgroups},
	{Name: "runtime-dir", Looks: "XDG_RUNTIME_DIR", machine: runtimeDir},
	{Name: "room", Looks: "how full the dynamic range is", machine: room},
	{Name: "policy", Looks: "whether SELinux or AppArmor is on", machine: policy},
	{Name: "address", Looks: "whether the host has the address", ask: hasAddress},
	{Name: "protocol", Looks: "whether the running port driver serves the protocol", ask: served},
	{Name: "reserved", Looks: "whether the port is in ip_local_reserved_ports", ask: reserved},
	{Name: "dynamic", Looks: "whether any program may get the port by chance", ask: dynamic},
	twice,
	{Name: "privileged", Looks: "whether the port takes a privilege, and RootlessKit has it", port: privileged},
	{Name: "held", Looks: "whether somebody has the port, and who", port: heldBy(0)},
	{Name: "families", Looks: "whether the port is free for IPv6, too, where both are asked for", port: heldBy(1)},
}

// roomFor is how many descriptors a port takes, one for each address family.
const roomFor = 2

func kit(h *Host, _ Ask) *Finding {
	switch d := h.daemon; {
	case d != nil && d.maxFiles > 0 && d.files+roomFor > d.maxFiles: // then it can't answer either
		return &Finding{Mark: Fail, Says: fmt.Sprintf("RootlessKit has %d descriptors open, of %d", d.files, d.maxFiles), Do: "raise the limit (ulimit -n, LimitNOFILE= of docker.service), and restart the daemon"}
	case d != nil && d.silent:
		return &Finding{Mark: Fail, Says: "RootlessKit does not answer", Do: "see whether it is running, and restart the rootless daemon"}
	}
	return nil
}

func kits(h *Host) []Finding {
	if f := kit(h, Ask{}); f != nil {
		return []Finding{*f}
	}
	if d := h.daemon; d == nil || d.maxFiles == 0 {
		return nil
	}
	return []Finding{{Mark: OK, Says: fmt.Sprintf("RootlessKit answers, and has %d descriptors open, of %d", h.daemon.files, h.daemon.maxFiles)}}
}

func hasAddress(h *Host, a Ask) *Finding {
	if !a.Addr.IsValid() || a.Addr.IsUnspecified() || a.Addr.Is4() && a.Addr.IsLoopback() || slices.Contains(h.addresses, a.Addr) {
		return nil
	}
	return &Finding{Mark: Fail, Says: "this host has no address " + a.Addr.String(), Do: "`ip address` lists those that it has"}
}

func served(h *Host, a Ask) *Finding {
	d := h.daemon
	if a.Proto == "sctp" && !h.rootful {
		return &Finding{Mark: Fail, Says: "none of RootlessKit's port drivers supports sctp"}
	}
	if d == nil || d.driver == "" {
		return nil
	}
	network := a.Proto
	if a.Addr.Is6() {
		network += "6"
	}
	if d.serves(network) {
		return nil
	}
	return &Finding{Mark: Fail, Says: fmt.Sprintf("RootlessKit's port driver %s does not support %s", d.driver, network), Do: "it serves " + strings.Join(d.protos, ", ")}
}

// Reserved is for what the kernel chooses: a program that asks for that very port gets it.
func reserved(h *Host, a Ask) *Finding {
	if !a.fixed() || !h.isReserved(a.First) {
		return nil
	}
	return &Finding{Mark: Note, Says: "is in ip_local_reserved_ports: nobody gets it by chance, and you, by its number"}
}

func dynamic(h *Host, a Ask) *Finding {
	if !a.fixed() || !h.dynamic.has(a.First) || h.isReserved(a.First) {
		return nil
	}
	var list []string
	for _, s := range append(slices.Clone(h.reserved), span{a.First, a.First}) {
		list = append(list, s.String())
	}
	return &Finding{
		Mark: Note, Says: fmt.Sprintf("is one of the dynamic ports (%v): another program may take it at any time while it is not published", h.dynamic),
		Do:   "choose one outside, or have it reserved",
		Root: []string{"sysctl -w net.ipv4.ip_local_reserved_ports=" + strings.Join(list, ",")},
	}
}

func privileged(h *Host, a Ask, port int) *Finding {
	if h.rootful || port >= h.unprivileged {
		return nil
	}
	f := &Finding{
		Says: fmt.Sprintf("is privileged: below %d", h.unprivileged),
		Do:   fmt.Sprintf("publish a port from %d up, or let everyone bind this one", h.unprivileged),
		Root: []string{fmt.Sprintf("sysctl -w net.ipv4.ip_unprivileged_port_start=%d", port)},
	}
	for _, addr := range h.families(a) {
		if who := h.holder(a.Proto, addr, port); who != "" {
			f.Says += fmt.Sprintf("; and %s has it on %v", who, addr) // the privilege alone will not do
			break
		}
	}
	if d := h.daemon; d != nil && d.bindsItself() {
		if d.privileged {
			return nil
		}
		if d.rootlessKit != "" {
			f.Do = fmt.Sprintf("publish a port from %d up, or let RootlessKit bind such ports, and restart the daemon", h.unprivileged)
			f.Root = []string{"setcap cap_net_bind_service=ep " + d.rootlessKit}
		}
	}
	return f
}

// heldBy looks at the addresses that a request is bound on, from one of them on: the one that is asked for, or the first of both
// families. The other family has a name of its own.
func heldBy(family int) func(*Host, Ask, int) *Finding {
	return func(h *Host, a Ask, port int) *Finding {
		addrs := h.families(a)
		if a.Proto == "sctp" || family >= len(addrs) {
			return nil // a kernel may lack sctp, and only a rootful daemon serves it
		}
		f := held(h, a.Proto, addrs[family], port)
		if f != nil && family > 0 && !h.dualStack() {
			f.Do = "publish on IPv4 alone (`-p 0.0.0.0:...`), or another port"
		}
		return f
	}
}

func held(h *Host, proto string, addr netip.Addr, port int) *Finding {
	err := h.bind(proto, addr, port)
	if !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM) {
		return nil
	}
	who := h.holder(proto, addr, port) // a privileged port may be held, too
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		if who == "" {
			who = "somebody who cannot be seen"
		}
		return &Finding{Says: fmt.Sprintf("is taken on %v: %s has it", addr, who), Do: "publish another port, or `-p 0:...` for any; or stop whoever has it"}
	case who != "":
		return &Finding{Says: fmt.Sprintf("is taken: %s has it", who), Do: "publish another port"}
	case port >= h.unprivileged:
		return &Finding{Says: "may not be bound, though it takes no privilege: a policy denies it (SELinux, AppArmor)", Do: "`sudo journalctl -k` may say which"}
	}
	return nil
}
