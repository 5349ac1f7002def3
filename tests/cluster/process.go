package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process is one program of the cluster, as it is noted in the state folder.
// Whoever holds the folder can stop it and start it again.
type process struct {
	Name string
	Args []string // Args[0] is the program's absolute path
	Env  []string `json:",omitempty"` // added to the machine's

	PID   int    // in the host's PID namespace; 0 before the first start
	Start uint64 // clock ticks after boot: tells the process from a later one of the same PID

	record string // path of this note
	log    string // path of its stdout and stderr
}

func (p *process) save() error {
	content, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(p.record, content, 0o600)
}

func (p *process) load() error {
	content, err := os.ReadFile(p.record)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(content, p); err != nil {
		return fmt.Errorf("%s: %w", p.record, err)
	}
	return nil
}

// alive reports whether the process runs. A child of ours that has ended is
// reaped here, so that no goroutine has to wait for it.
func (p *process) alive() bool {
	if p.PID == 0 {
		return false
	}
	start, state, err := processStat(p.PID)
	if err != nil || start != p.Start {
		return false
	}
	if state != "Z" {
		return true
	}
	// Zero says that the child's other threads are still ending.
	pid, err := unix.Wait4(p.PID, nil, unix.WNOHANG, nil)
	return err == nil && pid == 0
}

// stop ends the process: SIGTERM, then SIGKILL after grace.
func (p *process) stop(ctx context.Context, grace time.Duration) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil || !p.alive() {
		if err == nil {
			unix.Close(fd)
		}
		return nil
	}
	defer unix.Close(fd)
	for _, step := range []struct {
		signal unix.Signal
		wait   time.Duration
	}{{unix.SIGTERM, grace}, {unix.SIGKILL, 10 * time.Second}} {
		if err := unix.PidfdSendSignal(fd, step.signal, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("stop %s: %w", p.Name, err)
		}
		stepCtx, cancel := context.WithTimeout(ctx, step.wait)
		err := poll(stepCtx, p.Name+" to end", func(context.Context) error {
			if p.alive() {
				return errors.New("still running")
			}
			return nil
		})
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
	}
	return fmt.Errorf("stop %s: process %d does not end", p.Name, p.PID)
}

// logTail is the end of the process's log, worded for an error.
func (p *process) logTail() string {
	return fmt.Sprintf("end of %s:\n%s", p.log, tail(p.log))
}

// processStat reads when a process started and its state letter.
func processStat(pid int) (uint64, string, error) {
	content, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, "", err
	}
	// The second field is the name in parentheses, which may hold anything.
	fields := strings.Fields(string(content[bytes.LastIndexByte(content, ')')+1:]))
	const state, start = 0, 19 // fields 3 and 22 of proc(5)
	if len(fields) <= start {
		return 0, "", fmt.Errorf("/proc/%d/stat: %d fields", pid, len(fields))
	}
	ticks, err := strconv.ParseUint(fields[start], 10, 64)
	return ticks, fields[state], err
}

// run runs a command of the host to its end; the error carries what it wrote.
func run(ctx context.Context, stdin string, name string, args ...string) error {
	return output(exec.CommandContext(ctx, name, args...), stdin)
}

func output(cmd *exec.Cmd, stdin string) error {
	var written bytes.Buffer
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Stdout, cmd.Stderr = &written, &written
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, lastLines(written.String(), 10))
	}
	return nil
}

// writeFile replaces a file by rename, so that a reader sees all or nothing.
func writeFile(path string, content []byte, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tmp-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(content)
	if err == nil {
		err = tmp.Chmod(mode)
	}
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
