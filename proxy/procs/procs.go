// Package procs gives the proxy more than one processor only while one is not
// enough.
//
// The Go runtime spreads goroutines over all processors that it may use (GOMAXPROCS),
// however little there is to do: each request wakes another thread, which looks for
// work, finds none and sleeps again. On one processor whatever is ready is served in
// turn, as an event loop would do it, and what a request costs is less by a tenth to a
// quarter. Only a proxy that keeps a processor busy gains from others.
package procs

import (
	"context"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// shortest is how often a busy proxy looks at what it has used; an idle one looks
	// ever more rarely, down to longest, so as not to wake a machine for nothing.
	shortest = 100 * time.Millisecond
	longest  = 3200 * time.Millisecond

	// Shares of one processor: from high on it is not enough, below low it would be;
	// below idle there is hardly anything to look at.
	high = 0.80
	low  = 0.50
	idle = 0.05

	// calm is how many looks in a row must be below low before the others are given
	// back.
	calm = 10
)

// Govern sets GOMAXPROCS between 1 and most until ctx is done.
func Govern(ctx context.Context, most int) {
	if most <= 1 {
		return
	}
	g := governor{most: most, now: 1, every: shortest}
	runtime.GOMAXPROCS(1)
	timer := time.NewTimer(g.every)
	defer timer.Stop()
	at, used := time.Now(), cpuTime()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		now, total := time.Now(), cpuTime()
		if procs := g.look(float64(total-used) / float64(now.Sub(at))); procs != runtime.GOMAXPROCS(0) {
			runtime.GOMAXPROCS(procs)
		}
		at, used = now, total
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
	most, now int
	quiet     int           // looks in a row that were below low
	every     time.Duration // until the next look
}

// look takes the share of one processor that was used since the look before, and
// returns how many there should be.
func (g *governor) look(share float64) int {
	if g.every = min(2*g.every, longest); share >= idle {
		g.every = shortest
	}
	if g.quiet++; share >= low {
		g.quiet = 0
	}
	switch {
	case share >= high:
		g.now = g.most
	case g.quiet >= calm:
		g.now = 1
	}
	return g.now
}
