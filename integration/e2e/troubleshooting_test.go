//go:build integration

package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

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
	stacktest.Hold(t, hostload.Load{Network: "tcp4", Ports: append([]int{8080, 8500, 8501, 8502}, hostload.Range(32768, 32777)...)})
	for _, who := range []string{"stock", "Berth"} {
		t.Run(who, func(t *testing.T) {
			d := stacktest.Start(t, map[string]string{"stock": "dockerd-stock", "Berth": "dockerd"}[who], stack.Options{})
			_, err := d.Run(t, "8090:80")
			assert.NilError(t, err)
			for _, s := range list {
				if who == "Berth" {
					assertSays(t, "doctor, "+s.run, s.says["doctor"], spoken(examine(t, d, s.run)))
				}
				_, err := d.Run(t, s.run)
				assert.Check(t, err != nil, s.run)
				if err != nil {
					assertSays(t, who+", "+s.run, s.says[who], err.Error())
				}
			}
		})
	}
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

// A remedy that doctor proposes helps: doctor says so, and the daemon, which need not be restarted, does it.
func TestDoctorsRemedies(t *testing.T) {
	needsNamespace(t)
	d := stacktest.Start(t, "dockerd", stack.Options{})
	for _, tt := range []struct{ publish, setting, value, before, after string }{
		{"80:80", "ip_unprivileged_port_start", "80", "fail privileged 80/tcp", "ok port 80/tcp can be published"},
		{"40000:80", "ip_local_reserved_ports", "40000", "note dynamic 40000/tcp", "note reserved 40000/tcp"},
	} {
		before := spoken(examine(t, d, tt.publish))
		assertSays(t, "before", tt.before, before)
		if tt.setting == "ip_local_reserved_ports" { // the other one is proposed where RootlessKit can't be given the capability
			assertSays(t, "before", "sysctl -w net.ipv4."+tt.setting+"="+tt.value, before)
		} else {
			_, err := d.Run(t, tt.publish)
			assert.ErrorContains(t, err, "permission denied")
		}
		setSysctl(t, "/proc/sys/net/ipv4/"+tt.setting, tt.value)
		after := spoken(examine(t, d, tt.publish))
		assertSays(t, "after", tt.after, after)
		t.Logf("before:\n%safter:\n%s", before, after)
		_, err := d.Run(t, tt.publish)
		assert.NilError(t, err)
	}
}
