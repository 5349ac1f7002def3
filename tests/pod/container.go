package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Container is a cgroup in every hierarchy of the machine, as a container runtime
// makes them for a container. It goes with the node.
type Container struct{ dirs []string }

// NewContainer makes the cgroups.
func (n *Node) NewContainer(name string) (*Container, error) {
	mounts, err := cgroupMounts()
	if err != nil {
		return nil, fmt.Errorf("container: %w", err)
	}
	c := &Container{}
	for _, mount := range mounts {
		dir := filepath.Join(mount, n.Name+containerMark+name)
		if err := makeCgroup(dir); err != nil {
			return nil, fmt.Errorf("container: %w", err)
		}
		c.dirs = append(c.dirs, dir)
	}
	return c, nil
}

// makeCgroup makes one cgroup; one of cpuset, where nothing runs before it has
// processors and memory, gets its parent's.
func makeCgroup(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		all, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
		if err != nil || strings.TrimSpace(string(all)) == "" {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, file), all, 0); err != nil {
			return err
		}
	}
	return nil
}

// Wrapper writes a script to path that runs a program in the container, in a
// cgroup namespace of its own: what a runtime does on a node with v2 alone.
func (c *Container) Wrapper(path, program string) error {
	script := "#!/bin/sh\nset -e\n"
	for _, dir := range c.dirs {
		script += "echo $$ >" + filepath.Join(dir, "cgroup.procs") + "\n"
	}
	script += "exec unshare --cgroup " + program + ` "$@"` + "\n"
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		return fmt.Errorf("container: %w", err)
	}
	return nil
}

// Kill ends whatever is in the container, of whichever hierarchy, and removes it,
// as runtimes do: with cgroup.kill on v2 (Linux 5.14), one by one on v1.
func (c *Container) Kill() error {
	for _, dir := range c.dirs {
		kill, err := os.OpenFile(filepath.Join(dir, "cgroup.kill"), os.O_WRONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			_, err = kill.WriteString("1")
			kill.Close()
		}
		if err != nil {
			return fmt.Errorf("container: %w", err)
		}
	}
	for deadline := time.Now().Add(removeTimeout); ; time.Sleep(5 * time.Millisecond) {
		left := 0
		for _, dir := range c.dirs {
			procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("container: %w", err)
			}
			for field := range strings.FieldsSeq(string(procs)) {
				// 0 is a process of another PID namespace, which this one cannot name.
				if pid, err := strconv.Atoi(field); err == nil && pid > 1 {
					_ = unix.Kill(pid, unix.SIGKILL)
				}
				left++
			}
		}
		if left == 0 {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("container: %d processes do not end", left)
		}
	}
	for _, dir := range c.dirs {
		if err := removeCgroup(dir); err != nil {
			return fmt.Errorf("container: %w", err)
		}
	}
	return nil
}
