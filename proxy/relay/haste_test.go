package relay

import (
	"testing"
	"time"
)

// TestHaste: a breath is for who says much, as long as it is worth it.
func TestHaste(t *testing.T) {
	var h haste
	at := time.Now()
	say := func(n int, took time.Duration) {
		at = at.Add(took)
		h.came(n, func() time.Time { return at })
	}
	expect := func(high bool, when string) {
		t.Helper()
		if h.high != high {
			t.Fatalf("%s: %v", when, h.high)
		}
	}
	const much = hasteBytes / 16
	for range 16 {
		expect(false, "at first")
		say(much, hasteTime/32)
	}
	expect(false, "nobody knows how long the first bytes took")
	for range 16 {
		say(much, hasteTime/32)
	}
	expect(true, "after much in little time")
	h.napped = true
	say(worthBreath, 0)
	expect(true, "after a breath that was worth it")
	say(1, 0)
	expect(true, "after little, without a breath")
	h.napped = true
	say(1, 0)
	expect(false, "after a breath for nothing")
	for range 16 {
		say(much, hasteTime/8)
	}
	expect(false, "after much that took long")
}
