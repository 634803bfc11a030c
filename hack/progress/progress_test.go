package progress

import (
	"bytes"
	"testing"
	"testing/synctest"
	"time"

	"gotest.tools/v3/assert"
)

func TestQuietForTwoSecondsAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		done := Start(&out, "waiting")
		time.Sleep(4 * time.Second)
		done()
		assert.Equal(t, out.String(), "waiting (1s)\nwaiting (3s)\n")
	})
}
