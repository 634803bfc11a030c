package stress

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
)

func TestParseResult(t *testing.T) {
	const line = "stress: starts=3 published=2 inuse=1 other=0 answered=2 misdelivered=0 silent=0 median_ms=250 p95_ms=300 seconds=1.50\n"
	r, err := parseResult("3 starts\n" + line)
	assert.NilError(t, err)
	assert.Equal(t, r, Result{Starts: 3, Published: 2, InUse: 1, Answered: 2, Median: "250", P95: "300", Seconds: 1.5})
	for _, output := range []string{"", "3 starts\n", line + "and more\n", strings.Replace(line, "p95", "p99", 1)} {
		_, err := parseResult(output)
		assert.ErrorContains(t, err, "does not end with its line of results", "%q", output)
	}
}

// fakeDocker is a docker CLI that starts no containers. What becomes of the n-th "run" is in
// the folder $FAKE: error.n, or the id in id.n; the host address of container ID in port.ID.
const fakeDocker = `#!/bin/sh
set -eu
cd "$FAKE"
case $1 in
version) ;;
run)
	n=1
	until mkdir "run.$n" 2>/dev/null; do n=$((n + 1)); done
	if [ -e "error.$n" ]; then
		cat "error.$n" >&2
		exit 125
	fi
	cat "id.$n"
	;;
port) sed 's/^/80\/tcp -> /' "port.$2" ;;
ps)
	[ ! -e dead ]
	cat id.*
	;;
rm) echo "$3" >>removed ;;
*) exit 1 ;;
esac
`

func TestStressScriptCountsByCause(t *testing.T) {
	fake := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		assert.NilError(t, os.WriteFile(filepath.Join(fake, name), []byte(text), 0o755))
	}
	write("docker", fakeDocker)
	var ids []string
	publish := func(n int, answer func(id string) string) {
		t.Helper()
		id := fmt.Sprintf("%012d%052d", n, 0)
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintln(w, answer(id[:12]))
		}))
		t.Cleanup(server.Close)
		write(fmt.Sprint("id.", n), id+"\n")
		write("port."+id, server.Listener.Addr().String()+"\n")
		ids = append(ids, id)
	}
	own := func(id string) string { return "Hostname: " + id }
	const refused = "docker: Error response from daemon: failed to set up container networking: "
	publish(1, own)
	publish(2, own)
	publish(3, func(string) string { return stranger })
	write("error.4", refused+"listen tcp4 0.0.0.0:32768: bind: address already in use\n\nRun 'docker run --help' for more information\n")
	write("error.5", refused+"Bind for 127.0.0.1:8080 failed: port is already allocated\n")
	write("error.6", refused+"bind: permission denied\n")
	publish(7, own)
	// All addresses must answer.
	another := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(another.Close)
	at, err := os.ReadFile(filepath.Join(fake, "port."+ids[3]))
	assert.NilError(t, err)
	write("port."+ids[3], string(at)+another.Listener.Addr().String()+"\n")

	script := func(args ...string) (string, error) {
		cmd := exec.Command("../../hack/stress.sh", args...)
		cmd.Env = append(os.Environ(), "FAKE="+fake, "PATH="+fake+":"+os.Getenv("PATH"), "DOCKER_HOST=unix:///nowhere")
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		return string(out), err
	}
	out, err := script("-n", "7", "-c", "3")
	exit, ok := errors.AsType[*exec.ExitError](err)
	assert.Assert(t, ok && exit.ExitCode() == 1, err)
	r, err := parseResult(out)
	assert.NilError(t, err)
	r.Median, r.P95, r.Seconds = "", "", 0
	assert.Equal(t, r, Result{Starts: 7, Published: 4, InUse: 2, Other: 1, Answered: 2, Misdelivered: 2})
	removed, err := os.ReadFile(filepath.Join(fake, "removed"))
	assert.NilError(t, err)
	got := strings.Fields(string(removed))
	slices.Sort(got)
	assert.DeepEqual(t, got, ids)

	// The first two again, and kept.
	for n := range 7 {
		assert.NilError(t, os.Remove(filepath.Join(fake, fmt.Sprint("run.", n+1))))
	}
	out, err = script("-n", "2", "-k")
	assert.NilError(t, err)
	r, err = parseResult(out)
	assert.NilError(t, err)
	assert.Equal(t, r.Answered, 2)
	again, err := os.ReadFile(filepath.Join(fake, "removed"))
	assert.NilError(t, err)
	assert.Equal(t, string(again), string(removed))
}

// one runs the script for one container that is published at the addresses.
func one(t *testing.T, host string, addresses ...string) (Result, string) {
	t.Helper()
	fake, tmp := t.TempDir(), t.TempDir()
	id := strings.Repeat("0", 64)
	for name, text := range map[string]string{"docker": fakeDocker, "id.1": id + "\n", "port." + id: strings.Join(addresses, "\n") + "\n"} {
		assert.NilError(t, os.WriteFile(filepath.Join(fake, name), []byte(text), 0o755))
	}
	if host == "" {
		assert.NilError(t, os.WriteFile(filepath.Join(fake, "dead"), nil, 0o644))
	}
	cmd := exec.Command("../../hack/stress.sh", "-n", "1")
	cmd.Env = append(os.Environ(), "FAKE="+fake, "PATH="+fake+":"+os.Getenv("PATH"), "DOCKER_HOST="+host, "TMPDIR="+tmp)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, _ := cmd.Output() // it fails if the container does not answer, which the result says
	t.Logf("%s%s", out, stderr.String())
	left, err := os.ReadDir(tmp)
	assert.NilError(t, err)
	assert.Equal(t, len(left), 0, "left in TMPDIR: %v", left)
	r, err := parseResult(string(out))
	assert.NilError(t, err)
	return r, stderr.String()
}

// serve answers with the id of one's container, or a stranger's.
func serve(t *testing.T, address, id string) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	assert.NilError(t, err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, id) })}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return l.Addr().(*net.TCPAddr).Port
}

const (
	oneID    = "000000000000"
	stranger = "a stranger"
)

func TestStressScriptAsksARemoteDaemonAtItsAddress(t *testing.T) {
	port := serve(t, "127.0.0.2:0", oneID)
	for _, host := range []string{"tcp://127.0.0.2:2376", "ssh://someone@127.0.0.2", "ssh://someone@127.0.0.2:22/run/docker.sock"} {
		for _, wildcard := range []string{"0.0.0.0", "[::]"} {
			r, _ := one(t, host, fmt.Sprint(wildcard, ":", port))
			assert.Check(t, r.Answered == 1, "%s, %s: %+v", host, wildcard, r)
		}
	}
}

// [::]:1234 is another port than 0.0.0.0:12340, and is asked, too.
func TestStressScriptTellsPortsApart(t *testing.T) {
	var short int
	for short = 2000; short < 6000; short++ {
		l, err := net.Listen("tcp", fmt.Sprint("[::1]:", short))
		if err != nil {
			continue
		}
		l.Close()
		if l, err = net.Listen("tcp", fmt.Sprint("127.0.0.1:", short*10)); err == nil {
			l.Close()
			break
		}
	}
	serve(t, fmt.Sprint("[::1]:", short), stranger)
	serve(t, fmt.Sprint("127.0.0.1:", short*10), oneID)
	r, _ := one(t, "unix:///nowhere", fmt.Sprint("0.0.0.0:", short*10), fmt.Sprint("[::]:", short))
	assert.Check(t, r.Misdelivered == 1, "%+v", r)
}

func TestStressScriptCleansUpAfterADeadDaemon(t *testing.T) {
	r, stderr := one(t, "", "127.0.0.1:"+strconv.Itoa(serve(t, "127.0.0.1:0", oneID)))
	assert.Equal(t, r.Answered, 1)
	assert.Assert(t, strings.Contains(stderr, "no answer from the daemon: what it has of the label stress="), stderr)
}

func TestStressScriptCleansUpWhenNobodyReads(t *testing.T) {
	bin, tmp := t.TempDir(), t.TempDir()
	assert.NilError(t, os.WriteFile(filepath.Join(bin, "docker"), []byte("#!/bin/sh\n[ $1 != run ]\n"), 0o755))
	r, w, err := os.Pipe()
	assert.NilError(t, err)
	assert.NilError(t, r.Close())
	cmd := exec.Command("../../hack/stress.sh", "-n", "1")
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "DOCKER_HOST=unix:///nowhere", "TMPDIR="+tmp)
	cmd.Stdout = w
	assert.Assert(t, cmd.Run() != nil)
	assert.NilError(t, w.Close())
	left, err := os.ReadDir(tmp)
	assert.NilError(t, err)
	assert.Equal(t, len(left), 0, "left in TMPDIR: %v", left)
}
