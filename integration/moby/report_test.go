//go:build integration

package moby

import (
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"berth/hack/checkout"
)

// record is what build/results/upstream.json has of one run.
type record struct {
	Daemon string
	suite
	Tests map[string]tally
}

// keep adds what was seen to build/results: as JSON, and as docs/upstream.md is. Earlier runs of the same tests are replaced.
func keep(t *testing.T, root string, seen ...record) {
	t.Helper()
	assert.NilError(t, os.MkdirAll(checkout.Results(root), 0o755))
	file := checkout.Results(root, "upstream.json")
	var records []record
	data, err := os.ReadFile(file)
	if !errors.Is(err, fs.ErrNotExist) {
		assert.NilError(t, err)
		assert.NilError(t, json.Unmarshal(data, &records))
	}
	for _, r := range seen {
		records = append(slices.DeleteFunc(records, func(old record) bool {
			return old.Daemon == r.Daemon && old.Mode == r.Mode && slices.Equal(old.Run, r.Run) && slices.Equal(old.Hold, r.Hold)
		}), r)
	}
	data, err = json.MarshalIndent(records, "", "\t")
	assert.NilError(t, err)
	assert.NilError(t, os.WriteFile(file, append(data, '\n'), 0o644))
	assert.NilError(t, os.WriteFile(checkout.Results(root, "upstream.md"), []byte(document(records)), 0o644))
}

// document tells people.
func document(records []record) string {
	var b strings.Builder
	fmt.Fprint(&b, intro)
	fmt.Fprint(&b, "\n| daemon | tests | pass | skip themselves | fail |\n| --- | --- | --- | --- | --- |\n")
	byMode := map[string]map[string]map[string]tally{rootless: {}, rootful: {}}
	for _, r := range records {
		if r.Run != nil {
			continue
		}
		byMode[r.Mode][r.Daemon] = r.Tests
		sum := total(r.Tests)
		fmt.Fprintf(&b, "| %s, %s | %d | %d | %d | %d |\n", r.Mode, called(r.Daemon), len(r.Tests), sum.Pass, sum.Skip, sum.Fail)
	}
	for _, mode := range []string{rootless, rootful} {
		stock, berth := byMode[mode][stockDaemon], byMode[mode][berthDaemon]
		if stock == nil || berth == nil {
			fmt.Fprintf(&b, "\nThe %s ones were not run.\n", mode)
			continue
		}
		fmt.Fprintf(&b, "\nOf the %s ones, %d pass with stock and not with Berth, %d with Berth and not with stock.\n", mode, len(worse(stock, berth)), len(worse(berth, stock)))
	}
	for _, part := range []struct {
		intro string
		isIt  func(record) bool
	}{
		{againIntro, func(r record) bool { return r.Hold == nil && r.Run != nil }},
		{heldIntro, func(r record) bool { return r.Hold != nil }},
	} {
		intro := part.intro + "\n| daemon | test | pass | fail |\n| --- | --- | --- | --- |\n"
		for _, r := range records {
			if !part.isIt(r) {
				continue
			}
			fmt.Fprint(&b, intro)
			intro = ""
			where := r.Mode + ", " + called(r.Daemon)
			if r.Hold != nil {
				where = called(r.Daemon) + ", " + strings.Join(r.Hold, " and ") + " held"
			}
			for _, name := range names(r.Tests) {
				fmt.Fprintf(&b, "| %s | %s | %d | %d |\n", where, short(name), r.Tests[name].Pass, r.Tests[name].Fail)
			}
		}
	}
	fmt.Fprint(&b, byNameIntro)
	fmt.Fprint(&b, "\n| test | rootless, stock | rootless, Berth | rootful, stock | rootful, Berth |\n| --- | --- | --- | --- | --- |\n")
	all := map[string]tally{}
	for _, byDaemon := range byMode {
		for _, tests := range byDaemon {
			maps.Copy(all, tests)
		}
	}
	for _, name := range names(all) {
		cell := func(mode, daemon string) string {
			if r, ran := byMode[mode][daemon][name]; ran {
				return strings.TrimPrefix(r.String(), "1 ")
			}
			return ""
		}
		row := []string{cell(rootless, stockDaemon), cell(rootless, berthDaemon), cell(rootful, stockDaemon), cell(rootful, berthDaemon)}
		_, test, _ := strings.Cut(name, ".")
		if strings.Contains(test, "/") && row[0] == row[1] && row[2] == row[3] && !slices.Contains(row, "fail") {
			continue
		}
		fmt.Fprintf(&b, "| %s | %s |\n", strings.ReplaceAll(short(name), "|", `\|`), strings.Join(row, " | "))
	}
	return b.String()
}

func names(tests map[string]tally) []string { return slices.Sorted(maps.Keys(tests)) }

func short(name string) string { return strings.TrimPrefix(name, "integration/") }

func called(daemon string) string {
	if daemon == stockDaemon {
		return "stock"
	}
	return "Berth"
}

//go:embed testdata/intro.md
var intro string

const heldIntro = `
## With ports of the host held

The tests that fail by chance in upstream's CI (moby 53255, 53306), with the host's ports 32768-33067 held by another
process.
`

const againIntro = `
## Once more

What ended otherwise with one than with the other was run five times more with each: some tests look at the clock. One that
Berth passes four times of six less often than stock, or more, fails the run: for one test, chance does that once in 25 times
at the most. The tables show every one, and less than that is not told from chance.
`

const byNameIntro = `
## By name

Subtests are listed where they end otherwise with one daemon than with the other, or fail.
`

func TestDocumentSaysWhatDiffers(t *testing.T) {
	pass, fail, skip := tally{Pass: 1}, tally{Fail: 1}, tally{Skip: 1}
	stock := map[string]tally{"integration/x.TestA": pass, "integration/x.TestA/same": pass, "integration/x.TestA/differs": pass, "integration/x.TestB": skip, "integration/y/z.TestD": pass}
	berth := map[string]tally{"integration/x.TestA": fail, "integration/x.TestA/same": pass, "integration/x.TestA/differs": fail, "integration/x.TestB": pass, "integration/y/z.TestD": pass}
	assert.DeepEqual(t, worse(stock, berth), []string{"integration/x.TestA", "integration/x.TestA/differs"})
	assert.DeepEqual(t, worse(stock, nil), []string{"integration/x.TestA", "integration/x.TestA/differs", "integration/x.TestA/same", "integration/y/z.TestD"})
	assert.DeepEqual(t, topLevel(slices.Values(worse(stock, berth))), []string{"TestA"})

	all, held, again := suite{Mode: rootless}, suite{Mode: rootless, Run: flaky, Hold: []string{"tcp", "udp"}}, suite{Mode: rootful, Run: []string{"TestA"}}
	got := document([]record{
		{stockDaemon, all, stock},
		{berthDaemon, all, berth},
		{berthDaemon, held, map[string]tally{"integration/x.TestC": {Pass: 99, Fail: 1}}},
		{stockDaemon, again, map[string]tally{"integration/x.TestA": {Pass: 5}}},
	})
	for _, line := range []string{
		"| rootless, stock | 5 | 4 | 1 | 0 |",
		"| rootless, Berth | 5 | 3 | 0 | 2 |",
		"Of the rootless ones, 2 pass with stock and not with Berth, 1 with Berth and not with stock.",
		"| Berth, tcp and udp held | x.TestC | 99 | 1 |",
		"| rootful, stock | x.TestA | 5 | 0 |",
		"| x.TestA | pass | fail |  |  |",
		"| x.TestA/differs | pass | fail |  |  |",
		"| x.TestB | skip | pass |  |  |",
		"| y/z.TestD | pass | pass |  |  |",
	} {
		assert.Check(t, strings.Contains(got, line+"\n"), "no line %s in:\n%s", line, got)
	}
	assert.Check(t, !strings.Contains(got, "/same"), got)
	assert.Check(t, strings.Contains(got, "The rootful ones were not run."), got)
}
