package nat

import (
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// portsLeft is counted when somebody asks: at each scrape, from the host's list of sockets, which takes a
// millisecond and some for each thousand of them. Nothing is exported where the host can't be seen.
type portsLeft struct{ desc *prometheus.Desc }

func init() {
	prometheus.MustRegister(portsLeft{meters.NewDesc("ports_left", "The number of the host's dynamic ports that no socket has", "", "protocol")})
}

func (p portsLeft) Describe(ch chan<- *prometheus.Desc) { ch <- p.desc }

func (p portsLeft) Collect(ch chan<- prometheus.Metric) {
	if dir := os.Getenv("ROOTLESSKIT_STATE_DIR"); dir != "" {
		// Without --detach-netns, this process is in the child.
		if child := netNSAt(filepath.Join(dir, "netns")); child == "" || child == hostNetNS {
			return
		}
	}
	for proto, list := range map[string]func(uint8) ([]*netlink.Socket, error){"tcp": netlink.SocketDiagTCP, "udp": netlink.SocketDiagUDP} {
		h, err := newHostPorts(nil, &request{}, nil, new(atomic.Int32))
		if err != nil {
			return
		}
		seen := onHost(func() {
			for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
				socks, failed := list(family)
				err = errors.Join(err, failed)
				for _, s := range socks {
					h.done.add(int(s.ID.SourcePort))
				}
			}
		})
		if !seen || err != nil {
			return
		}
		left := 0
		for port := h.first; port <= h.last; port++ {
			if !h.done.has(port) {
				left++
			}
		}
		ch <- prometheus.MustNewConstMetric(p.desc, prometheus.GaugeValue, float64(left), proto)
	}
}
