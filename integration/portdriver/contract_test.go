//go:build integration

package portdriver

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"gotest.tools/v3/assert"

	"berth/hack/checkout"
	"berth/integration/stacktest"
)

// contract is set to the patch's tests, for a stack whose port driver they are to hold to the
// contract of all port drivers.
const contract = "BERTH_CONTRACT"

// TestContract holds the port drivers side by side to what the patch's unit tests hold the fake
// to: answers are waited for, which takes more than 10 s.
func TestContract(t *testing.T) {
	root, err := checkout.Root()
	assert.NilError(t, err)
	dir, err := os.MkdirTemp("", "berth-contract-") // t.TempDir keeps others out
	assert.NilError(t, err)
	t.Cleanup(func() { assert.NilError(t, os.RemoveAll(dir)) })
	program := filepath.Join(dir, "nat.test")
	out, err := natTests(t, root, "-c", "-o", program).CombinedOutput()
	assert.NilError(t, err, "%s", out)
	for _, file := range []string{dir, program} {
		assert.NilError(t, os.Chmod(file, 0o755)) // whatever the umask
	}

	type end struct {
		out string
		err error
	}
	var ends []chan end
	h := host{next: 29000}
	for i, k := range rootlessKits {
		s := stacktest.Beside(t, fmt.Sprint("contract-", i))
		o := k.options(t, root, "contract")
		o.Env = []string{contract + "=" + program}
		port, err := h.ports(2)
		assert.NilError(t, err)
		ended := make(chan end, 1)
		ends = append(ends, ended)
		go func() {
			var e end
			if e.err = s.Up(t.Context(), o); e.err == nil {
				e.out, e.err = ask(s, fmt.Sprintf("contract?rootlesskit=%s&port=%d", k.version, port))
			}
			ended <- e
		}()
	}
	for i, k := range rootlessKits {
		t.Run(k.version+"/"+k.driver, func(t *testing.T) {
			e := <-ends[i]
			assert.NilError(t, e.err)
			_, promises, kept := strings.Cut(e.out, "\n--- PASS: TestContractOfRootlessKit ")
			assert.Assert(t, kept, e.out)
			t.Log(promises)
		})
	}
	assert.NilError(t, h.waitUntilFree())
}
