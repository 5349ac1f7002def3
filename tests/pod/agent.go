package pod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Where an agent that runs on a node finds and puts things.
const (
	manifestsDir = NodeDir + "/manifests"
	weirDir      = NodeDir + "/weir"
)

// readyTimeout is how long an agent may take from its start until it serves.
const readyTimeout = 5 * time.Second

// Agent is a weir-agent in standalone mode.
type Agent struct {
	cmd    *exec.Cmd
	log    *logBuffer
	exited chan struct{} // closed when it has ended, with err
	err    error
}

// StartAgent starts the node's agent on what Write has written so far, and
// returns when it serves. accessLog gets its access log, flags are added to its
// command line, and count for more than its own. The agent ends with the node, or with ctx.
func (n *Node) StartAgent(ctx context.Context, b Binaries, accessLog io.Writer, flags ...string) (*Agent, error) {
	if err := os.MkdirAll(manifestsDir, 0o755); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	// The agent writes this file once it serves; there may be one of an earlier agent's.
	ready := filepath.Join(weirDir, "ready")
	if err := os.Remove(ready); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("agent: %w", err)
	}
	cmd := exec.CommandContext(ctx, b.Agent, append([]string{
		"--manifests", manifestsDir, "--run-dir", weirDir, "--netns-dir", netnsDir, "--cgroup-parent", n.Name,
		"--proxy", b.Proxy, "--proxy-dir", "", "--plugin", b.Plugin, "--node-name", n.Name}, flags...)...)
	a := &Agent{cmd: cmd, log: &logBuffer{}, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = accessLog, a.log
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	go a.wait()
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		if _, err := os.Stat(ready); err == nil {
			return a, nil
		}
		select {
		case <-a.exited:
			return nil, fmt.Errorf("agent: it ended: %w\n%s", a.err, a.Log())
		case <-ctx.Done():
			return nil, fmt.Errorf("agent: it does not serve: %w\n%s", context.Cause(ctx), a.Log())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func (a *Agent) wait() {
	a.err = a.cmd.Wait()
	if a.err == nil {
		a.err = errors.New("exit status 0")
	}
	close(a.exited)
}

// PID is the agent's process, on the node.
func (a *Agent) PID() int { return a.cmd.Process.Pid }

// End sends the agent a signal and waits until it has ended. Its proxies go on.
func (a *Agent) End(signal os.Signal) error {
	if err := a.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("agent: %w", err)
	}
	return a.Wait()
}

// Wait waits until the agent, which somebody has ended, is no more.
func (a *Agent) Wait() error {
	select {
	case <-a.exited:
		return nil
	case <-time.After(readyTimeout):
		return errors.New("agent: it does not end")
	}
}

// Log is what the agent has logged.
func (a *Agent) Log() string { return a.log.String() }

// logBuffer is a log that is read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.TrimSpace(b.buf.String())
}
