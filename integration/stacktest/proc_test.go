package stacktest

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"gotest.tools/v3/assert"
)

func TestSocketsAreThoseThatCanBeReached(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	assert.NilError(t, err)
	defer l.Close()
	conn, err := net.Dial("tcp4", l.Addr().String())
	assert.NilError(t, err)
	defer conn.Close()
	u, err := net.ListenPacket("udp6", "[::1]:0")
	assert.NilError(t, err)
	defer u.Close()
	own := SocketsOf(t, os.Getpid())
	has := func(network, at string) bool {
		return slices.ContainsFunc(own, func(s Socket) bool {
			return s.Network == network && s.At == netip.MustParseAddrPort(at) && s.UID == os.Getuid()
		})
	}
	assert.Assert(t, has("tcp", l.Addr().String()), "%v", own)
	assert.Assert(t, has("udp6", u.LocalAddr().String()), "%v", own)
	assert.Assert(t, !has("tcp", conn.LocalAddr().String()), "%v", own)
}

func TestReadLogIsOfTheDaemonAlone(t *testing.T) {
	const skipped = `{"level":"warning","msg":"earlier"}` + "\n"
	const lost = `{"error":"EOF","hostIP":"::1","level":"warning","msg":"RootlessKit's answer was lost: it may hold the host port","port":8080,"proto":"tcp","time":"2026-01-01T00:00:00Z"}`
	d := Daemon{Log: filepath.Join(t.TempDir(), "log")}
	const searched = `{"attempts":3,"duration":1500000,"level":"info","msg":"Published","port":"32768"}`
	assert.NilError(t, os.WriteFile(d.Log, []byte(skipped+"net.ipv4.ip_forward = 1\n"+lost+"\n"+searched+"\ntime=\"2026\" level=info\n{}\n"), 0o600))
	said := d.ReadLog(t, int64(len(skipped)))
	assert.Equal(t, len(said), 2, "%+v", said)
	assert.Equal(t, said[1].Duration, 1500*time.Microsecond)
	assert.Equal(t, said[1].Attempts, 3)
	assert.Assert(t, said[0].IsLost())
	assert.Equal(t, said[0].HostPort(), "[::1]:8080/tcp")
}
