package harness

import (
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"berth/integration/hostload"
)

// most is how many ports one process holds: it may have 20,000 descriptors on some machines.
const most = 15000

// start has other processes do to the host that we are on what the load says, until stop. need is how many ports others will.
func (l Load) start(network string, need int, seed uint64) (held []int, stop func() error, _ error) {
	ports, err := hostload.DynamicPorts(hostload.All)
	if err != nil {
		return nil, nil, err
	}
	hold := l.row
	if l.row == 0 {
		hold = int(l.share * float64(len(ports)))
		random := rand.New(rand.NewPCG(seed, 1))
		random.Shuffle(len(ports), func(i, j int) { ports[i], ports[j] = ports[j], ports[i] })
	}
	if l.spare {
		hold = len(ports) - need
	}
	if !l.churn {
		ports = ports[:hold]
	}
	var parts []hostload.Load
	if l.connect > 0 {
		parts = append(parts, hostload.Load{Connect: l.connect})
	}
	processes := (hold + most - 1) / most
	for n := processes; n > 0; n-- { // of what is left, an n-th
		load := hostload.Load{Network: network, Ports: ports[:len(ports)/n], Hold: hold / n, Seed: seed}
		if l.churn {
			load.Churn = time.Duration(processes) * time.Millisecond
		}
		parts = append(parts, load)
		ports, hold = ports[len(ports)/n:], hold-hold/n
	}
	var running []*hostload.Process
	stop = sync.OnceValue(func() (err error) {
		for _, p := range running {
			_, stopErr := p.Stop()
			err = errors.Join(err, stopErr)
		}
		return err
	})
	for _, part := range parts {
		p, err := startWhenFree(part)
		if err != nil {
			return nil, nil, errors.Join(err, stop())
		}
		running = append(running, p)
		held = append(held, p.Ports...)
	}
	return held, stop, nil
}

// startWhenFree waits for what the turn before has not let go of yet.
func startWhenFree(l hostload.Load) (*hostload.Process, error) {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		p, err := hostload.Start(l)
		if err == nil || !strings.Contains(err.Error(), "address already in use") || time.Now().After(deadline) {
			return p, err
		}
	}
}
