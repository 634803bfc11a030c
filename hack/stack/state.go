package stack

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/moby/moby/client"
)

// state is what a stack's directory tells of it.
type state struct {
	ID      string // in the mark of its processes
	Options Options
	Dockerd string // SHA-256 of the program
}

func (s *Stack) stateFile() string { return filepath.Join(s.Dir, "state.json") }

// load returns no state, and no error, where there is no stack.
func (s *Stack) load() (*state, error) {
	data, err := os.ReadFile(s.stateFile())
	if errors.Is(err, os.ErrNotExist) {
		if s.Exists() {
			return nil, fmt.Errorf("%s is no stack's: there is no %s in it; move it away", s.Dir, filepath.Base(s.stateFile()))
		}
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var st state
	if err := json.Unmarshal(data, &st); err != nil || st.ID == "" {
		return nil, fmt.Errorf("%s: not a stack's: %w", s.stateFile(), errors.Join(err, errors.New("no id")))
	}
	return &st, nil
}

func (s *Stack) save(st *state) error { return writeJSON(s.stateFile(), st) }

// writeJSON makes the file in one step, for its owner alone.
func writeJSON(file string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	tmp := file + ".tmp"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return os.Rename(tmp, file)
}

func newID() string {
	id := make([]byte, 16)
	rand.Read(id) // never fails
	return hex.EncodeToString(id)
}

// Sum is the SHA-256 of a file.
func Sum(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Status is what there is of a stack.
type Status struct {
	Exists    bool        `json:"exists"` // its files do
	Up        bool        `json:"up"`     // its daemon answers
	User      string      `json:"user"`
	Dir       string      `json:"dir"`
	Options   Options     `json:"options,omitzero"` // of the last start
	Processes []Process   `json:"processes"`
	Dockerd   *Daemon     `json:"dockerd,omitempty"` // if it is up
	Cgroups   string      `json:"cgroups"`
	Mounts    []string    `json:"mounts,omitempty"` // in the stack's directory
	Has       []Container `json:"containers,omitempty"`
}

// Daemon is a dockerd that is up.
type Daemon struct {
	PID     int    `json:"pid"`
	Path    string `json:"path"`
	Version string `json:"version"`
	SHA256  string `json:"sha256"`
	Host    string `json:"host"`
	API     string `json:"rootlesskit"` // socket
	// View tells whether its process is where the host's ports can be seen.
	View bool `json:"view"`
}

// Container is one of a stack's.
type Container struct {
	ID    string   `json:"id"`
	Name  string   `json:"name"`
	State string   `json:"state"`
	Ports []string `json:"ports,omitempty"`
}

// status never fails for what a broken stack does not answer.
func (s *Stack) status(ctx context.Context) (Status, error) {
	status := Status{User: s.User(), Dir: s.Dir, Exists: s.Exists()}
	_, status.Cgroups = s.cgroups("/")
	st, err := s.load()
	if err != nil || st == nil {
		return status, err
	}
	status.Options = st.Options
	status.Options.Env = nil // a proxy's password may be in it
	if status.Mounts, err = s.mounts(); err != nil {
		return status, err
	}
	if status.Processes, err = s.processes(st.ID); err != nil {
		return status, err
	}
	if status.Up = s.Running(ctx); !status.Up {
		return status, nil
	}
	d := &Daemon{Path: filepath.Join(s.bin, "dockerd"), SHA256: st.Dockerd, Host: s.Host(), API: s.RootlessKitSocket()}
	status.Dockerd = d
	// RootlessKit's process on the host is what the host's namespace is known by: ours may be another.
	dockerd, _ := oldest(status.Processes, "dockerd")
	parent, _ := oldest(status.Processes, "docker-rootlesskit")
	d.PID = dockerd.PID
	its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", dockerd.PID))
	host, hostErr := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", parent.PID))
	d.View = err == nil && hostErr == nil && its == host
	c, err := s.Client()
	if err != nil {
		return status, nil
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if v, err := c.ServerVersion(ctx, client.ServerVersionOptions{}); err == nil {
		d.Version = v.Version
	}
	list, err := c.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return status, nil
	}
	for _, item := range list.Items {
		has := Container{ID: item.ID, State: string(item.State)}
		if len(item.Names) > 0 {
			has.Name = item.Names[0][1:]
		}
		for _, p := range item.Ports {
			if p.PublicPort != 0 {
				has.Ports = append(has.Ports, fmt.Sprintf("%v:%d->%d/%s", p.IP, p.PublicPort, p.PrivatePort, p.Type))
			}
		}
		status.Has = append(status.Has, has)
	}
	return status, nil
}
