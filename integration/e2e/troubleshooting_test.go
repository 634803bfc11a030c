//go:build integration

package e2e

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
	"gotest.tools/v3/poll"

	"berth/hack/checkout"
	"berth/hack/doctor"
	"berth/hack/stack"
	"berth/integration/hostload"
	"berth/integration/stacktest"
)

// symptom is a table of docs/troubleshooting.md: what is run, and what is said of it.
type symptom struct {
	run  string
	says map[string]string // by who says it: stock, Berth, doctor
}

func symptoms(t *testing.T) (list []symptom) {
	t.Helper()
	root, err := checkout.Root()
	assert.NilError(t, err)
	page, err := os.ReadFile(filepath.Join(root, "docs", "troubleshooting.md"))
	assert.NilError(t, err)
	for _, row := range regexp.MustCompile("(?m)^\\| (you run|stock says|Berth says|doctor says) \\| `(.*)` \\|$").FindAllStringSubmatch(string(page), -1) {
		if row[1] == "you run" {
			_, publish, ok := strings.Cut(row[2], "docker run -p ")
			assert.Assert(t, ok, row[2])
			publish, _, _ = strings.Cut(publish, " ")
			list = append(list, symptom{publish, map[string]string{}})
			continue
		}
		list[len(list)-1].says[strings.Fields(row[1])[0]] = row[2]
	}
	return list
}

// The messages of docs/troubleshooting.md are those of the real programs, to the letter but for what "..." stands for.
func TestTroubleshootingPage(t *testing.T) {
	needsNamespace(t)
	list := symptoms(t)
	assert.Assert(t, len(list) >= 7)
	// What is in the way, as the page has it. Stock's daemon looks at its child's settings, and the search without one at the host's.
	setSysctl(t, portRangeSysctl, "32768 32777")
	for _, who := range []string{"stock", "Berth"} {
		t.Run(who, func(t *testing.T) {
			forbidden := forbid(t, forbiddenPort)
			stacktest.Hold(t, hostload.Load{Network: "tcp4", Ports: append([]int{8080, 8500, 8501, 8502}, hostload.Range(32768, 32777)...)})
			d := stacktest.Start(t, map[string]string{"stock": "dockerd-stock", "Berth": "dockerd"}[who], stack.Options{})
			_, err := d.Run(t, "8090:80")
			assert.NilError(t, err)
			for _, s := range list {
				if s.run == fmt.Sprintf("%d:80", forbiddenPort) && !forbidden {
					t.Run(s.run, func(t *testing.T) { t.Skip("a kernel without Landlock's network rules") })
					continue
				}
				s.check(t, who, d) // on this thread, for doctor to be denied what the daemon is
			}
			if who == "Berth" {
				checkCommands(t, d)
			}
		})
	}
}

// forbiddenPort is one that a policy denies.
const forbiddenPort = 8083

// check has the symptom appear, and compares what is said with the page.
func (s symptom) check(t *testing.T, who string, d *stacktest.Daemon) {
	kit, err := d.Process(t.Context(), "docker-rootlesskit")
	assert.NilError(t, err)
	failed := make(chan error, 1)
	run := func() {
		_, err := d.Run(t, s.run)
		failed <- err
	}
	switch s.run {
	case "8081:80": // RootlessKit does not answer
		if who == "stock" {
			assert.Equal(t, s.says[who], "", "it waits for as long as that takes")
			return
		}
		stop(t, kit)
		defer func() {
			assert.NilError(t, kit.Signal(unix.SIGCONT))
			poll.WaitOn(t, func(poll.LogT) poll.Result {
				if _, err := d.Run(t, s.run); err != nil {
					return poll.Continue("after the silence: %v", err)
				}
				return poll.Success()
			}, poll.WithTimeout(time.Minute))
		}()
		go run() // it takes 10 s
	case "8082:80": // it has no descriptors left
		p, err := procfs.NewProc(kit.PID)
		assert.NilError(t, err)
		old, err := p.Limits()
		assert.NilError(t, err)
		limitDescriptors(t, d, kit, 3)
		defer limitDescriptors(t, d, kit, old.OpenFiles)
		run()
	default:
		run()
	}
	if who == "Berth" {
		assertSays(t, "doctor, "+s.run, s.says["doctor"], spoken(examine(t, d, s.run)))
	}
	err = <-failed
	assert.Check(t, err != nil, s.run)
	if err != nil {
		assertSays(t, who+", "+s.run, s.says[who], err.Error())
	}
}

// stop returns when every thread of the process has stopped: until then one may still answer.
func stop(t *testing.T, p stack.Process) {
	t.Helper()
	assert.NilError(t, p.Signal(unix.SIGSTOP))
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		threads, err := procfs.AllThreads(p.PID)
		if err != nil {
			return poll.Error(err)
		}
		for _, thread := range threads {
			if stat, err := thread.Stat(); err != nil || stat.State != "T" {
				return poll.Continue("thread %d: state %q, %v", thread.PID, stat.State, err)
			}
		}
		return poll.Success()
	}, poll.WithDelay(5*time.Millisecond))
}

// limitDescriptors sets how many a process of the daemon's user may have from now on. Root may lack the capability to.
func limitDescriptors(t *testing.T, d *stacktest.Daemon, p stack.Process, n uint64) {
	account, err := user.Lookup(d.User())
	assert.NilError(t, err)
	gid, err := strconv.ParseUint(account.Gid, 10, 32)
	assert.NilError(t, err)
	cmd := exec.Command("prlimit", fmt.Sprintf("--pid=%d", p.PID), fmt.Sprintf("--nofile=%d:", n))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(d.UID()), Gid: uint32(gid)}}
	out, err := cmd.CombinedOutput()
	assert.NilError(t, err, "%s", out)
}

// checkCommands runs what the page has people type about a host and a daemon of theirs, as it is there after its symptoms.
func checkCommands(t *testing.T, d *stacktest.Daemon) {
	out, err := d.Docker("ps")
	assert.NilError(t, err)
	assert.Check(t, is.Contains(out, ":8090->80/tcp"))
	for command, says := range map[string]string{"ss -ltnp 'sport = :8080'": "users:((", "ip address": "inet 192.0.2.1/24"} {
		out, err := exec.Command("sh", "-c", command).CombinedOutput()
		assert.NilError(t, err, "%s", out)
		assert.Check(t, is.Contains(string(out), says))
		assert.Check(t, !strings.Contains(string(out), "192.0.2.9"))
	}
	runSaid(t, d, "0:80", regexp.MustCompile(`sudo (sysctl -w [^)]*)`))
	_, err = d.Run(t, "0:80")
	assert.NilError(t, err)
}

// runSaid runs the command in what docker run says of a port that can't be published.
func runSaid(t *testing.T, d *stacktest.Daemon, publish string, command *regexp.Regexp) {
	t.Helper()
	_, err := d.Run(t, publish)
	assert.Assert(t, err != nil)
	said := command.FindStringSubmatch(err.Error())
	assert.Assert(t, said != nil, "%v", err)
	out, err := exec.Command("sh", "-c", said[1]).CombinedOutput()
	assert.NilError(t, err, "%s: %s", said[1], out)
	t.Log(said[1])
}

// assertSays checks that what the page has is a part of what was said.
func assertSays(t *testing.T, what, page, said string) {
	t.Helper()
	pattern := strings.ReplaceAll(regexp.QuoteMeta(page), regexp.QuoteMeta("..."), ".*")
	assert.Check(t, page != "" && regexp.MustCompile(pattern).MatchString(said), "%s:\nthe page has\n  %s\nsaid was\n  %s", what, page, said)
}

// spoken is a report as the page shows it, with one space between the columns.
func spoken(r doctor.Report) string {
	var out strings.Builder
	_ = r.Print(&out, false)
	return regexp.MustCompile(` +`).ReplaceAllString(out.String(), " ")
}

// A remedy that doctor proposes helps: doctor says so, and the daemon does it.
func TestDoctorsRemedies(t *testing.T) {
	needsNamespace(t)
	d := stacktest.Start(t, "dockerd", stack.Options{RootlessKit: ownRootlessKit(t)})
	for _, tt := range []struct{ name, publish, before, remedy, after string }{
		{"setting", "40000:80", "note dynamic 40000/tcp", "sysctl -w net.ipv4.ip_local_reserved_ports=40000", "note reserved 40000/tcp"},
		{"setting for everyone", "80:80", "fail privileged 80/tcp", "sysctl -w net.ipv4.ip_unprivileged_port_start=80", "ok port 80/tcp can be published"},
		{"capability", "80:80", "fail privileged 80/tcp", "setcap cap_net_bind_service=ep", "ok port 80/tcp can be published"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, name := range []string{"ip_unprivileged_port_start", "ip_local_reserved_ports"} { // for the clean-up
				value, err := os.ReadFile("/proc/sys/net/ipv4/" + name)
				assert.NilError(t, err)
				setSysctl(t, "/proc/sys/net/ipv4/"+name, string(value))
			}
			report := examine(t, d, tt.publish)
			before := spoken(report)
			assertSays(t, "before", tt.before, before)
			remedy := report.Findings[0].Root[0]
			if tt.name == "setting for everyone" { // what is proposed where RootlessKit can't be given the capability
				remedy = tt.remedy
			}
			assert.Assert(t, strings.HasPrefix(remedy, tt.remedy), remedy)
			if report.Failed() {
				_, err := d.Run(t, tt.publish)
				assert.ErrorContains(t, err, "permission denied")
				if tt.name == "capability" {
					assert.ErrorContains(t, err, "sudo "+remedy+" and restart the daemon")
				}
			}
			out, err := exec.Command("sh", "-c", remedy).CombinedOutput()
			assert.NilError(t, err, "%s: %s", remedy, out)
			if tt.name == "capability" { // else a running daemon does it
				assert.NilError(t, d.Restart(t.Context(), d.Options))
			}
			after := spoken(examine(t, d, tt.publish))
			assertSays(t, "after", tt.after, after)
			t.Logf("before:\n%safter `%s`:\n%s", before, remedy, after)
			_, err = d.Run(t, tt.publish)
			assert.NilError(t, err)
		})
	}
}

// ownRootlessKit is a copy for the test to change, of which the stack makes a link: it lies where the stacks' programs do.
func ownRootlessKit(t *testing.T) string {
	t.Helper()
	root, err := checkout.Root()
	assert.NilError(t, err)
	dir, err := os.MkdirTemp("/var/lib", "berth-test-")
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, os.RemoveAll(dir)) })
	from, err := os.Open(checkout.Bin(root, "rootlesskit"))
	assert.NilError(t, err)
	defer from.Close()
	to, err := os.OpenFile(filepath.Join(dir, "rootlesskit"), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	assert.NilError(t, err)
	_, err = io.Copy(to, from)
	assert.NilError(t, err)
	assert.NilError(t, to.Close())
	return to.Name()
}
