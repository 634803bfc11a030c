// Package hostload occupies host ports from a process of its own, the way other people's
// programs do: dockerd and RootlessKit must find out by asking.
//
// The process is this program again: a program that imports the package becomes the load
// when it is started under the load's name, before its own main runs.
package hostload

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// processName, as argument 0, makes a process the load.
const processName = "berth-hostload"

func init() {
	if os.Args[0] != processName {
		return
	}
	signal.Ignore(os.Interrupt) // a Ctrl-C is for whoever has started the load
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, processName+":", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Load says which ports to hold.
type Load struct {
	Network string // "tcp4", "tcp6", "udp4" or "udp6"
	Address string // the host address; "" is all of them
	Ports   []int  // the ports, or those to choose from

	// Hold is how many of Ports are held; 0 is all of them. Those that someone else has
	// are passed over, unless all must be held.
	Hold int
	// Connect, unless 0, is how many connections to itself the load has open, instead: the kernel chooses their ports.
	Connect int
	// Churn, unless 0, is how often a held port is released and another one taken, in the mean: what is due in 100 ms is done at once.
	Churn time.Duration
	// Seed makes the choices. The same seed makes the same load, as far as others let it.
	Seed uint64
}

// Report says what a load has done.
type Report struct {
	Held    []int // the ports held at the start
	Churned int   // ports released, and others taken
	Refused int   // ports that were to be taken and that someone else had
}

// All is all of them.
const All = -1

// DynamicPorts returns the first n ports of the dynamic range of the calling thread's network namespace, or [All].
func DynamicPorts(n int) ([]int, error) {
	const file = "/proc/sys/net/ipv4/ip_local_port_range"
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var first, last int
	if _, err := fmt.Sscan(string(data), &first, &last); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if n == All {
		n = last - first + 1
	}
	if last-first+1 < n {
		return nil, fmt.Errorf("%s: %d ports, want %d", file, last-first+1, n)
	}
	return Range(first, first+n-1), nil
}

// Range returns the ports from first to last.
func Range(first, last int) []int {
	var ports []int
	for p := first; p <= last; p++ {
		ports = append(ports, p)
	}
	return ports
}

// Process is a running load.
type Process struct {
	Ports []int // held at the start

	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *json.Decoder
	stderr *strings.Builder
}

// Start starts a load in a process of its own, and returns when that holds its ports. It
// ends with this process, however that ends, or with [Process.Stop].
func Start(l Load) (*Process, error) {
	// The load lives as long as its standard input is open, and nobody but us has the other
	// end. (A parent-death signal would come when the thread that started it ends.)
	p := &Process{stderr: new(strings.Builder)}
	p.cmd = &exec.Cmd{Path: "/proc/self/exe", Args: []string{processName}, Stderr: p.stderr}
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.stdout = json.NewDecoder(stdout)
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the host load: %w", err)
	}
	var ready Report
	if err := json.NewEncoder(p.stdin).Encode(l); err != nil {
		return nil, p.failed(err)
	}
	if err := p.stdout.Decode(&ready); err != nil {
		return nil, p.failed(err)
	}
	p.Ports = ready.Held
	return p, nil
}

// Stop ends the load; its ports are free when Stop returns.
func (p *Process) Stop() (Report, error) {
	var r Report
	if err := p.stdin.Close(); err != nil {
		return r, p.failed(err)
	}
	if err := p.stdout.Decode(&r); err != nil {
		return r, p.failed(err)
	}
	return r, p.cmd.Wait()
}

// Kill ends the load in the way that a crash does: the kernel frees its ports.
func (p *Process) Kill() error {
	if err := p.cmd.Process.Kill(); err != nil {
		return err
	}
	p.stdin.Close()
	if err := p.cmd.Wait(); p.cmd.ProcessState == nil {
		return err
	}
	return nil // it did not end well, as it should
}

func (p *Process) failed(err error) error {
	p.stdin.Close()
	if waitErr := p.cmd.Wait(); waitErr != nil {
		err = waitErr
	}
	return fmt.Errorf("host load: %w: %s", err, strings.TrimSpace(p.stderr.String()))
}

// run is the load itself: it reads a Load, writes a Report when it holds the ports, and
// another one when its input ends.
func run(in *os.File, out io.Writer) error {
	input := bufio.NewReader(in)
	line, err := input.ReadBytes('\n')
	if err != nil {
		return err
	}
	var l Load
	if err := json.Unmarshal(line, &l); err != nil {
		return err
	}
	h := holder{load: l, random: rand.New(rand.NewPCG(l.Seed, 0))}
	take := h.takeAll
	if l.Connect > 0 {
		take = h.connect
	}
	if err := take(); err != nil {
		return err
	}
	report := json.NewEncoder(out)
	if err := report.Encode(h.report); err != nil {
		return err
	}
	// A goroutine that waits would hand over to this one each time: init has a thread of its own.
	for next := time.Now().Add(l.Churn); ; {
		var wait *unix.Timespec // without end
		if l.Churn > 0 {
			wait = new(unix.NsecToTimespec(max(l.Churn, together).Nanoseconds()))
		}
		n, err := unix.Ppoll([]unix.PollFd{{Fd: int32(in.Fd())}}, wait, nil)
		switch {
		case n > 0:
			return report.Encode(h.report)
		case err != nil && err != unix.EINTR:
			return err
		}
		for now := time.Now(); l.Churn > 0 && next.Before(now); next = next.Add(l.Churn) {
			if err := h.churn(); err != nil {
				return err
			}
		}
	}
}

// together is how long it waits to do what is due by then. To wake up costs several times what there is to do then, and so
// does each of the kernel's RCU grace periods, which last some 7 ms: containers that start meanwhile pay for both.
const together = 100 * time.Millisecond

type holder struct {
	load   Load
	random *rand.Rand
	held   []held
	free   []int
	report Report
}

type held struct {
	port   int
	socket io.Closer
}

// movable is a listening socket that changes its port. Who closes one each millisecond keeps the kernel in one RCU grace period
// after the other, which containers wait for when they start: that would be the load's work, not its ports'.
type movable struct {
	net.Listener
	raw syscall.RawConn
}

// listenMovable listens on the port without binding to it: what is bound to a port has it until it is closed.
func listenMovable(network, address string, port int) (io.Closer, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return control(c, func(fd int) error {
			return errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1), only(fd, port))
		})
	}}
	config.SetMultipathTCP(false)
	l, err := config.Listen(context.Background(), network, net.JoinHostPort(address, "0"))
	if err != nil {
		return nil, err
	}
	raw, err := l.(*net.TCPListener).SyscallConn()
	return movable{l, raw}, err
}

// release has the port free, and take listens on another one.
func (m movable) release() error {
	return control(m.raw, func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) })
}

func (m movable) take(port int) (io.Closer, error) {
	return m, control(m.raw, func(fd int) error {
		if err := only(fd, port); err != nil {
			return err
		}
		return unix.Listen(fd, unix.SOMAXCONN)
	})
}

// only has the kernel choose the port, of one. Linux can since 6.3.
func only(fd, port int) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, port|port<<16)
}

func control(c syscall.RawConn, f func(fd int) error) (err error) {
	if broken := c.Control(func(fd uintptr) { err = f(int(fd)) }); broken != nil {
		return broken
	}
	return err
}

// takeAll takes the first ports.
func (h *holder) takeAll() error {
	l := h.load
	want := l.Hold
	if want == 0 {
		want = len(l.Ports)
	}
	h.free = make([]int, len(l.Ports))
	for i, j := range h.random.Perm(len(l.Ports)) {
		h.free[i] = l.Ports[j]
	}
	var taken []int // by others
	var lastErr error
	for len(h.held) < want && len(h.free) > 0 {
		port := h.free[0]
		h.free = h.free[1:]
		socket, err := h.listen(port)
		if err != nil {
			taken = append(taken, port)
			lastErr = err
			continue
		}
		h.held = append(h.held, held{port, socket})
		h.report.Held = append(h.report.Held, port)
	}
	h.report.Refused = len(taken)
	h.free = append(h.free, taken...)
	if len(h.held) < want {
		if lastErr == nil {
			lastErr = errors.New("there are no more to choose from")
		}
		return fmt.Errorf("%d of %d ports held: %w", len(h.held), want, lastErr)
	}
	return nil
}

// connect opens the connections, one by one.
func (h *holder) connect() error {
	server, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	for range h.load.Connect {
		out, err := net.Dial("tcp4", server.Addr().String())
		if err != nil {
			return err
		}
		in, err := server.Accept()
		if err != nil {
			return err
		}
		port := out.LocalAddr().(*net.TCPAddr).Port
		h.held = append(h.held, held{port, out}, held{port, in})
		h.report.Held = append(h.report.Held, port)
	}
	return nil
}

// churn releases a port and takes another one.
func (h *holder) churn() error {
	if len(h.free) == 0 {
		return nil
	}
	i := h.random.IntN(len(h.held))
	old := h.held[i]
	release, take := old.socket.Close, h.listen
	if m, ok := old.socket.(movable); ok {
		release, take = m.release, m.take
	}
	if err := release(); err != nil {
		return err
	}
	for range h.free {
		j := h.random.IntN(len(h.free))
		socket, err := take(h.free[j])
		if err != nil {
			h.report.Refused++
			continue
		}
		h.held[i] = held{h.free[j], socket}
		h.free[j] = old.port
		h.report.Churned++
		return nil
	}
	// Everything else is taken: hold one less.
	old.socket.Close()
	h.held = append(h.held[:i], h.held[i+1:]...)
	h.free = append(h.free, old.port)
	return nil
}

// listen takes the port, so that the socket can go on to another one if there is churn and the kernel has a way.
func (h *holder) listen(port int) (io.Closer, error) {
	l := h.load
	if l.Churn > 0 && strings.HasPrefix(l.Network, "tcp") {
		if socket, err := listenMovable(l.Network, l.Address, port); !errors.Is(err, unix.ENOPROTOOPT) {
			return socket, err
		}
	}
	return listen(l.Network, l.Address, port)
}

func listen(network, address string, port int) (io.Closer, error) {
	a := net.JoinHostPort(address, strconv.Itoa(port))
	if strings.HasPrefix(network, "udp") {
		return net.ListenPacket(network, a)
	}
	return net.Listen(network, a)
}
