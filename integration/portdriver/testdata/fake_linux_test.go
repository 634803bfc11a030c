package nat

import (
	"encoding/json"
	"net/netip"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"berth/integration/portdriver"

	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"gotest.tools/v3/assert"
)

// TestPortDriverSuite runs the suite against the fake, as each port driver. It
// writes what it saw to the file that the suite's own test names.
func TestPortDriverSuite(t *testing.T) {
	results := map[string][]portdriver.Result{}
	next := 20000
	for driver, be := range map[string]func(f *fakeDriver){
		"builtin":          func(f *fakeDriver) {},
		"slirp4netns":      func(f *fakeDriver) { f.shrugs, f.noIPv6 = true, true },
		"gvisor-tap-vsock": func(f *fakeDriver) { f.bothFamilies, f.noIPv6 = true, true },
		"pesto":            func(f *fakeDriver) { f.believes, f.noIPv6 = true, true },
	} {
		f := newFake(t)
		f.forgets = true
		be(f)
		d := portdriver.Driver{
			Client: f,
			Mapper: func(c portdriver.Client) portmapperapi.PortMapper {
				return NewPortMapper(Config{RlkClient: c})
			},
			Hold: func(network, addr string, first, count int) (func() error, error) {
				set := func(held bool) {
					for p := first; p < first+count; p++ {
						f.others[mapping{network[:3], netip.MustParseAddr(addr), p}] = held
					}
				}
				set(true)
				return func() error { set(false); return nil }, nil
			},
			Ports: func(count int) (int, error) {
				next += count
				return next - count, nil
			},
		}
		// What is waited for takes no time.
		synctest.Test(t, func(t *testing.T) {
			var err error
			results[driver], err = d.Run(t.Context())
			assert.NilError(t, err, driver)
			time.Sleep(time.Minute) // a removal that failed is tried again
		})
	}
	data, err := json.Marshal(results)
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(os.Getenv("BERTH_PORTDRIVER_RESULTS"), data, 0o644))
}
