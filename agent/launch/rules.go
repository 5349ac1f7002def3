package launch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"

	"github.com/weirmesh/weir/plugin/capture"
)

// Task is one network namespace and what weir-cni is to do with its rules: the
// agent touches none itself.
type Task struct {
	Netns string
	Do    string // Apply, Release or Delete
	Spec  capture.Spec
}

// What a Task does.
const (
	Apply   = "apply"   // put the Spec's rules in, where they differ
	Release = "release" // turn nothing new aside; what was turned aside goes on
	Delete  = "delete"  // take everything out
)

// Done is what a Task came to.
type Done struct {
	Netns      string
	Difference string // what Apply found to be other than the Spec says
	Changed    bool
	Backend    string
	Error      string
}

// Err is the task's error, nil if it was done.
func (d Done) Err() error {
	if d.Error == "" {
		return nil
	}
	return errors.New(d.Error)
}

// Rules has weir-cni do tasks, all in one process, in the cgroup namespace of the
// host. The answers are in the order of the tasks; each has its own error.
func (m *Manager) Rules(ctx context.Context, tasks []Task) ([]Done, error) {
	type answer struct {
		done []Done
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the namespace is the thread's
		if err := enterCgroupNS(m.opts.HostCgroupNS); err != nil {
			answers <- answer{err: err}
			return
		}
		done, err := runTasks(ctx, m.opts.Plugin, tasks)
		answers <- answer{done, err}
	}()
	a := <-answers
	return a.done, a.err
}

// runTasks runs weir-cni on this very thread's namespaces.
func runTasks(ctx context.Context, plugin string, tasks []Task) ([]Done, error) {
	stdin, err := json.Marshal(tasks)
	if err != nil {
		return nil, err
	}
	out, err := output(ctx, stdin, plugin, "repair")
	if err != nil {
		return nil, err
	}
	var done []Done
	if err := json.Unmarshal(out, &done); err != nil {
		return nil, fmt.Errorf("%s repair: %w", plugin, err)
	}
	if len(done) != len(tasks) {
		return nil, fmt.Errorf("%s repair: %d answers to %d tasks", plugin, len(done), len(tasks))
	}
	return done, nil
}
