package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/plugin/capture"
)

// removeTimeout is how long ended processes may take to leave their cgroups.
const removeTimeout = 2 * time.Second

// containerMark is between the names of a node and of one of its containers.
const containerMark = "."

// removeCgroups removes the cgroup of that name, those of its containers, and those
// below them, in every hierarchy. Nothing may run in them any more.
func removeCgroups(name string) error {
	mounts, err := cgroupMounts()
	if err != nil {
		return fmt.Errorf("remove cgroups: %w", err)
	}
	for _, mount := range mounts {
		dirs, err := filepath.Glob(filepath.Join(mount, name+containerMark+"*"))
		if err != nil {
			return fmt.Errorf("remove cgroups: %w", err)
		}
		for _, dir := range append(dirs, filepath.Join(mount, name)) {
			if err := removeCgroup(dir); err != nil {
				return fmt.Errorf("remove cgroups: %w", err)
			}
		}
	}
	return nil
}

// cgroupMounts are the mount points of all cgroup hierarchies, of both versions.
func cgroupMounts() ([]string, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(info)) {
		before, after, _ := strings.Cut(line, " - ") // proc_pid_mountinfo(5)
		fields := strings.Fields(before)
		if fstype, _, _ := strings.Cut(after, " "); len(fields) > 4 && (fstype == "cgroup" || fstype == "cgroup2") {
			out = append(out, fields[4])
		}
	}
	return out, nil
}

// cgroup2 is the mount point of the hierarchy of version 2.
func cgroup2() (string, error) {
	mounts, err := cgroupMounts()
	if err != nil {
		return "", err
	}
	for _, mount := range mounts {
		var fs unix.Statfs_t
		if err := unix.Statfs(mount, &fs); err == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
			return mount, nil
		}
	}
	return "", errors.New("there is no cgroup v2 hierarchy")
}

// Bypass is the cgroup of the node's proxies, as rules recognise it. An agent
// makes it.
func (n *Node) Bypass() (capture.Bypass, error) {
	mount, err := cgroup2()
	if err != nil {
		return capture.Bypass{}, fmt.Errorf("bypass: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(mount, n.Name), &st); err != nil {
		return capture.Bypass{}, fmt.Errorf("bypass: %w", err)
	}
	return capture.Bypass{Path: n.Name, ID: st.Ino, Level: 1}, nil
}

// LikeProxy has a command start in cgroups of that name below those of the node's
// proxies: the rules let its connections by, as they do the proxies', and it has a
// share of the processors of its own, as every container has. It returns what to call
// when it has been started.
func (n *Node) LikeProxy(cmd *exec.Cmd, name string) (func() error, error) {
	return startIn(cmd, filepath.Join(n.Name, name))
}

// LikePod has a command start in cgroups of that name below those of all the node's
// pods. It returns what to call when it has been started.
func (n *Node) LikePod(cmd *exec.Cmd, name string) (func() error, error) {
	parent, err := n.pods()
	if err != nil {
		return nil, err
	}
	return startIn(cmd, filepath.Join(parent, name))
}

// BeLikePod puts this process, and what it starts from now on, into such cgroups, until
// the node is closed.
func (n *Node) BeLikePod(name string) error {
	parent, err := n.pods()
	if err != nil {
		return err
	}
	return joinCgroups(os.Getpid(), filepath.Join(parent, name))
}

// leavePods has this process be in none of the pods' cgroups.
func (n *Node) leavePods() error {
	mounts, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, mount := range mounts {
		if _, err := os.Stat(filepath.Join(mount, n.podsCgroup())); err != nil {
			continue // there are none
		}
		if err := os.WriteFile(filepath.Join(mount, "cgroup.procs"), fmt.Append(nil, os.Getpid()), 0); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) podsCgroup() string { return n.Name + containerMark + "kubepods" }

// pods makes the cgroups of all the node's pods, and returns where they are in each
// hierarchy. They have the weight that kubelet gives them: 1024 shares of cgroup v1's for
// each processor, or as much of v2's.
func (n *Node) pods() (string, error) {
	parent := n.podsCgroup()
	mounts, err := cgroupMounts()
	if err != nil {
		return "", err
	}
	shares := 1024 * runtime.NumCPU()
	weight := 1 + (shares-2)*9999/262142
	for _, mount := range mounts {
		dir := filepath.Join(mount, parent)
		if err := makeCgroup(dir); err != nil {
			return "", err
		}
		for file, value := range map[string]int{"cpu.shares": shares, "cpu.weight": weight} {
			err := os.WriteFile(filepath.Join(dir, file), fmt.Append(nil, value), 0)
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
				return "", err // a cgroup file system makes no files
			}
		}
	}
	return parent, nil
}

// startIn has a command start in the cgroups at path in the hierarchies.
func startIn(cmd *exec.Cmd, path string) (func() error, error) {
	mount, err := cgroup2()
	if err != nil {
		return nil, err
	}
	if err := makeCgroup(filepath.Join(mount, path)); err != nil {
		return nil, err
	}
	dir, err := os.Open(filepath.Join(mount, path))
	if err != nil {
		return nil, err
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	return func() error {
		dir.Close()
		return joinCgroups(cmd.Process.Pid, path)
	}, nil
}

// joinCgroups puts a process into the cgroups at path in the hierarchy of version 2, and
// in those of version 1 where being in one costs something: those of the processors and
// of memory.
func joinCgroups(pid int, path string) error {
	mounts, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, mount := range mounts {
		dir := filepath.Join(mount, path)
		var known []string
		for _, file := range []string{"cgroup.controllers", "cpu.shares", "memory.limit_in_bytes"} {
			found, _ := filepath.Glob(filepath.Join(filepath.Dir(dir), file))
			known = append(known, found...)
		}
		if len(known) == 0 {
			continue
		}
		if err := makeCgroup(dir); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, pid), 0); err != nil {
			return err
		}
	}
	return nil
}

// CgroupPIDs lists the processes in one proxy's cgroup, by its container ID.
func (n *Node) CgroupPIDs(containerID string) ([]int, error) {
	mounts, err := cgroupMounts()
	if err != nil {
		return nil, err
	}
	for _, mount := range mounts {
		content, err := os.ReadFile(filepath.Join(mount, n.Name, containerID, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var out []int
		for field := range strings.FieldsSeq(string(content)) {
			var pid int
			if _, err := fmt.Sscan(field, &pid); err != nil {
				return nil, fmt.Errorf("cgroup of %s: %w", containerID, err)
			}
			out = append(out, pid)
		}
		return out, nil
	}
	return nil, fmt.Errorf("there is no cgroup of %s", containerID)
}

// removeCgroup removes dir, the cgroups below it first.
func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	for deadline := time.Now().Add(removeTimeout); ; time.Sleep(5 * time.Millisecond) {
		err := os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}

// Cgroups lists the cgroups below the parent of the node's proxies, in every
// hierarchy.
func (n *Node) Cgroups() ([]string, error) {
	mounts, err := cgroupMounts()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, mount := range mounts {
		entries, err := os.ReadDir(filepath.Join(mount, n.Name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			if e.IsDir() {
				out = append(out, filepath.Join(mount, n.Name, e.Name()))
			}
		}
	}
	return out, nil
}
