package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/moby/moby/client"

	"berth/hack/checkout"
	"berth/hack/stack"
	"berth/integration/cage"
	"berth/integration/whoami"
)

// place is where a contender's daemon is started, on the thread of its host.
type place struct {
	context.Context
	Contender
	root string // the checkout
	user string // that root's rootless daemons run as
}

// daemon is a contender's that is up, and has the test image.
type daemon struct {
	*client.Client
	version string
	log     string // file with what it says
	read    int64  // of the log
	down    func() error
}

// start brings up the place's daemon, and imports the test image; nothing stays of one that fails.
func (p place) start() (_ *daemon, retErr error) {
	d, err := p.up(p)
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			d.down()
		}
	}()
	if err := whoami.Import(p, p.root, d.Client); err != nil {
		return nil, err
	}
	v, err := d.ServerVersion(p, client.ServerVersionOptions{})
	d.version = v.Version
	return d, err
}

// binary is the program of the contender.
func (p place) binary() string {
	if filepath.IsAbs(p.program) {
		return p.program
	}
	return checkout.Bin(p.root, p.program)
}

func (p place) logFile() string {
	return checkout.Log(p.root, "stress-"+p.Name+"-"+p.user+".log")
}

// rootless brings up a stack.
func rootless(p place) (*daemon, error) {
	s, err := stack.AtUser("stress-"+p.Name, p.user)
	if err != nil {
		return nil, err
	}
	o := p.options
	o.Checkout, o.Bin, o.Dockerd, o.Log = p.root, checkout.Bin(p.root), p.binary(), p.logFile()
	o.Args = []string{"--log-format", "json"} // see attempts
	purge := func() error {
		_, err := s.Purge(context.WithoutCancel(p), o)
		return err
	}
	// A run that was killed may have left its own.
	if err := purge(); err != nil {
		return nil, err
	}
	if err := s.Up(p, o); err != nil {
		return nil, err
	}
	d := &daemon{log: o.Log}
	if d.Client, err = s.Client(); err != nil {
		purge()
		return nil, err
	}
	d.down = func() error {
		d.Close()
		return purge()
	}
	return d, nil
}

// rootful brings up a dockerd as root.
func rootful(p place) (*daemon, error) {
	c, err := cage.Dockerd(p, p.binary(), p.logFile())
	return caged(c, p, err)
}

// podman brings up the machine's own, with our runc: Debian 12's crun refuses hybrid cgroups.
func podman(p place) (*daemon, error) {
	c, err := cage.Podman(p, p.user, checkout.Bin(p.root, "runc"), p.logFile())
	return caged(c, p, err)
}

func caged(c *cage.Daemon, p place, err error) (*daemon, error) {
	if err != nil {
		return nil, err
	}
	return &daemon{Client: c.API, log: p.logFile(), down: c.Stop}, nil
}

// searched is what Berth says of a port that it did not get at once.
type searched struct {
	Attempts int           `json:"attempts"`
	Duration time.Duration `json:"duration"`
	Port     int           `json:"port"`
	Proto    string        `json:"proto"`
}

// tell has the starts of a turn know what they took, by what the daemons have said since the last one. Of a host port that it
// got at once a daemon says nothing.
func tell(daemons []*daemon, starts []Start) error {
	found := map[string]searched{}
	for _, d := range daemons {
		if err := d.searches(found); err != nil {
			return err
		}
	}
	for i := range starts {
		for _, port := range starts[i].ports {
			starts[i].Attempts += max(1, found[port].Attempts)
			starts[i].SearchMS += ms(found[port].Duration)
		}
	}
	return nil
}

// searches adds what the daemon has said since the last call, by host port, such as "32768/tcp".
func (d *daemon) searches(found map[string]searched) error {
	f, err := os.Open(d.log)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.NewSectionReader(f, d.read, 1<<40))
	data = data[:bytes.LastIndexByte(data, '\n')+1]
	d.read += int64(len(data))
	for line := range bytes.Lines(data) {
		// Others write there, too, and other lines have fields of these names that are something else.
		var s searched
		if json.Unmarshal(line, &s) == nil && s.Attempts > 0 {
			found[fmt.Sprint(s.Port, "/", s.Proto)] = s
		}
	}
	return err
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
