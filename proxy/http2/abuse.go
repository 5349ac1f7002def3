package http2

import (
	"fmt"
	"time"

	"golang.org/x/net/http2"
)

// A peer may send this many frames that make work and serve no purpose (PING,
// SETTINGS, resets, empty DATA, frames that break a rule), and so many a second
// more. nghttp2 has the same numbers for its two limits of this kind.
const (
	glitchBurst = 1000
	glitchRate  = 33
	// glitchCredit bounds what body frames are worth that came before the frames that
	// they are set against: a peer may answer many of them at once.
	glitchCredit = 4 * glitchBurst
)

// meter counts them. Bodies and streams that end in good order are set against
// them: clients of gRPC send a PING for every body frame they get while they
// measure a connection's bandwidth.
type meter struct {
	level float64
	last  time.Time
}

// count counts one, and returns the error that ends the connection once it is too much.
func (m *meter) count(c *conn) error {
	now := time.Now()
	c.mu.Lock()
	earned := c.earned
	c.earned = 0
	c.mu.Unlock()
	if m.level > 0 {
		m.level = max(0, m.level-now.Sub(m.last).Seconds()*glitchRate)
	}
	m.level = max(-glitchCredit, m.level-float64(earned)) + 1
	m.last = now
	if m.level > glitchBurst {
		return &connError{http2.ErrCodeEnhanceYourCalm, fmt.Errorf("%w: frames without purpose", ErrAbuse)}
	}
	return nil
}
