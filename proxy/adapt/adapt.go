// Package adapt fits the proxy to how much there is to do.
//
// It has more than one processor only while one is not enough. The Go runtime spreads
// goroutines over all processors that it may use (GOMAXPROCS), however little there is
// to do: each request wakes another thread, which looks for work, finds none and sleeps
// again. On one processor whatever is ready is served in turn, as an event loop would
// do it, and a request costs less by a sixth. Only a proxy that keeps a processor busy
// gains from others.
//
// And it collects garbage rarely while it is busy, and gives the memory back when that
// is over.
package adapt

import (
	"context"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
)

// gcPercent has the heap grow to five times what is in use, or 16 MB, before it is
// collected, instead of twice and 4 MB: of HTTP/2, collecting is a tenth of what a
// request costs. GOMEMLIMIT still bounds it.
const gcPercent = 400

const (
	// shortest is how often a busy proxy looks at what it has used; an idle one looks
	// ever more rarely, down to longest, so as not to wake a machine for nothing.
	shortest = 100 * time.Millisecond
	longest  = 3200 * time.Millisecond

	// Shares of one processor: from high on it is not enough, below low it would be;
	// below idle there is hardly anything to do.
	high = 0.90
	low  = 0.70
	idle = 0.05

	// rush is how many looks in a row must be above high before there are more
	// processors: a burst is none. calm is how many must be below low before they are
	// given back, and below idle before memory is: the latter takes 20 s.
	rush = 3
	calm = 10
)

// Run adapts the process until ctx is done, to at most so many processors.
func Run(ctx context.Context, processors int) { run(ctx, processors, cpuTime) }

// run is Run by what used says that the process has used.
func run(ctx context.Context, processors int, used func() time.Duration) {
	debug.SetGCPercent(gcPercent)
	g := governor{most: processors, now: 1, every: shortest}
	runtime.GOMAXPROCS(1)
	timer := time.NewTimer(g.every)
	defer timer.Stop()
	at, before := time.Now(), used()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		now, total := time.Now(), used()
		rested := g.look(float64(total-before) / float64(now.Sub(at)))
		if g.now != runtime.GOMAXPROCS(0) {
			runtime.GOMAXPROCS(g.now)
		}
		if rested {
			debug.FreeOSMemory()
		}
		at, before = now, total
		timer.Reset(g.every)
	}
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts) // fails for no clock that there is
	return time.Duration(ts.Nano())
}

// governor decides.
type governor struct {
	most, now int           // processors
	pressed   int           // looks in a row that were above high
	quiet     int           // looks in a row that were below low
	resting   int           // looks in a row that were below idle, since one that was not
	every     time.Duration // until the next look
}

// look takes the share of one processor that was used since the look before. It
// reports, once, that a busy time is well over.
func (g *governor) look(share float64) bool {
	g.every = min(2*g.every, longest)
	if g.quiet++; share >= low {
		g.quiet = 0
	}
	if g.pressed++; share < high {
		g.pressed = 0
	}
	switch {
	case g.pressed >= rush:
		g.now = g.most
	case g.quiet >= calm:
		g.now = 1
	}
	switch {
	case share >= idle:
		g.every, g.resting = shortest, 1
	case g.resting > 0:
		g.resting++
	}
	if g.resting <= calm {
		return false
	}
	g.resting = 0
	return true
}
