package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/moby/moby/client"
)

// State is what became of Install, and of the Docker that it was for.
type State struct {
	Dockerd string `json:"dockerd,omitempty"` // the patched one that is installed, "" if none is
	Version string `json:"version,omitempty"` // its version
	Unit    bool   `json:"unit"`              // the user's docker.service runs it once restarted
	Half    bool   `json:"half"`              // Install, or Uninstall, was interrupted
	Running string `json:"running,omitempty"` // the version of the user's Docker that is up, "" if none is
}

// Installed looks what is there. The user's Docker is asked at its usual socket, for a second at most.
func Installed(ctx context.Context, o Options) (State, error) {
	r, err := o.load()
	if err != nil {
		return State{}, err
	}
	var s State
	for _, file := range r.Files {
		if filepath.Base(file) == programs[0] && exists(file) {
			s.Dockerd, s.Version = file, filepath.Base(filepath.Dir(file))
		}
	}
	s.Unit = slices.Contains(r.Files, o.dropIn()) && exists(o.dropIn())
	s.Half = exists(o.unsettled())
	s.Running, err = running(ctx)
	return s, err
}

func running(ctx context.Context) (string, error) {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		dir = fmt.Sprint("/run/user/", os.Getuid())
	}
	socket := filepath.Join(dir, "docker.sock")
	if _, err := os.Stat(socket); errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return "", nil
	}
	c, err := client.New(client.WithHost("unix://" + socket))
	if err != nil {
		return "", err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	v, err := c.ServerVersion(ctx, client.ServerVersionOptions{})
	if err != nil { // a socket that was left behind
		return "", nil
	}
	return v.Version, nil
}
