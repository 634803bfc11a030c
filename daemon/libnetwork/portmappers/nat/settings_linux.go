package nat

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
)

// settings has the host's files of settings (ip-sysctl.rst). Whichever thread
// reads one at offset 0 gets what is set on the host now.
var settings = sync.OnceValue(func() (files struct{ portRange, reserved, unprivileged *os.File }) {
	onHost(func() {
		files.portRange, _ = os.Open("/proc/sys/net/ipv4/ip_local_port_range")
		files.reserved, _ = os.Open(reservedPorts)
		files.unprivileged, _ = os.Open("/proc/sys/net/ipv4/ip_unprivileged_port_start")
	})
	return files // A nil file's reads fail.
})

// reservedPorts has the ports that the kernel doesn't choose, and the allocator
// leaves out of the dynamic ones.
const reservedPorts = "/proc/sys/net/ipv4/ip_local_reserved_ports"

// hostDynamicPorts returns the host's dynamic range and what of it is reserved.
func hostDynamicPorts() (first, last int, reserved *portSet, _ error) {
	text, err := readSetting(settings().portRange)
	if err == nil {
		_, err = fmt.Sscan(text, &first, &last)
	}
	if err != nil || first < 1 || last > 65535 || last < first {
		return 0, 0, nil, fmt.Errorf("ip_local_port_range is %q: %v", text, err)
	}
	if text, err = readSetting(settings().reserved); err != nil {
		return 0, 0, nil, err
	}
	reserved, err = parsePortSet(text)
	return first, last, reserved, err
}

// hostUnprivileged returns the host's first port that takes no privilege, or 0.
func hostUnprivileged() (port int) {
	text, _ := readSetting(settings().unprivileged)
	port, _ = strconv.Atoi(text)
	return port
}

// readSetting returns a setting in one read: the kernel has no more to say at
// another offset, and cuts what the buffer can't take.
func readSetting(f *os.File) (string, error) {
	for size := 64; ; size *= 16 {
		buf := make([]byte, size)
		n, err := f.ReadAt(buf, 0)
		if n < size { // With io.EOF, if it was read.
			if n == 0 && f == nil {
				return "", err
			}
			return strings.TrimSpace(string(buf[:n])), nil
		}
	}
}

// portSet has a bit for each port. A nil one is empty.
type portSet [65536 / 64]uint64

func (s *portSet) has(port int) bool { return s != nil && s[port/64]&(1<<(port%64)) != 0 }

func (s *portSet) add(port int) { s[port/64] |= 1 << (port % 64) }

// parsePortSet parses "8080,9000-9010".
func parsePortSet(text string) (*portSet, error) {
	if text == "" {
		return nil, nil
	}
	set := new(portSet)
	for part := range strings.SplitSeq(text, ",") {
		a, b, isRange := strings.Cut(part, "-")
		if !isRange {
			b = a
		}
		first, err := strconv.ParseUint(a, 10, 16)
		if err != nil {
			return nil, err
		}
		last, err := strconv.ParseUint(b, 10, 16)
		if err != nil {
			return nil, err
		}
		for p := first; p <= last; p++ {
			set.add(int(p))
		}
	}
	return set, nil
}
