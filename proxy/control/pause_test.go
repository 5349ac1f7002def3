package control

import (
	"testing"
	"time"

	"github.com/weirmesh/weir/proxy/telemetry"
)

// TestWhatWasGatheredGoesEvenly: in as much time as it was gathered, and faster where
// more comes than goes.
func TestWhatWasGatheredGoesEvenly(t *testing.T) {
	const batch = telemetry.Batch
	for _, c := range []struct {
		promise    string
		before     time.Duration
		sent, left int
		want       time.Duration
	}{
		{"nothing is left: the next are gathered", breath, batch, 0, gatherFor},
		{"less than a message", gatherFor, batch, batch - 1, gatherFor},
		{"four messages, with this one", gatherFor, batch, 3 * batch, gatherFor / 4},
		{"the last of them are no slower", gatherFor / 4, batch, batch, gatherFor / 4},
		{"more have come", gatherFor / 4, batch, 9 * batch, gatherFor / 10},
		{"so many that messages are large", gatherFor / 4, 4 * batch, 9 * batch, breath},
	} {
		if got := pauseAfter(c.before, c.sent, c.left); got != c.want {
			t.Errorf("%s: %v, want %v", c.promise, got, c.want)
		}
	}
}
