package doctor

import (
	"strings"
	"testing"

	"gotest.tools/v3/assert"
	is "gotest.tools/v3/assert/cmp"
)

const english = `
Protocol tcp Port Exclusion Ranges

Start Port    End Port
----------    --------
        80          80
      1433        1433
     50000       50059     *
     51563       51662

* - Administered port exclusions.
`

func TestParseExcluded(t *testing.T) {
	want := []Excluded{{80, 80, false}, {1433, 1433, false}, {50000, 50059, true}, {51563, 51662, false}}
	german := strings.NewReplacer("Protocol tcp Port Exclusion Ranges", "Portausschlussbereiche für Protokoll \"tcp\"", "Start Port    End Port", "Startport    Endport",
		"* - Administered port exclusions.", "* - Verwaltete Portausschlüsse.").Replace(english)
	japanese := strings.NewReplacer("Protocol tcp Port Exclusion Ranges", "プロトコル tcp ポート除外範囲", "Start Port    End Port", "開始ポート    終了ポート",
		"* - Administered port exclusions.", "* - 管理されたポート除外。").Replace(english)
	for name, printed := range map[string]string{"English": english, "German": german, "Japanese": japanese, "CRLF": strings.ReplaceAll(english, "\n", "\r\n")} {
		assert.Check(t, is.DeepEqual(ParseExcluded(printed), want), name)
	}
	assert.Check(t, is.Len(ParseExcluded(strings.ReplaceAll(english, "     *", "")), 4))
	for _, none := range []string{"", "\r\n", "Access is denied.", "2 1\n", "1 70000\n"} {
		assert.Check(t, is.Len(ParseExcluded(none), 0), none)
	}
}

// SQL Server's port is the worked example of docs/troubleshooting.md.
func TestWhatIsSaidOfAnExcludedPort(t *testing.T) {
	list := ParseExcluded(english)
	f := excluded(list, "ipv4", "tcp", 1433)
	assert.Assert(t, f != nil)
	assert.Check(t, is.DeepEqual(f.Root, []string{
		"net stop winnat",
		"netsh int ipv4 add excludedportrange protocol=tcp startport=1433 numberofports=1",
		"net start winnat",
	}))
	assert.Check(t, excluded(list, "ipv4", "tcp", 1434) == nil)
	assert.Check(t, excluded(list, "ipv4", "tcp", 50000) == nil, "an administrator keeps it for whoever asks for it")
	overlapping := ParseExcluded("50000 50100\n50010 50020 *\n")
	assert.Check(t, excluded(overlapping, "ipv4", "tcp", 50015) == nil)
	assert.Check(t, excluded(overlapping, "ipv4", "tcp", 50030) != nil)
	assert.Check(t, is.DeepEqual(administered(overlapping, "ipv4", "tcp", 50015), &Finding{
		Mark: Note, Says: "is excluded by an administrator (50010-50020 *, ipv4, tcp): nobody gets it by chance, and you, by its number",
	}))
	assert.Check(t, administered(overlapping, "ipv4", "tcp", 50030) == nil)
	assert.Check(t, administered(list, "ipv4", "tcp", 1434) == nil)
	assert.Check(t, is.Equal(reserveLine(list), "sysctl -w net.ipv4.ip_local_reserved_ports=80,1433,50000-50059,51563-51662"))
}
