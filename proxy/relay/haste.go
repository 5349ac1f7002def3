package relay

import (
	"time"

	"github.com/weirmesh/weir/proxy/sock"
)

const (
	// breath is how long a pump leaves a source alone that is in haste, once there is
	// something. Taken as it comes, each packet is sent on by itself, and wakes whoever is
	// next: a byte costs a sixth more CPU than in pieces of some 100 KB.
	breath = 30 * time.Microsecond
	// A source is in haste while it says hasteBytes in hasteTime, 4 Gbit/s, and there is
	// worthBreath after each breath.
	hasteBytes  = 4 << 20
	hasteTime   = 8 * time.Millisecond
	worthBreath = 64 << 10
)

// haste tells whether a source has so much to say that it is worth a breath.
type haste struct {
	high   bool
	waited bool // for what comes next
	napped bool // before that

	since time.Time // when it was looked at last
	bytes int       // that came since
}

// breathe lets more come, if that is worth it: before what was waited for is taken.
func (h *haste) breathe() {
	if h.waited && h.high {
		sock.Nap(breath)
		h.napped = true
	}
	h.waited = false
}

// came notes that n bytes have. It asks what time it is once in hasteBytes.
func (h *haste) came(n int, now func() time.Time) {
	if h.napped && n < worthBreath {
		h.high = false // its haste is over, or it waits for an answer
	}
	h.napped = false
	if h.bytes += n; h.bytes < hasteBytes {
		return
	}
	at := now()
	h.high = at.Sub(h.since) < hasteTime
	h.since, h.bytes = at, 0
}
