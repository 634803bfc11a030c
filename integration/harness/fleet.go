package harness

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
)

// FleetFile is where `make fleet` leaves a list of [Fleet], beside the results.
const FleetFile = "fleet.json"

// Fleet is what came of a Swarm service on rootless nodes, each a host whose first dynamic ports are held.
type Fleet struct {
	Daemon      string  `json:"daemon"`
	Nodes       int     `json:"nodes"`
	Replicas    int     `json:"replicas"`
	Held        int     `json:"held_ports"` // of each host
	FailedTasks int     `json:"failed_tasks"`
	Seconds     float64 `json:"seconds"` // until all ran
}

// fleets are those that were measured here, if any.
func (r *Results) fleets() (list []Fleet, _ error) {
	data, err := os.ReadFile(filepath.Join(filepath.Dir(r.file), FleetFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &list)
	}
	return list, err
}
