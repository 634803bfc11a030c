package nat

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/integration/faultproxy"
	"berth/integration/portdriver"
)

// TestContractOfRootlessKit holds the port driver of a real RootlessKit to the contract that the
// fake and the drivers round a driver keep. It runs where dockerd does.
func TestContractOfRootlessKit(t *testing.T) {
	stateDir := os.Getenv("ROOTLESSKIT_STATE_DIR")
	port, err := strconv.Atoi(os.Getenv("BERTH_CONTRACT_PORT"))
	assert.NilError(t, err)
	var rlks []*portdriver.RootlessKit
	for name, as := range map[string]struct {
		wrap    func(PortDriverClient) PortDriverClient
		givesUp bool
	}{
		"itself":           {func(d PortDriverClient) PortDriverClient { return d }, false},
		"as a mapper asks": {func(d PortDriverClient) PortDriverClient { return NewPortMapper(Config{RlkClient: d}).rooms.driver }, true},
	} {
		proxy, err := faultproxy.Start(filepath.Join(stateDir, "api.sock"), os.Getuid())
		assert.NilError(t, err)
		t.Cleanup(func() { assert.NilError(t, proxy.Close()) })
		rlk, err := portdriver.Dial(t.Context(), os.Getenv("BERTH_CONTRACT_VERSION"), proxy.Socket)
		assert.NilError(t, err)
		rlks = append(rlks, rlk)
		d, host := as.wrap(rlk), contractHost(realHost{lag: 10 * time.Second})
		if rlk.Driver == "pesto" {
			host = ownHost{host, rlk}
		}
		s := subject{
			client: func() PortDriverClient { return d },
			host:   host,
			addrs: slices.DeleteFunc(slices.Clone(contractAddrs), func(a netip.Addr) bool {
				return !rlk.ChildHostIP("udp", a).IsValid()
			}),
			port:    port,
			asked:   behind{proxy},
			givesUp: as.givesUp,
		}
		port++
		for promise, check := range promises {
			t.Run(name+"/"+promise, func(t *testing.T) {
				enterChild(t, stateDir)
				check(t, s)
			})
		}
		for promise, check := range promisesOfAnswers {
			t.Run(name+"/"+promise, func(t *testing.T) {
				t.Parallel() // They wait.
				check(t, s)
			})
		}
	}
	t.Cleanup(func() {
		for _, rlk := range rlks {
			left, err := rlk.ListPorts(context.Background())
			assert.Check(t, err)
			assert.Check(t, is.Len(left, 0))
		}
	})
}

// enterChild has the test go on in the child namespace. Its thread ends with it.
func enterChild(t *testing.T, stateDir string) {
	runtime.LockOSThread()
	ns, err := os.Open(filepath.Join(stateDir, "netns"))
	assert.NilError(t, err)
	defer ns.Close()
	assert.NilError(t, unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET))
}

// ownHost is the host of a driver that refuses only what it has itself.
type ownHost struct {
	contractHost
	rlk *portdriver.RootlessKit
}

func (o ownHost) hold(t *testing.T, port int) func() {
	host := contractAddrs[0]
	remove, err := o.rlk.AddPort(context.Background(), "udp", host, o.rlk.ChildHostIP("udp", host), port)
	assert.NilError(t, err)
	return func() { assert.NilError(t, remove()) }
}

// behind is RootlessKit behind a proxy.
type behind struct{ *faultproxy.Proxy }

func (b behind) late(d time.Duration) {
	b.Inject(func(c faultproxy.Call) (f faultproxy.Fault) {
		if c.Op == faultproxy.AddPort {
			f.Delay = d
		}
		return f
	})
}

func (b behind) calls() int { return len(b.Calls()) }
