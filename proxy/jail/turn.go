package jail

import (
	"time"

	"golang.org/x/sys/unix"
)

// turn is the slice that the scheduler gives the proxy, the shortest there is: with
// the same share of the processors, but in shorter turns, it is let in sooner where
// others are at work. At 5,000 requests a second that halves the 99th percentile of
// what a pair of proxies takes; each request costs a twentieth more there, and no more
// where processors are busy (tests/bench dataplane, Linux 6.18, two processors).
const turn = 100 * time.Microsecond

// takeShortTurns is for this thread and those that come of it: sched_setattr(2), with
// which a thread may choose its slice since Linux 6.12. Older kernels take no notice.
func takeShortTurns() {
	attr, err := unix.SchedGetAttr(0, 0)
	if err != nil || attr.Policy != unix.SCHED_NORMAL {
		return // somebody has thought of something else
	}
	attr.Runtime = uint64(turn.Nanoseconds())
	_ = unix.SchedSetAttr(0, attr, 0)
}
