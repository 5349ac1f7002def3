package repair

import (
	"context"
	"fmt"
	"time"

	"github.com/weirmesh/weir/agent/launch"
)

// lookAgain is how often Leave and Drain look what is left.
const lookAgain = 20 * time.Millisecond

// leaving is the reason of every release by Leave.
const leaving = "Weir is being taken off this node"

// Leave lets every pod of the node go, whatever its labels say, and ends repair for
// good. It returns when no pod is captured, with the number of proxies that go on
// with the connections they have; or when ctx is done. An ADD that began before is
// waited for: its pod is let go as well. It may be called again.
func (l *Loop) Leave(ctx context.Context) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.left = true
	for {
		held := l.releaseAll(ctx)
		if held == 0 {
			return len(l.Proxies.List()), nil
		}
		select {
		case <-ctx.Done():
			return len(l.Proxies.List()), fmt.Errorf("%d pods are still captured: %w", held, context.Cause(ctx))
		case <-time.After(lookAgain):
		}
	}
}

// releaseAll lets go who can be let go, and says how many it found captured, or
// being so.
func (l *Loop) releaseAll(ctx context.Context) int {
	held := 0
	var tasks []launch.Task
	var releases []release
	pods := l.View.Pods()
	for _, a := range l.Proxies.List() {
		if a.Released {
			continue
		}
		held++
		if a.Committed {
			tasks = append(tasks, launch.Task{Netns: a.Netns, Do: launch.Release, Spec: a.Spec})
			releases = append(releases, release{podOf(a, pods), a, leaving})
		}
	}
	if len(tasks) == 0 {
		return held
	}
	l.farewell(ctx, releases)
	done, err := l.Proxies.Rules(ctx, tasks)
	for i, r := range releases {
		failed := err
		if err == nil {
			failed = done[i].Err()
		}
		l.released(r, failed)
	}
	return held
}

// Drain waits until no proxy is left, or ctx is done. It returns how many are.
func (l *Loop) Drain(ctx context.Context) int {
	for {
		left := len(l.Proxies.List())
		if left == 0 || ctx.Err() != nil {
			return left
		}
		select {
		case <-ctx.Done():
		case <-time.After(lookAgain):
		}
	}
}
