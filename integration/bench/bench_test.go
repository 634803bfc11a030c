//go:build integration

package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
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

// driver is a port driver that takes no time, and refuses what is taken on the
// host, as RootlessKit would.
type driver struct{ taken []int } // taken is in ascending order.

func (driver) ChildHostIP(_ string, hostIP netip.Addr) netip.Addr {
	if hostIP.Is6() {
		return netip.IPv6Loopback()
	}
	return childIP
}

func (d driver) AddPort(_ context.Context, _ string, hostIP, _ netip.Addr, hostPort int) (func() error, error) {
	if _, taken := slices.BinarySearch(d.taken, hostPort); taken {
		return nil, fmt.Errorf("listen tcp4 %s: bind: address already in use", netip.AddrPortFrom(hostIP, uint16(hostPort)))
	}
	return func() error { return nil }, nil
}

// rootlessKit is dockerd's client, with child addresses that don't meet the host's.
type rootlessKit struct{ *portdriver.RootlessKit }

func (rootlessKit) ChildHostIP(proto string, hostIP netip.Addr) netip.Addr {
	return driver{}.ChildHostIP(proto, hostIP)
}

// startRootlessKit starts a stack for the benchmark and returns a client of its
// RootlessKit, whose port driver is builtin.
func startRootlessKit(b *testing.B) rootlessKit {
	if os.Getenv(inUserNamespace) != "" {
		b.Skip("a stack needs root here")
	}
	root, err := checkout.Root()
	assert.NilError(b, err)
	s := stacktest.At(b)
	logFile := checkout.Log(root, "bench.log")
	assert.NilError(b, s.Up(b.Context(), stack.Options{Bin: checkout.Bin(root), Log: logFile}))
	rlk, err := portdriver.Dial(b.Context(), "3", s.RootlessKitSocket())
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

// run runs a benchmark below b by its full name.
func run(b *testing.B, name Name, f func(*testing.B)) {
	below, ok := strings.CutPrefix("Benchmark"+string(name), b.Name()+"/")
	assert.Assert(b, ok, "%s is not below %s", name, b.Name())
	b.Run(below, f)
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

// BenchmarkRootful publishes a dynamic port where there is no port driver.
func BenchmarkRootful(b *testing.B) {
	for _, n := range Addresses {
		run(b, Rootful(n), func(b *testing.B) {
			benchmarkNoRefusal(b, []*publisher{{name: "stock", mapper: stockMapper(nil)}, {name: "berth", mapper: berthMapper(nil)}}, anyAddrs[:n])
		})
	}
}

// BenchmarkChild publishes one in dockerd's place: on a thread that is locked in
// the child namespace, from where Berth may see the host.
func BenchmarkChild(b *testing.B) {
	for _, n := range Addresses {
		run(b, Child(n), func(b *testing.B) {
			benchmarkNoRefusal(b, withView(b, stockMapper(driver{}), driver{}), anyAddrs[:n])
		})
	}
}

// withView has stock, Berth and, in the child, Berth that sees the host.
func withView(b *testing.B, stock portmapperapi.PortMapper, c nat.PortDriverClient) []*publisher {
	berth := berthMapper(c)
	inChildWithView(b)
	return []*publisher{{name: "stock", mapper: stock}, {name: "berth", mapper: berth}, {name: "view", mapper: berthMapper(c)}}
}

// benchmarkNoRefusal has publishers publish in turn, so that each meets the same
// machine. What is measured is the median of MapPorts, that of UnmapPorts, and
// how many objects MapPorts allocates.
func benchmarkNoRefusal(b *testing.B, publishers []*publisher, hostIPs []netip.Addr) {
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
	name   string
	mapper portmapperapi.PortMapper

	publishes, removals []time.Duration
}

func median(list []time.Duration) float64 {
	slices.Sort(list)
	return float64(list[len(list)/2].Nanoseconds())
}

func (p *publisher) publish(b *testing.B, hostIPs []netip.Addr) {
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

// BenchmarkView has ports taken that Berth sees from there.
func BenchmarkView(b *testing.B) {
	for _, n := range Addresses {
		run(b, Free(n), func(b *testing.B) {
			inChildWithView(b)
			pm, reqs := berthMapper(driver{}), request(0, 0, anyAddrs[:n]...)
			for b.Loop() {
				mapAndUnmap(b, pm, reqs)
			}
		})
	}
	dynamic, err := hostload.DynamicPorts(ManyTaken)
	assert.NilError(b, err)
	hold(b, anyAddrs[0], dynamic)
	host, first, free := driver{dynamic}, dynamic[0], dynamic[0]+ManyTaken
	run(b, Passed(1), func(b *testing.B) {
		inChildWithView(b)
		// Of a user's own range, none is left out, and the first is asked for without a look.
		pm, reqs := berthMapper(host), request(first, free, anyAddrs[0])
		for b.Loop() {
			assert.Equal(b, mapAndUnmap(b, pm, reqs), free)
		}
	})
	for _, n := range Addresses {
		reqs := request(0, 0, anyAddrs[:n]...)
		run(b, Jumped(n), func(b *testing.B) {
			inChildWithView(b)
			for b.Loop() {
				mapAndUnmap(b, berthMapper(host), reqs)
			}
		})
		run(b, Next(n), func(b *testing.B) {
			const last = 65535
			inChildWithView(b)
			setHostRange(b, first, last)
			var pm portmapperapi.PortMapper
			for port := last; b.Loop(); port = mapAndUnmap(b, pm, reqs) {
				if port == last {
					b.StopTimer()
					pm = berthMapper(host)
					mapAndUnmap(b, pm, reqs)
					b.StartTimer()
				}
			}
		})
	}
}

// BenchmarkRootlessKit measures against a real RootlessKit.
func BenchmarkRootlessKit(b *testing.B) {
	rlk := startRootlessKit(b)
	for _, n := range Addresses {
		run(b, NoRefusal(n), func(b *testing.B) {
			benchmarkNoRefusal(b, withView(b, stockMapper(rlk), rlk), anyAddrs[:n])
		})
	}
	run(b, Refusal, func(b *testing.B) { benchmarkRefusal(b, rlk) })
	b.Run("Search", func(b *testing.B) { benchmarkSearch(b, rlk) })
}

// benchmarkRefusal is the cost of a refused port in dockerd's place: of the bare
// request, as stock makes it there, and of all that a search does about it, in
// turn. The search passes 100 held ports; what it costs to publish the free one at
// last is in the figure.
func benchmarkRefusal(b *testing.B, rlk rootlessKit) {
	const first, held = 20000, 100
	var ports []int
	for i := range held {
		ports = append(ports, first+i)
	}
	hold(b, hostIP, ports)
	inChild(b)
	var bare, search []time.Duration
	for b.Loop() {
		start := time.Now()
		for range held {
			if _, err := rlk.AddPort(context.Background(), "tcp", hostIP, childIP, first); err == nil {
				b.Fatal("a held port was published")
			}
		}
		bare = append(bare, time.Since(start)/held)
		start = time.Now()
		mapAndUnmap(b, berthMapper(rlk), request(first, first+held, hostIP))
		search = append(search, time.Since(start)/held)
	}
	b.ReportMetric(median(bare), "ns/bare")
	b.ReportMetric(median(search), "ns/search")
}

// benchmarkSearch publishes a dynamic port when the first ones of the host's
// dynamic range are taken, as if no port had been published before.
func benchmarkSearch(b *testing.B, rlk rootlessKit) {
	for _, taken := range Taken {
		b.Run(fmt.Sprintf("taken=%d", taken), func(b *testing.B) {
			dynamic, err := hostload.DynamicPorts(taken)
			assert.NilError(b, err)
			hold(b, hostIP, dynamic)
			for _, mapper := range Mappers(taken) {
				run(b, Search(taken, mapper), func(b *testing.B) {
					if mapper == BerthView {
						inChildWithView(b)
					}
					for b.Loop() {
						b.StopTimer()
						portallocator.Get().ReleaseAll()
						b.StartTimer()
						reqs := request(0, 0, hostIP)
						switch mapper {
						case Stock:
							mapAndUnmap(b, stockMapper(rlk), reqs)
						case StockFails:
							if _, err := stockMapper(rlk).MapPorts(context.Background(), reqs); err == nil {
								b.Fatal("stock passed a taken port")
							}
						default:
							mapAndUnmap(b, berthMapper(rlk), reqs)
						}
					}
				})
			}
		})
	}
}
