package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"
)

const events = `{"Action":"start","Package":"berth/a"}
{"Action":"run","Package":"berth/a","Test":"TestRuns"}
{"Action":"pass","Package":"berth/a","Test":"TestRuns","Elapsed":0}
{"Action":"run","Package":"berth/a","Test":"TestTable/needs_root"}
{"Action":"output","Package":"berth/a","Test":"TestTable/needs_root","Output":"    a_test.go:7: takes root\n"}
{"Action":"skip","Package":"berth/a","Test":"TestTable/needs_root","Elapsed":0}
{"Action":"pass","Package":"berth/a","Elapsed":0}
{"Action":"skip","Package":"berth/none","Elapsed":0}
`

func TestOnlyExpectedSkipsPass(t *testing.T) {
	for _, tc := range []struct {
		name, list, events string
		root               bool
		want               string // in the error, "" for none
	}{
		{"not listed", "", events, false, "1 of 1 skips are not in"},
		{"listed for all", "all a.TestTable/needs_root it does", events, true, ""},
		{"listed by a pattern", "all a.TestTable/* it does", events, true, ""},
		{"a pattern ends at a slash", "all a.* it does", events, true, "1 of 1 skips are not in"},
		{"listed for users, and a user's", "user a.TestTable/needs_root it does", events, false, ""},
		{"listed for users, but root's", "user a.TestTable/needs_root it does", events, true, "1 of 1 skips are not in"},
		{"no reason", "# a comment\n\nall a.TestTable/needs_root", events, true, ":3: want who, a test and the reason"},
		{"who", "none a.TestTable it does", events, true, `:1: want user or all, not "none"`},
		{"pattern", "all a.[ it does", events, true, ":1: syntax error in pattern"},
		{"no test at all", "", `{"Action":"skip","Package":"berth/none","Elapsed":0}`, true, "no test ran"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out strings.Builder
			err := run(&out, write(t, tc.list), write(t, tc.events), tc.root)
			if tc.want == "" {
				assert.NilError(t, err)
				return
			}
			assert.ErrorContains(t, err, tc.want)
			if strings.Contains(tc.want, "skips") {
				assert.Equal(t, out.String(), "not expected to be skipped: a.TestTable/needs_root\n    a_test.go:7: takes root\n")
			}
		})
	}
}

func write(t *testing.T, text string) string {
	name := filepath.Join(t.TempDir(), "file")
	assert.NilError(t, os.WriteFile(name, []byte(text), 0o644))
	return name
}

func TestListIsWellFormed(t *testing.T) {
	f, err := os.Open("../../" + listName)
	assert.NilError(t, err)
	defer f.Close()
	_, err = parse(f)
	assert.NilError(t, err)
}
