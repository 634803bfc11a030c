package nat

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/v2/daemon/libnetwork/portmapperapi"
	"github.com/moby/moby/v2/daemon/libnetwork/types"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

// otherDaemon is set in the environment of a test binary that is another daemon on the test's host.
const otherDaemon = "BERTH_TEST_OTHER_DAEMON"

// rounds is how often two daemons publish at the same moment.
const rounds = 200

// Two daemons that look at the same port at the same moment do not both publish it: neither asks anybody else,
// and their pastas, which come later, tell nobody.
func TestTwoDaemonsPublishAtOnceUnderPasta(t *testing.T) {
	if os.Getenv(otherDaemon) != "" {
		beOtherDaemon(t)
		return
	}
	// It starts where the test is now: on the host.
	other := startOtherDaemon(t)
	newHostFake(t) // For its check that nothing is left.
	for _, tt := range []struct {
		name        string
		proto       types.Protocol
		first, last int
	}{
		{"tcp, any port", types.TCP, 0, 0},
		{"udp, any port", types.UDP, 0, 0},
		{"tcp, a range of two", types.TCP, 8000, 8001},
		{"udp, a range of two", types.UDP, 8000, 8001},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inChild(t)
			pm := pastaMapper()
			for round := range rounds {
				// Both begin their search at one place.
				cursor := 40000 + 10*round
				pm.rooms.cursors[tt.proto].Store(int32(cursor))
				other.tell("%s %d %d %d", tt.proto, tt.first, tt.last, cursor)
				pbs, err := pm.MapPorts(context.Background(), ask(tt.proto, tt.first, tt.last, "0.0.0.0"))
				theirs := other.hear()
				assert.NilError(t, err, "round %d, the other has %s", round, theirs)
				first := tt.first
				if first == 0 {
					first = cursor + 1
				}
				got := []string{fmt.Sprint(pbs[0].HostPort), theirs}
				slices.Sort(got)
				assert.Check(t, is.DeepEqual(got, []string{fmt.Sprint(first), fmt.Sprint(first + 1)}), "round %d", round)
				other.tell("unmap")
				assert.Equal(t, other.hear(), "unmapped")
				unmap(t, pm, pbs)
				if round%50 == 0 {
					freeFilters()
				}
			}
		})
	}
}

// peer is the other daemon, as the test has it: a line is said, a line is heard.
type peer struct {
	t    *testing.T
	to   io.Writer
	from *bufio.Scanner
}

func (p *peer) tell(format string, args ...any) {
	_, err := fmt.Fprintf(p.to, format+"\n", args...)
	assert.NilError(p.t, err)
}

func (p *peer) hear() string {
	assert.Assert(p.t, p.from.Scan(), "the other daemon has ended")
	return p.from.Text()
}

// startOtherDaemon runs this test as another process of the same host, until the test's end.
func startOtherDaemon(t *testing.T) *peer {
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v=false")
	cmd.Env = append(os.Environ(), otherDaemon+"=1")
	in, err := cmd.StdinPipe()
	assert.NilError(t, err)
	// What it says about the test goes elsewhere.
	from, to, err := os.Pipe()
	assert.NilError(t, err)
	cmd.ExtraFiles = []*os.File{to}
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	assert.NilError(t, cmd.Start())
	assert.NilError(t, to.Close())
	t.Cleanup(func() {
		in.Close() // It ends with its input.
		assert.Check(t, cmd.Wait(), "%s", &said)
		from.Close()
	})
	return &peer{t, in, bufio.NewScanner(from)}
}

// beOtherDaemon does as it is told.
func beOtherDaemon(t *testing.T) {
	inChild(t)
	pm := pastaMapper()
	out := os.NewFile(3, "out")
	var pbs []portmapperapi.PortBinding
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		if in.Text() == "unmap" {
			unmap(t, pm, pbs)
			fmt.Fprintln(out, "unmapped")
			continue
		}
		var proto string
		var first, last, cursor int
		_, err := fmt.Sscan(in.Text(), &proto, &first, &last, &cursor)
		assert.NilError(t, err)
		p := types.ParseProtocol(proto)
		pm.rooms.cursors[p].Store(int32(cursor))
		if pbs, err = pm.MapPorts(context.Background(), ask(p, first, last, "0.0.0.0")); err != nil {
			fmt.Fprintln(out, strings.ReplaceAll(err.Error(), "\n", " "))
			continue
		}
		fmt.Fprintln(out, pbs[0].HostPort)
	}
}

// A port that both name is published by one of them.
func TestTwoDaemonsAskForOnePortUnderPasta(t *testing.T) {
	if os.Getenv(otherDaemon) != "" {
		beOtherDaemon(t)
		return
	}
	other := startOtherDaemon(t)
	newHostFake(t) // For its check that nothing is left.
	for _, proto := range []types.Protocol{types.TCP, types.UDP} {
		t.Run(proto.String(), func(t *testing.T) {
			inChild(t)
			pm := pastaMapper()
			for round := range rounds {
				other.tell("%s 8000 8000 0", proto)
				pbs, err := pm.MapPorts(context.Background(), ask(proto, 8000, 8000, "0.0.0.0"))
				theirs := other.hear()
				if err == nil {
					assert.Check(t, is.Contains(theirs, "address already in use"), "round %d", round)
				} else {
					assert.Check(t, is.Equal(theirs, "8000"), "round %d: %v", round, err)
				}
				other.tell("unmap")
				assert.Equal(t, other.hear(), "unmapped")
				unmap(t, pm, pbs)
				if round%50 == 0 {
					freeFilters()
				}
			}
		})
	}
}
