package chain

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/tests/pod"
)

var cycles = flag.Int("cycles", 500, "attach and detach cycles")

// mostGrowth is by how many percent the agent's memory may grow after the warm-up.
const mostGrowth = 5

// atWork is how many cycles go on at the same time.
const atWork = 4

func TestCyclesLeaveNothingBehind(t *testing.T) {
	onNode(t)
	chain, err := node.NewChain(programs.Folders(), nil)
	if err != nil {
		t.Fatal(err)
	}
	turners := pods(t, "cycle", atWork)
	// Whatever grows to the size that it needs has done so after these.
	warmUp := max(*cycles/3, atWork)
	turn(t, chain, turners, "warm", warmUp)
	before := settled(t, nil)
	memory := turn(t, chain, turners, "cycle", *cycles-warmUp)
	if diff := cmp.Diff(before, settled(t, &before)); diff != "" {
		t.Errorf("the node holds other things than before (-before, +after):\n%s", diff)
	}
	third := max(len(memory)/3, 1)
	early, late := median(memory[:third]), median(memory[len(memory)-third:])
	growth := 100 * (float64(late)/float64(early) - 1)
	t.Logf("%d cycles after %d to warm up; the agent's own memory: %d KiB early, %d late, %+.1f %%", *cycles-warmUp, warmUp, early, late, growth)
	if growth > mostGrowth {
		t.Errorf("the agent's memory grows by %.1f %%, %d %% are allowed; KiB after each round: %v", growth, mostGrowth, memory)
	}
}

// settled looks until it sees want, or, if nothing is wanted, the same twice: what
// has ended takes a moment to go.
func settled(t *testing.T, want *held) held {
	t.Helper()
	var last held
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		now, err := look()
		if err != nil {
			t.Fatal(err)
		}
		expected := last
		if want != nil {
			expected = *want
		}
		if cmp.Equal(expected, now) || time.Now().After(deadline) {
			return now
		}
		last = now
	}
}

func median(of []int) int {
	sorted := slices.Sorted(slices.Values(of))
	return sorted[len(sorted)/2]
}

// turn attaches and detaches pods n times, atWork of them at once, and samples the
// agent's memory.
func turn(t *testing.T, chain *pod.Chain, turners []*pod.Pod, name string, n int) []int {
	t.Helper()
	var memory []int
	errs := make([]error, len(turners))
	for done := 0; done < n; done += len(turners) {
		var running sync.WaitGroup
		for i, p := range turners {
			running.Go(func() { errs[i] = cycle(t.Context(), chain, p, fmt.Sprintf("%s-%d", name, done+i)) })
		}
		running.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
		kib, err := anonymous()
		if err != nil {
			t.Fatal(err)
		}
		memory = append(memory, kib)
	}
	return memory
}

// cycle is one life of a sandbox.
func cycle(ctx context.Context, chain *pod.Chain, p *pod.Pod, id string) error {
	if err := sandbox(p, id); err != nil {
		return err
	}
	if err := chain.Add(ctx, p); err != nil {
		return err
	}
	if strings.HasSuffix(id, "00") { // now and then: it is captured indeed
		if rules, err := p.ShowRules(ctx, programs); err != nil || rules.Backend == "" {
			return fmt.Errorf("%s is not captured: %+v, %w", id, rules, err)
		}
	}
	if err := chain.Del(ctx, p); err != nil {
		return err
	}
	return node.RemoveNamespace(p.Netns)
}
