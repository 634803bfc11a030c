// Package engine speaks to a daemon's API for tests that measure it: a docker CLI would be a
// process, and most of the time, of its own.
package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"berth/integration/image"
)

// Client speaks to one daemon. Its methods can be called side by side.
type Client struct {
	http *http.Client
}

// New returns a client of the daemon at host, a DOCKER_HOST that begins with unix://.
func New(host string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", strings.TrimPrefix(host, "unix://"))
	}
	return &Client{http: &http.Client{Transport: &http.Transport{DialContext: dial, MaxIdleConnsPerHost: 32}}}
}

// Close closes the connections that are kept for the next call.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Port is one published container port.
type Port struct {
	Container string // such as "80/tcp"
	HostIP    string // "" is all addresses
	Host      string // a port or a range; "" is any
}

// Create makes a container of the test image with the ports published, and returns its id.
func (c *Client) Create(ctx context.Context, ports ...Port) (id string, _ error) {
	type binding struct{ HostIp, HostPort string }
	bindings := map[string][]binding{}
	for _, p := range ports {
		bindings[p.Container] = append(bindings[p.Container], binding{p.HostIP, p.Host})
	}
	var made struct{ Id string }
	err := c.call(ctx, http.MethodPost, "/containers/create", map[string]any{
		"Image":      image.Name,
		"HostConfig": map[string]any{"PortBindings": bindings},
	}, &made)
	return made.Id, err
}

// Start starts the container.
func (c *Client) Start(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodPost, "/containers/"+id+"/start", nil, nil)
}

// Stop asks the container to end, and kills it when it has not by the end of grace, which is
// in whole seconds.
func (c *Client) Stop(ctx context.Context, id string, grace time.Duration) error {
	return c.call(ctx, http.MethodPost, fmt.Sprintf("/containers/%s/stop?t=%.0f", id, grace.Seconds()), nil, nil)
}

// Remove removes the container, running or not.
func (c *Client) Remove(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, "/containers/"+id+"?force=1", nil, nil)
}

// Containers returns the ids of all containers, running or not.
func (c *Client) Containers(ctx context.Context) ([]string, error) {
	var list []struct{ Id string }
	err := c.call(ctx, http.MethodGet, "/containers/json?all=1", nil, &list)
	var ids []string
	for _, l := range list {
		ids = append(ids, l.Id)
	}
	return ids, err
}

// Published returns the host addresses of the running container's ports, by container port.
func (c *Client) Published(ctx context.Context, id string) (map[string][]netip.AddrPort, error) {
	var state struct {
		NetworkSettings struct {
			Ports map[string][]struct{ HostIp, HostPort string }
		}
	}
	if err := c.call(ctx, http.MethodGet, "/containers/"+id+"/json", nil, &state); err != nil {
		return nil, err
	}
	published := map[string][]netip.AddrPort{}
	for port, bindings := range state.NetworkSettings.Ports {
		for _, b := range bindings {
			at, err := netip.ParseAddrPort(net.JoinHostPort(b.HostIp, b.HostPort))
			if err != nil {
				return nil, fmt.Errorf("container %.12s, port %s: %w", id, port, err)
			}
			published[port] = append(published[port], at)
		}
	}
	return published, nil
}

// Goroutines returns how many goroutines the daemon has.
func (c *Client) Goroutines(ctx context.Context) (int, error) {
	var info struct{ NGoroutines int }
	err := c.call(ctx, http.MethodGet, "/info", nil, &info)
	return info.NGoroutines, err
}

// callLimit is longer than anything that the daemon does takes, and than it waits for.
const callLimit = 2 * time.Minute

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, body)
	if err != nil {
		return err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		// The address says nothing: the host in it is made up.
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err
		}
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return fmt.Errorf("%s %s: %w", method, path, err)
	case resp.StatusCode >= 300 && resp.StatusCode != http.StatusNotModified: // as when it is stopped already
		var said struct{ Message string }
		if json.Unmarshal(data, &said) != nil || said.Message == "" {
			said.Message = resp.Status
		}
		return fmt.Errorf("%s %s: %s", method, path, said.Message)
	case out == nil:
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}
