//go:build integration

// Package bench measures Berth's port mapper against stock's and against the
// bare system calls and requests that it is made of. What it prints is for
// benchstat, and for the program in the report folder, which knows the limits.
//
// One operation is a MapPorts and the UnmapPorts that undoes it, where nothing
// else is said.
package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"berth/daemon/libnetwork/portmappers/nat"
	"berth/hack/checkout"
	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/portdriver"
	"berth/integration/stacktest"

	"github.com/moby/moby/v2/daemon/libnetwork/portallocator"
	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	stock "github.com/moby/moby/v2/daemon/libnetwork/portmappers/nat"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
)

// Where the child and the host are one namespace, they do not meet: each has a
// loopback address of its own.
var (
	childIP  = netip.MustParseAddr("127.81.0.1")
	hostIP   = netip.MustParseAddr("127.81.0.2")
	anyAddrs = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
)

// manyTaken is as many host ports as one process can hold here (20,000 descriptors).
const manyTaken = 17000

// willing is a port driver that refuses nothing, and takes no time for it.
type willing struct{}

func (willing) ChildHostIP(_ string, hostIP netip.Addr) netip.Addr {
	if hostIP.Is6() {
		return netip.IPv6Loopback()
	}
	return childIP
}

func (willing) AddPort(context.Context, string, netip.Addr, netip.Addr, int) (func() error, error) {
	return func() error { return nil }, nil
}

// rootlessKit is dockerd's client, with child addresses that don't meet the host's.
type rootlessKit struct{ *portdriver.RootlessKit }

func (rootlessKit) ChildHostIP(proto string, hostIP netip.Addr) netip.Addr {
	return willing{}.ChildHostIP(proto, hostIP)
}

// startRootlessKit starts a stack for the benchmark and returns a client of its
// RootlessKit, whose port driver is builtin.
func startRootlessKit(b *testing.B) rootlessKit {
	if os.Getenv(withoutStack) != "" {
		b.Skip("a stack needs root here")
	}
	root, err := checkout.Root()
	assert.NilError(b, err)
	s := stacktest.At(b)
	logFile := checkout.Log(root, "bench.log")
	assert.NilError(b, s.Up(b.Context(), stack.Options{Bin: checkout.Bin(root), Log: logFile}))
	rlk, err := portdriver.Dial(b.Context(), s.RootlessKitSocket())
	assert.NilError(b, err)
	return rootlessKit{rlk}
}

// hold makes another process hold TCP ports of the host until the end of b.
func hold(b *testing.B, addr netip.Addr, ports []int) {
	if len(ports) > 0 {
		stacktest.Hold(b, hostload.Load{Network: "tcp4", Address: addr.String(), Ports: ports})
	}
}

// request asks for a host port from first to last, or for any if both are 0.
func request(first, last int, hostIPs ...netip.Addr) []portmapperapi.PortBindingReq {
	var reqs []portmapperapi.PortBindingReq
	for _, ip := range hostIPs {
		reqs = append(reqs, portmapperapi.PortBindingReq{PortBinding: types.PortBinding{
			Proto: types.TCP, Port: 80, HostIP: ip.AsSlice(), HostPort: uint16(first), HostPortEnd: uint16(last),
		}})
	}
	return reqs
}

// mapAndUnmap is what is measured, where nothing else is said. It returns the port that was published.
func mapAndUnmap(b *testing.B, pm portmapperapi.PortMapper, reqs []portmapperapi.PortBindingReq) int {
	pbs, err := pm.MapPorts(context.Background(), reqs)
	if err != nil {
		b.Fatal(err)
	}
	if err := pm.UnmapPorts(context.Background(), pbs); err != nil {
		b.Fatal(err)
	}
	return int(pbs[0].HostPort)
}

func stockMapper(c stock.PortDriverClient) portmapperapi.PortMapper {
	return stock.NewPortMapper(stock.Config{RlkClient: c})
}

func berthMapper(c nat.PortDriverClient) portmapperapi.PortMapper {
	return nat.NewPortMapper(nat.Config{RlkClient: c})
}

// BenchmarkListen is the look at a host port that RootlessKit takes: a socket
// of its own for each port.
func BenchmarkListen(b *testing.B) {
	addr := unix.SockaddrInet4{Addr: hostIP.As4(), Port: 20000}
	for b.Loop() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = errors.Join(
				unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
				unix.Bind(fd, &addr),
				unix.Listen(fd, 1),
				unix.Close(fd))
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFake publishes a dynamic port that is free at once, through a port
// driver that costs nothing.
func BenchmarkFake(b *testing.B) {
	for n := range anyAddrs {
		b.Run(fmt.Sprintf("addresses=%d", n+1), func(b *testing.B) {
			benchmarkNoRefusal(b, stockMapper(willing{}), berthMapper(willing{}), anyAddrs[:n+1], false)
		})
	}
}

// benchmarkNoRefusal publishes with stock, with Berth and, if asked for, with
// Berth that sees the host, in turn, so that each meets the same machine. What
// is measured is the median of MapPorts, that of UnmapPorts, and how many
// objects MapPorts allocates.
func benchmarkNoRefusal(b *testing.B, stock, berth portmapperapi.PortMapper, hostIPs []netip.Addr, withView bool) {
	publishers := []*publisher{{name: "stock", mapper: stock}, {name: "berth", mapper: berth}}
	if withView {
		inChildWithView(b)
		publishers = append(publishers, &publisher{name: "view", mapper: berth, stateDir: os.Getenv(stateDir)})
	}
	for turn := 0; b.Loop(); turn++ {
		for i := range publishers {
			publishers[(turn+i)%len(publishers)].publish(b, hostIPs)
		}
	}
	for _, p := range publishers {
		b.ReportMetric(median(p.publishes), "ns/"+p.name)
		b.ReportMetric(median(p.removals), "ns/"+p.name+"-removal")
		b.ReportMetric(p.objects(b, hostIPs), "objects/"+p.name)
	}
}

type publisher struct {
	name     string
	mapper   portmapperapi.PortMapper
	stateDir string // stateDir is RootlessKit's, for a view of the host.

	publishes, removals []time.Duration
}

func median(list []time.Duration) float64 {
	slices.Sort(list)
	return float64(list[len(list)/2].Nanoseconds())
}

func (p *publisher) publish(b *testing.B, hostIPs []netip.Addr) {
	assert.NilError(b, os.Setenv(stateDir, p.stateDir))
	reqs := request(0, 0, hostIPs...)
	start := time.Now()
	pbs, err := p.mapper.MapPorts(context.Background(), reqs)
	p.publishes = append(p.publishes, time.Since(start))
	assert.NilError(b, err)
	start = time.Now()
	err = p.mapper.UnmapPorts(context.Background(), pbs)
	p.removals = append(p.removals, time.Since(start))
	assert.NilError(b, err)
}

// objects returns how many a publish allocates, on average, as
// testing.AllocsPerRun does.
func (p *publisher) objects(b *testing.B, hostIPs []netip.Addr) float64 {
	const times = 100
	assert.NilError(b, os.Setenv(stateDir, p.stateDir))
	reqs := request(0, 0, hostIPs...)
	var before, after runtime.MemStats
	var sum uint64
	for range times {
		runtime.ReadMemStats(&before)
		pbs, err := p.mapper.MapPorts(context.Background(), reqs)
		runtime.ReadMemStats(&after)
		assert.NilError(b, err)
		assert.NilError(b, p.mapper.UnmapPorts(context.Background(), pbs))
		sum += after.Mallocs - before.Mallocs
	}
	return float64(sum / times)
}

// BenchmarkChild does the same in dockerd's place: on a thread in the child
// namespace, from where Berth may see the host. There, it passes taken ports.
func BenchmarkChild(b *testing.B) {
	for n := range anyAddrs {
		hostIPs := anyAddrs[:n+1]
		b.Run(fmt.Sprintf("addresses=%d", n+1), func(b *testing.B) {
			benchmarkNoRefusal(b, stockMapper(willing{}), berthMapper(willing{}), hostIPs, true)
		})
		b.Run(fmt.Sprintf("addresses=%d/mapper=berth+view/taken=0", n+1), func(b *testing.B) {
			inChildWithView(b)
			for b.Loop() {
				mapAndUnmap(b, berthMapper(willing{}), request(0, 0, hostIPs...))
			}
		})
	}
	dynamic, err := hostload.DynamicPorts(manyTaken)
	assert.NilError(b, err)
	hold(b, anyAddrs[0], dynamic)
	first, free := dynamic[0], dynamic[0]+manyTaken
	for n := range anyAddrs {
		reqs := request(0, 0, anyAddrs[:n+1]...)
		name := fmt.Sprintf("addresses=%d/mapper=berth+view/taken=%d", len(reqs), manyTaken)
		b.Run(name+"/passed=all", func(b *testing.B) {
			inChildWithView(b)
			setHostRange(b, first, free) // The search ends at its end, and starts there again.
			for b.Loop() {
				assert.Equal(b, mapAndUnmap(b, berthMapper(willing{}), reqs), free)
			}
		})
		b.Run(name+"/passed=none", func(b *testing.B) {
			const last = 65535
			inChildWithView(b)
			for port := last; b.Loop(); port = mapAndUnmap(b, berthMapper(willing{}), reqs) {
				if port == last {
					b.StopTimer()
					setHostRange(b, first, free)
					mapAndUnmap(b, berthMapper(willing{}), reqs)
					setHostRange(b, first, last)
					b.StartTimer()
				}
			}
		})
	}
}

// BenchmarkRootlessKit measures against a real RootlessKit.
func BenchmarkRootlessKit(b *testing.B) {
	driver := startRootlessKit(b)
	b.Run("NoRefusal", func(b *testing.B) {
		for n := range anyAddrs {
			b.Run(fmt.Sprintf("addresses=%d", n+1), func(b *testing.B) {
				benchmarkNoRefusal(b, stockMapper(driver), berthMapper(driver), anyAddrs[:n+1], true)
			})
		}
	})
	b.Run("Refusal", func(b *testing.B) { benchmarkRefusal(b, driver) })
	b.Run("Search", func(b *testing.B) { benchmarkSearch(b, driver) })
}

// benchmarkRefusal is the cost of a refused port: of the bare request, and of
// all that a search does about it. The search passes 500 held ports; what it
// costs to publish the free one at last is in the figure.
func benchmarkRefusal(b *testing.B, driver rootlessKit) {
	const first, held = 20000, 500
	var ports []int
	for i := range held {
		ports = append(ports, first+i)
	}
	hold(b, hostIP, ports)
	b.Run("bare", func(b *testing.B) {
		for b.Loop() {
			if _, err := driver.AddPort(context.Background(), "tcp", hostIP, childIP, first); err == nil {
				b.Fatal("a held port was published")
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N), "ns/refusal")
	})
	b.Run("search", func(b *testing.B) {
		for b.Loop() {
			mapAndUnmap(b, berthMapper(driver), request(first, first+held, hostIP))
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*held), "ns/refusal")
	})
}

// benchmarkSearch publishes a dynamic port when the first ones of the host's
// dynamic range are taken, as if no port had been published before.
func benchmarkSearch(b *testing.B, driver rootlessKit) {
	for _, taken := range []int{0, 10, 100, 1000, 10000, manyTaken} {
		b.Run(fmt.Sprintf("taken=%d", taken), func(b *testing.B) {
			dynamic, err := hostload.DynamicPorts(manyTaken)
			assert.NilError(b, err)
			hold(b, hostIP, dynamic[:taken])
			search := func(name string, setUp func(*testing.B), publish func(*testing.B)) {
				b.Run("mapper="+name, func(b *testing.B) {
					setUp(b)
					for b.Loop() {
						b.StopTimer()
						portallocator.Get().ReleaseAll()
						b.StartTimer()
						publish(b)
					}
				})
			}
			noSetUp := func(*testing.B) {}
			if taken == 0 {
				search("stock", noSetUp, func(b *testing.B) { mapAndUnmap(b, stockMapper(driver), request(0, 0, hostIP)) })
			} else {
				search("stock-fails", noSetUp, func(b *testing.B) {
					if _, err := stockMapper(driver).MapPorts(context.Background(), request(0, 0, hostIP)); err == nil {
						b.Fatal("stock passed a taken port")
					}
				})
			}
			publish := func(b *testing.B) { mapAndUnmap(b, berthMapper(driver), request(0, 0, hostIP)) }
			search("berth", noSetUp, publish)
			search("berth+view", func(b *testing.B) {
				inChildWithView(b)
				setHostRange(b, dynamic[0], dynamic[0]+taken) // As in BenchmarkChild.
			}, publish)
		})
	}
}
