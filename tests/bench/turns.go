package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/weirmesh/weir/tests/pod"
)

const (
	// turn is for how long a lane is measured at a time. What else the machine is busy with
	// comes and goes by the second: lanes that were measured one after the other, for
	// seconds each, would differ by that.
	turn = 100 * time.Millisecond
	// lull is how long there is nothing between two turns: what is under way as one ends is
	// served in it.
	lull = 10 * time.Millisecond
)

// load is what a lane is put to in its turns, on the same connections in all of them.
type load interface {
	// work goes on for that long.
	work(ctx context.Context, length time.Duration) error
	// await returns once it can be finished.
	await(ctx context.Context) error
	// finish ends it, and says how much was done in all.
	finish() (float64, error)
	// close ends it, if it has not ended.
	close()
}

// done is what a lane has done in its turns, and what that took.
type done struct {
	lane   lane
	amount float64
	took   time.Duration
	cpu    time.Duration // of its proxies, and of ksoftirqd
}

// takeTurns has each lane work for that long in all, in turns.
func (d *dataplane) takeTurns(ctx context.Context, lanes []lane, length time.Duration, start func(lane) (load, error)) ([]done, error) {
	out, loads := make([]done, len(lanes)), make([]load, len(lanes))
	for i, l := range lanes {
		var err error
		if loads[i], err = start(l); err != nil {
			return nil, fmt.Errorf("%s: %w", l.name, err)
		}
		defer loads[i].close()
		out[i].lane = l
	}
	for range turnsIn(length) {
		for i := range out {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			if err := d.measure(&out[i], func() error { return loads[i].work(ctx, turn) }); err != nil {
				return nil, err
			}
		}
	}
	for i := range out {
		if err := loads[i].await(ctx); err != nil {
			return nil, err
		}
		if err := d.measure(&out[i], func() error {
			var err error
			out[i].amount, err = loads[i].finish()
			return err
		}); err != nil {
			return nil, err
		}
		if out[i].amount == 0 {
			return nil, fmt.Errorf("%s: nothing was served", out[i].lane.name)
		}
	}
	return out, nil
}

// warm has each lane put to a load for one turn that is not measured. Its proxies open the
// connections then that they keep between requests: a handshake of theirs costs as much as
// twenty requests, and what of it is in a second depends on how long they kept those of
// the round before.
func warm(ctx context.Context, lanes []lane, start func(lane) (load, error)) error {
	for _, l := range lanes {
		if err := warmOne(ctx, l, start); err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
	}
	return nil
}

func warmOne(ctx context.Context, l lane, start func(lane) (load, error)) error {
	load, err := start(l)
	if err != nil {
		return err
	}
	defer load.close()
	if err := load.work(ctx, turn); err != nil {
		return err
	}
	if err := load.await(ctx); err != nil {
		return err
	}
	_, err = load.finish()
	return err
}

func turnsIn(length time.Duration) int { return max(1, int(length/turn)) }

// measure adds what f takes.
func (d *dataplane) measure(did *done, f func() error) error {
	before, err := d.cpuOf(did.lane)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := f(); err != nil {
		return fmt.Errorf("%s: %w", did.lane.name, err)
	}
	did.took += time.Since(began)
	time.Sleep(lull)
	after, err := d.cpuOf(did.lane)
	did.cpu += after - before
	return err
}

// cpuOf is what a lane's proxies have used, user and system, and the kernel's ksoftirqd,
// in whose turn nobody else has packets: the sum of their threads' se.sum_exec_runtime
// (Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat).
func (d *dataplane) cpuOf(l lane) (time.Duration, error) {
	pids, err := l.pids()
	if err != nil {
		return 0, err
	}
	sum, err := d.softirqs.cpu()
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil || len(threads) == 0 {
			return 0, fmt.Errorf("process %d has no threads: %w", pid, err)
		}
		for _, thread := range threads {
			content, err := os.ReadFile(thread)
			if err != nil {
				return 0, err
			}
			ran, err := ranFor(content)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", thread, err)
			}
			sum += ran
		}
	}
	return sum, nil
}

// ranFor is the first number of a schedstat.
func ranFor(schedstat []byte) (time.Duration, error) {
	var ns int64
	_, err := fmt.Sscan(string(schedstat), &ns)
	return time.Duration(ns), err
}

// program is a load by a program that stands still between its turns.
type program struct {
	cmd    *exec.Cmd
	client string // network namespace
	said   bytes.Buffer
}

func newProgram(ctx context.Context, l lane, name string, args ...string) *program {
	p := &program{cmd: exec.CommandContext(ctx, name, args...), client: l.client}
	p.cmd.Stdout, p.cmd.Stderr = &p.said, &p.said
	return p
}

func (p *program) work(_ context.Context, length time.Duration) error {
	begin := func() error { return pod.In(p.client, p.cmd.Start) }
	if p.cmd.Process != nil {
		begin = func() error { return p.cmd.Process.Signal(syscall.SIGCONT) }
	}
	if err := begin(); err != nil {
		return err
	}
	time.Sleep(length)
	return p.cmd.Process.Signal(syscall.SIGSTOP)
}

func (p *program) await(context.Context) error { return nil }

// wait has the program go on until it ends, and returns what it said.
func (p *program) wait() (string, error) {
	err := p.cmd.Process.Signal(syscall.SIGCONT)
	if err == nil {
		err = p.cmd.Wait()
	}
	said := strings.TrimSpace(p.said.String())
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", filepath.Base(p.cmd.Path), err, said)
	}
	return said, nil
}

func (p *program) close() {
	if p.cmd.Process != nil && p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}
