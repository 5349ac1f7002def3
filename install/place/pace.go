package place

import "time"

const (
	// contested is how soon after our write a file has to be changed back for
	// another program to have done so because of it. One that writes its own now
	// and then, because it started or polls, is not slowed down for.
	contested = 5 * time.Second
	// freeWrites may be contested without a pause: primaries write several times
	// while they start.
	freeWrites = 10
	firstPause = time.Second
	maxPause   = time.Minute
)

// pace slows down writing when another program changes back what was written.
type pace struct {
	streak int       // writes that were each changed back at once
	free   time.Time // when the last pause was over
}

// next says how long to pause after a write at now.
func (p *pace) next(now time.Time) time.Duration {
	if now.Sub(p.free) > contested {
		p.streak = 0
	}
	p.streak++
	pause := time.Duration(0)
	if over := p.streak - freeWrites; over > 0 {
		pause = min(firstPause<<min(over-1, 10), maxPause)
	}
	p.free = now.Add(pause)
	return pause
}
