package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// What the simulation writes is what is read here: each of its cells is printed, and those of the plots are drawn.
func TestDrawsASimulation(t *testing.T) {
	file := filepath.Join(t.TempDir(), "model.json")
	out, err := exec.Command("go", "test", "-count=1", "-run", "^TestOdds$", "berth/daemon/libnetwork/portmappers/nat",
		"-odds.starts", "500", "-odds.json", file).CombinedOutput()
	assert.NilError(t, err, "%s", out)

	var printed strings.Builder
	assert.NilError(t, run(&printed, file))
	// Hosts with nothing taken, and six shares in blocks of five sizes.
	rows := 0
	for line := range strings.Lines(printed.String()) {
		for _, way := range ways {
			if strings.Contains(line, "  "+way.name+"  ") {
				rows++
			}
		}
	}
	assert.Equal(t, rows, (1+6*5)*len(ways), printed.String())

	for _, f := range figures {
		svg, err := os.ReadFile(strings.TrimSuffix(file, ".json") + "-" + f.name + ".svg")
		assert.NilError(t, err)
		for _, way := range ways {
			assert.Check(t, is.Equal(strings.Count(string(svg), ">"+way.name+"<"), len(blocks)), "%s: %s", f.name, way.name)
		}
		for _, block := range blocks {
			assert.Check(t, is.Contains(string(svg), fmt.Sprintf("blocks of %d<", block)), f.name)
		}
	}
}

func TestFileOfAnotherKindIsRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "model.json")
	for want, r := range map[string]results{
		"1 cells of schema 2": {Schema: 2, Cells: []cell{{}}},
		"0 cells of schema 1": {Schema: 1},
		"there is no cell":    {Schema: 1, Cells: []cell{{Way: ways[0].name, Block: 1, Starts: 1}}},
	} {
		data, err := json.Marshal(r)
		assert.NilError(t, err)
		assert.NilError(t, os.WriteFile(file, data, 0o644))
		assert.Check(t, is.ErrorContains(run(&strings.Builder{}, file), want))
	}
}
