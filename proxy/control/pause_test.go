package control

import (
	"testing"
	"time"

	"github.com/weirmesh/weir/proxy/telemetry"
)

// TestWhatWasGatheredGoesEvenly, in as much time as it was gathered.
func TestWhatWasGatheredGoesEvenly(t *testing.T) {
	const batch = telemetry.Batch
	for _, c := range []struct {
		promise string
		before  time.Duration
		left    int
		want    time.Duration
	}{
		{"nothing is left: the next are gathered", gatherFor / 9, 0, gatherFor},
		{"less than a message", gatherFor, batch - 1, gatherFor},
		{"four messages, with this one", gatherFor, 3 * batch, gatherFor / 4},
		{"the last of them are no slower", gatherFor / 4, batch, gatherFor / 4},
		{"more have come", gatherFor / 4, 9 * batch, gatherFor / 10},
	} {
		if got := pauseAfter(c.before, c.left); got != c.want {
			t.Errorf("%s: %v, want %v", c.promise, got, c.want)
		}
	}
}
