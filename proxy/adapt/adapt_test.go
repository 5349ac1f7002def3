package adapt

import (
	"context"
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

func looks(g *governor, share float64, n int) int {
	for range n {
		g.look(share)
	}
	return g.now
}

func TestOneProcessorUntilItIsNotEnough(t *testing.T) {
	g := &governor{most: 4, now: 1, every: shortest}
	for _, step := range []struct {
		share float64
		looks int
		want  int
	}{
		{0.01, 20, 1}, {0.6, 100, 1}, {0.89, 100, 1},
		{0.95, rush - 1, 1}, {0.5, 1, 1}, {0.95, rush - 1, 1}, // bursts
		{0.95, 1, 4},
		{1.9, 10, 4}, {0.8, 100, 4}, // less would do, but not by much
		{0.3, calm - 1, 4}, {0.3, 1, 1},
		{0.95, rush, 4}, {0.3, calm - 1, 4}, {0.8, 1, 4}, {0.3, calm - 1, 4},
	} {
		if got := looks(g, step.share, step.looks); got != step.want {
			t.Fatalf("after %d looks at %.2f: %d processors, want %d", step.looks, step.share, got, step.want)
		}
	}
}

func TestAnIdleProxyHardlyWakes(t *testing.T) {
	g := &governor{most: 2, now: 1, every: shortest}
	if looks(g, 0, 10); g.every != longest {
		t.Errorf("an idle proxy looks every %v, want %v", g.every, longest)
	}
	if g.look(0.2); g.every != shortest {
		t.Errorf("a busy one looks every %v, want %v", g.every, shortest)
	}
}

func TestMemoryIsGivenBackOnceAfterEachBusyTime(t *testing.T) {
	g := &governor{most: 1, now: 1, every: shortest}
	given := func(share float64, looks int) int {
		n := 0
		for range looks {
			if g.look(share) {
				n++
			}
		}
		return n
	}
	for i, step := range []struct {
		share float64
		looks int
		want  int
	}{
		{0, 100, 0}, // it has not been busy
		{0.3, 100, 0}, {0, calm - 1, 0}, {0.3, 1, 0}, {0, calm - 1, 0}, {0, 1, 1}, {0, 100, 0},
		{0.1, 1, 0}, {0, calm, 1},
	} {
		if got := given(step.share, step.looks); got != step.want {
			t.Fatalf("step %d, %d looks at %.2f: given back %d times, want %d", i, step.looks, step.share, got, step.want)
		}
	}
}

// TestABusyProcessGetsMore goes by a clock and not by what it uses itself, which is up
// to the machine.
func TestABusyProcessGetsMore(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		start := time.Now()
		run(ctx, 2, func() time.Duration { return time.Since(start) })
	}()
	defer func() {
		cancel()
		<-done
	}()
	deadline := time.Now().Add(20 * time.Second)
	for runtime.GOMAXPROCS(0) != 1 && time.Now().Before(deadline) {
		runtime.Gosched()
	}
	for runtime.GOMAXPROCS(0) != 2 {
		if time.Now().After(deadline) {
			t.Fatal("a process that keeps a processor busy still has one")
		}
		runtime.Gosched()
	}
}

func TestWhatIsUsedIsSeen(t *testing.T) {
	before := cpuTime()
	for deadline := time.Now().Add(20 * time.Second); cpuTime() == before; {
		if time.Now().After(deadline) {
			t.Fatalf("a process that did something has used as much as before, %v", before)
		}
	}
}
