//go:build integration

// Package metrics holds what a real dockerd exports to what was done with it, and what docs/ has for Prometheus and Grafana to a real
// Prometheus.
package metrics

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"

	"berth/hack/checkout"
	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
	"berth/integration/stress"
)

func TestMain(m *testing.M) { stacktest.MainAfter(m, prometheus) }

// prometheus is the folder of its programs: where they are installed, or of Debian's package, which is unpacked into build/ and not
// installed: that would start a service. apt checks what it fetches with the archive's keys.
func prometheus() (string, error) {
	if path, err := exec.LookPath("promtool"); err == nil {
		return filepath.Dir(path), nil
	}
	root, err := checkout.Root()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, "build", "prometheus")
	bin := filepath.Join(dir, "usr", "bin")
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "prometheus-*.tmp")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	fetch := exec.Command("sh", "-c", "apt-get -q download prometheus && dpkg-deb -x prometheus_*.deb unpacked")
	fetch.Dir = tmp
	if out, err := fetch.CombinedOutput(); err != nil {
		return "", fmt.Errorf("fetch Debian's package: %w: %s", err, out)
	}
	return bin, os.Rename(filepath.Join(tmp, "unpacked"), dir)
}

func promtool(t *testing.T, args ...string) {
	t.Helper()
	out, err := exec.Command(filepath.Join(stacktest.Prepared(), "promtool"), args...).CombinedOutput()
	assert.NilError(t, err, "%s", out)
}

func TestAlerts(t *testing.T) {
	promtool(t, "check", "rules", "../../docs/alerts.yaml")
	promtool(t, "test", "rules", "testdata/alerts.yaml")
}

// A stress run, and three starts that fail, with a Prometheus that looks on.
func TestMetricsOfAStressRun(t *testing.T) {
	root, err := checkout.Root()
	assert.NilError(t, err)
	at, spans := freeAddress(t), receiveTraces(t)
	d := stacktest.Start(t, "dockerd", stack.Options{
		Args: []string{"--metrics-addr", at},
		Env:  []string{"OTEL_EXPORTER_OTLP_ENDPOINT=" + spans.URL, "OTEL_BSP_SCHEDULE_DELAY=100"},
	})
	prom := startPrometheus(t, at)
	for name, v := range scrape(t, at) {
		assert.Check(t, v == 0 || strings.HasPrefix(name, "engine_portmapper_ports_left"), "%s is %v from the start", name, v)
	}
	eventually(t, func() (string, bool) { // Sockets come and go.
		got := scrape(t, at)
		tcp, udp := got[`engine_portmapper_ports_left{protocol="tcp"}`], got[`engine_portmapper_ports_left{protocol="udp"}`]
		freeTCP, freeUDP := freePorts(t, "tcp"), freePorts(t, "udp")
		return fmt.Sprintf("of TCP %v are left, %d are free; of UDP %v and %d", tcp, freeTCP, udp, freeUDP), int(tcp) == freeTCP && int(udp) == freeUDP
	})

	ports, err := hostload.DynamicPorts(1000)
	assert.NilError(t, err)
	stacktest.Hold(t, hostload.Load{Network: "tcp4", Ports: ports[:10]}) // What the first start comes to.
	stacktest.Hold(t, hostload.Load{Network: "tcp4", Ports: ports[10:], Hold: 300, Churn: time.Millisecond, Seed: 1})
	ran, err := stress.Script{
		Repository: root, Bin: d.Options.Bin, Host: d.Host(), Starts: 12, AtOnce: 6, Out: t.Output(), Err: t.Output(),
	}.Run(t.Context())
	assert.NilError(t, err)
	assert.Equal(t, ran.Answered, ran.Starts)
	stacktest.Hold(t, hostload.Load{Network: "tcp4", Ports: hostload.Range(20000, 20003)})
	for publish, says := range map[string]string{
		"20000-20003:80": "address already in use", "20000:80": "address already in use", "0:80/sctp": "does not support sctp",
	} {
		_, err := d.Run(t, publish)
		assert.ErrorContains(t, err, says)
	}

	// What the log says of each search that took more than one attempt.
	attempts, searched := ran.Published+2, 0
	for _, l := range d.ReadLog(t, 0) {
		if strings.HasPrefix(l.Message, "Published a host port after refusals") {
			searched++
			attempts += l.Attempts - 1
		}
	}
	got := scrape(t, at)
	looks, seconds := got["engine_portmapper_looks_total"], got["engine_portmapper_search_seconds_sum"]
	assert.Check(t, searched > 0 && int(looks) >= searched, "%d searches, %v looks", searched, looks)
	assert.Check(t, seconds > 0 && seconds < ran.Seconds+60, "%v s of search", seconds)
	want := map[string]int{
		`publishes_total{asked="dynamic",outcome="published"}`: ran.Published,
		`publishes_total{asked="dynamic",outcome="failed"}`:    1, // SCTP
		`publishes_total{asked="range",outcome="no_port"}`:     1,
		`publishes_total{asked="fixed",outcome="no_port"}`:     1,
		"attempts_count":                                     ran.Published + 2, // none for SCTP
		"attempts_sum":                                       attempts,
		`attempts_bucket{le="1"}`:                            ran.Published + 2 - searched,
		`attempts_bucket{le="+Inf"}`:                         ran.Published + 2,
		"search_seconds_count":                               ran.Published + 3,
		`refusals_total{verdict="another"}`:                  attempts - ran.Published,
		`refusals_total{verdict="maybe"}`:                    0,
		`refusals_total{verdict="no"}`:                       0,
		"silences_total":                                     0,
		"late_undos_total":                                   0,
		`publishes_total{asked="range",outcome="published"}`: 0,
	}
	for name, n := range want {
		v, exported := got["engine_portmapper_"+name]
		assert.Check(t, exported && v == float64(n), "%s is %v (%v), want %d", name, v, exported, n)
	}

	eventually(t, func() (string, bool) {
		n := spans.count("libnetwork.portmappers.nat.MapPorts")
		return fmt.Sprintf("%d spans of MapPorts", n), n == ran.Published+3
	})
	assert.Check(t, spans.count("attempts") >= ran.Published+3)

	prom.answersAll(t, root)
}

// freePorts counts the dynamic ports that no socket of ours, or of whoever shares our network, has.
func freePorts(t *testing.T, proto string) int {
	t.Helper()
	data, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	assert.NilError(t, err)
	var first, last uint64
	_, err = fmt.Sscan(string(data), &first, &last)
	assert.NilError(t, err)
	free := map[uint64]bool{}
	for port := first; port <= last; port++ {
		free[port] = true
	}
	for _, file := range []string{proto, proto + "6"} {
		data, err := os.ReadFile("/proc/net/" + file)
		assert.NilError(t, err)
		for line := range strings.Lines(string(data)) {
			_, hex, _ := strings.Cut(strings.Fields(line)[1], ":")
			port, _ := strconv.ParseUint(hex, 16, 16) // 0 in the first line
			delete(free, port)
		}
	}
	return len(free)
}

// Where dockerd's process is in RootlessKit's child as a whole, as in Docker's dind-rootless images, its metrics are, too.
func TestMetricsWithoutAView(t *testing.T) {
	at := freeAddress(t)
	d := stacktest.Start(t, "dockerd", stack.Options{
		NoDetachNetns: true, Args: []string{"--metrics-addr", at},
		Env: []string{"DOCKERD_ROOTLESS_ROOTLESSKIT_FLAGS=--publish " + at + ":" + at[strings.LastIndex(at, ":")+1:] + "/tcp"},
	})
	_, err := d.Run(t, "0:80")
	assert.NilError(t, err)
	got := scrape(t, at)
	assert.Check(t, is.Equal(got[`engine_portmapper_publishes_total{asked="dynamic",outcome="published"}`], 1.0))
	for name := range got {
		assert.Check(t, !strings.HasPrefix(name, "engine_portmapper_ports_left"), "the host can't be seen")
	}
}

// scrape is what the daemon exports of its port mapper.
func scrape(t *testing.T, at string) map[string]float64 {
	t.Helper()
	values := map[string]float64{}
	for line := range strings.Lines(get(t, "http://"+at+"/metrics")) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if strings.HasPrefix(name, "engine_portmapper_") {
			v, err := strconv.ParseFloat(value, 64)
			assert.NilError(t, err)
			values[name] = v
		}
	}
	assert.Assert(t, len(values) > 0)
	return values
}

func get(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	assert.NilError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	assert.NilError(t, err)
	assert.Equal(t, resp.StatusCode, http.StatusOK, "%s: %s", url, body)
	return string(body)
}

// freeAddress is one to listen at, which nobody had just now. It is none of those that connections or containers are given.
func freeAddress(t *testing.T) string {
	t.Helper()
	for port := 29000; port < 30000; port++ {
		if l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port)); err == nil {
			assert.NilError(t, l.Close())
			return l.Addr().String()
		}
	}
	t.Fatal("no port is free")
	return ""
}

// eventually waits until what is true.
func eventually(t *testing.T, what func() (string, bool)) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		said, ok := what()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("still: ", said)
		}
	}
}

// traces is an OpenTelemetry collector that keeps what it gets.
type traces struct {
	*httptest.Server
	mu  sync.Mutex
	got bytes.Buffer
}

func receiveTraces(t *testing.T) *traces {
	r := &traces{}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		defer r.mu.Unlock()
		_, err := r.got.ReadFrom(req.Body)
		assert.Check(t, err)
	}))
	t.Cleanup(r.Close)
	return r
}

// count is how often a name is in the spans: protocol buffers have strings as they are.
func (r *traces) count(name string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Count(r.got.Bytes(), []byte(name))
}

// prometheusServer is a Prometheus that scrapes the daemon five times a second, with docs/alerts.yaml.
type prometheusServer struct{ url string }

func startPrometheus(t *testing.T, daemon string) prometheusServer {
	t.Helper()
	rules, err := filepath.Abs("../../docs/alerts.yaml")
	assert.NilError(t, err)
	dir, at := t.TempDir(), freeAddress(t)
	for port := 29000; at == daemon; port++ { // It may not listen yet.
		at = fmt.Sprint("127.0.0.1:", port)
	}
	config := fmt.Sprintf("global: {scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms}\nrule_files: [%q]\n"+
		"scrape_configs: [{job_name: docker, static_configs: [{targets: [%q]}]}]\n", rules, daemon)
	assert.NilError(t, os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600))
	cmd := exec.Command(filepath.Join(stacktest.Prepared(), "prometheus"), "--config.file=prometheus.yml", "--storage.tsdb.path=data",
		"--web.listen-address="+at)
	var log bytes.Buffer
	cmd.Dir, cmd.Stderr = dir, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // The signal comes when this thread ends.
	assert.NilError(t, cmd.Start())
	t.Cleanup(func() {
		assert.Check(t, cmd.Process.Signal(syscall.SIGTERM))
		assert.Check(t, cmd.Wait(), "%s", log.String())
		runtime.UnlockOSThread()
	})
	p := prometheusServer{"http://" + at}
	eventually(t, func() (string, bool) {
		resp, err := http.Get(p.url + "/-/ready")
		if err != nil {
			return err.Error(), false
		}
		resp.Body.Close()
		return resp.Status, resp.StatusCode == http.StatusOK
	})
	eventually(t, func() (string, bool) {
		found := p.query(t, "engine_portmapper_looks_total")
		return fmt.Sprint(found), len(found) == 1
	})
	return p
}

// query returns the values that an expression has now.
func (p prometheusServer) query(t *testing.T, expr string) (values []string) {
	t.Helper()
	var answer struct {
		Data struct {
			Result []struct{ Value [2]any }
		}
	}
	assert.NilError(t, json.Unmarshal([]byte(get(t, p.url+"/api/v1/query?query="+url.QueryEscape(expr))), &answer), expr)
	for _, r := range answer.Data.Result {
		values = append(values, fmt.Sprint(r.Value[1]))
	}
	return values
}

// answersAll tries what docs/ asks Prometheus for. Of a RootlessKit that does not answer there is nothing to tell.
func (p prometheusServer) answersAll(t *testing.T, root string) {
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	data, err := os.ReadFile(filepath.Join(root, "docs", "grafana-dashboard.json"))
	assert.NilError(t, err)
	assert.NilError(t, json.Unmarshal(data, &dashboard))
	assert.Assert(t, len(dashboard.Panels) > 5)
	grafana := strings.NewReplacer("$__rate_interval", "1m", "$instance", ".*")
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			expr := grafana.Replace(target.Expr)
			eventually(t, func() (string, bool) {
				values := p.query(t, expr)
				return fmt.Sprintf("%s: %s: %q", panel.Title, expr, values), len(values) > 0 && !slices.Contains(values, "NaN")
			})
		}
	}

	firing := map[string]int{}
	eventually(t, func() (string, bool) {
		var rules struct {
			Data struct {
				Groups []struct {
					Rules []struct {
						Name, Health, LastError string
						Alerts                  []struct{ State string }
					}
				}
			}
		}
		assert.NilError(t, json.Unmarshal([]byte(get(t, p.url+"/api/v1/rules")), &rules))
		for _, g := range rules.Data.Groups {
			for _, r := range g.Rules {
				assert.Check(t, is.Equal(r.Health, "ok"), "%s: %s", r.Name, r.LastError)
				firing[r.Name] = len(r.Alerts)
			}
		}
		return fmt.Sprint(firing), maps.Equal(firing, map[string]int{"DockerPublishesNoPort": 1, "RootlessKitDoesNotAnswer": 0})
	})
}
