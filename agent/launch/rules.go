package launch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

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

// Rules has weir-cni do tasks, all in one process. The answers are in the order of
// the tasks; each has its own error.
func (m *Manager) Rules(ctx context.Context, tasks []Task) ([]Done, error) {
	named := slices.Clone(tasks)
	for i := range named {
		named[i].Netns = runtimeNetnsPath(m.opts.NetnsDir, named[i].Netns)
	}
	stdin, err := json.Marshal(named)
	if err != nil {
		return nil, err
	}
	out, err := m.plugin(ctx, stdin, "repair", "--lock-dir", lockDir(m.opts.RunDir))
	if err != nil {
		return nil, err
	}
	var done []Done
	if err := json.Unmarshal(out, &done); err != nil {
		return nil, fmt.Errorf("%s repair: %w", m.opts.Plugin, err)
	}
	if len(done) != len(tasks) {
		return nil, fmt.Errorf("%s repair: %d answers to %d tasks", m.opts.Plugin, len(done), len(tasks))
	}
	return done, nil
}

// plugin runs weir-cni as a runtime would, in the host's cgroup and mount
// namespaces, and returns its output; the error carries what it said. The program
// itself is the agent's own, so it is executed by descriptor.
func (m *Manager) plugin(ctx context.Context, stdin []byte, args ...string) ([]byte, error) {
	program, err := os.Open(m.opts.Plugin)
	if err != nil {
		return nil, err
	}
	defer program.Close()
	// By this process's number: it is opened by another.
	cmd := exec.CommandContext(ctx, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), program.Fd()), args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the namespaces are the thread's
		err := enterCgroupNS(m.opts.HostCgroupNS)
		if err == nil {
			err = enterMountNS(m.opts.HostMountNS)
		}
		if err == nil {
			err = cmd.Run()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", m.opts.Plugin, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}

// enterMountNS moves this thread to the mount namespace at path, where it is
// another one: iptables and its libraries are the host's.
func enterMountNS(path string) error {
	f, err := openOther(path, "/proc/thread-self/ns/mnt")
	if f == nil {
		return err
	}
	defer f.Close()
	// A thread that shares its root and working directory may not move.
	err = unix.Unshare(unix.CLONE_FS)
	if err == nil {
		err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNS)
	}
	if err != nil {
		return fmt.Errorf("enter the host's mount namespace: %w", err)
	}
	return nil
}

// openOther opens the namespace at path, unless it is the one at ours or cannot be
// read here; whether that matters, what is done without it will tell.
func openOther(path, ours string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil
	}
	theirs, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	if own, err := os.Stat(ours); err == nil && os.SameFile(own, theirs) {
		f.Close()
		return nil, nil
	}
	return f, nil
}
