package launch

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/plugin/capture"
)

// cgroups is the place of all proxies in every hierarchy of the node. Every one
// matters: on cgroup v1 a runtime's shim ends what is left in its container's
// v1 cgroups, whatever v2 says, so a proxy that moved in one only would die with
// the agent that started it.
type cgroups struct {
	parent string   // "weir", relative to each root
	v2     string   // mount point of the v2 hierarchy
	roots  []string // mount points of all hierarchies, v2 first
}

// openCgroups finds the hierarchies mounted at or below root and makes the
// parent in each. There must be a v2 hierarchy: the bypass needs it.
func openCgroups(root, parent string) (*cgroups, error) {
	info, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("cgroups: %w", err)
	}
	defer info.Close()
	c := &cgroups{parent: parent}
	for scan := bufio.NewScanner(info); scan.Scan(); {
		mountPoint, fstype, ok := parseMountInfo(scan.Text())
		if !ok || (mountPoint != root && !strings.HasPrefix(mountPoint, root+"/")) {
			continue
		}
		switch {
		case slices.Contains(c.roots, mountPoint):
		case fstype == "cgroup2":
			c.v2 = mountPoint
			c.roots = append([]string{mountPoint}, c.roots...)
		case fstype == "cgroup":
			c.roots = append(c.roots, mountPoint)
		}
	}
	if c.v2 == "" {
		return nil, fmt.Errorf("cgroups: no cgroup v2 hierarchy is mounted at or below %s; mount the host's there (--cgroup-root)", root)
	}
	return c, c.makeParent()
}

// makeParent makes the parent in every hierarchy, where it is not there.
func (c *cgroups) makeParent() error {
	for _, dir := range c.roots {
		for part := range strings.SplitSeq(c.parent, "/") {
			delegate(dir)
			dir = filepath.Join(dir, part)
			if err := makeCgroup(dir); err != nil {
				return err
			}
		}
		delegate(dir)
	}
	return nil
}

// close removes the parent if no proxy is left in it. While there is one its
// number stands in rules, and a parent made anew would have another.
func (c *cgroups) close() {
	for _, root := range c.roots {
		_ = os.Remove(filepath.Join(root, c.parent))
	}
}

// parseMountInfo reads one line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
func parseMountInfo(line string) (string, string, bool) {
	before, after, ok := strings.Cut(line, " - ")
	fields := strings.Fields(before)
	if !ok || len(fields) < 5 {
		return "", "", false
	}
	fstype, _, _ := strings.Cut(after, " ")
	return fields[4], fstype, true
}

// delegate lets the cgroups below dir have limits, where the v2 hierarchy has
// those controllers; each by itself, as one that is not there has all refused. On
// a hybrid node v1 has them, and this does nothing.
func delegate(dir string) {
	for _, controller := range []string{"+memory", "+cpu"} {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(controller), 0)
	}
}

// makeCgroup makes one cgroup. A v1 cpuset must have processors and memory nodes
// before a process may join, and starts with none: it takes its parent's.
func makeCgroup(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("cgroups: %w", err)
	}
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		path := filepath.Join(dir, file)
		have, err := os.ReadFile(path)
		if err != nil || strings.TrimSpace(string(have)) != "" {
			continue
		}
		want, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
		if err != nil || strings.TrimSpace(string(want)) == "" {
			continue
		}
		if err := os.WriteFile(path, want, 0); err != nil {
			return fmt.Errorf("cgroups: %w", err)
		}
	}
	return nil
}

// bypass is what rules need to recognise the proxies' sockets.
func (c *cgroups) bypass() (capture.Bypass, error) {
	var st unix.Stat_t
	path := filepath.Join(c.v2, c.parent)
	err := unix.Stat(path, &st)
	if errors.Is(err, fs.ErrNotExist) {
		// Removed while no proxy was in it: nobody has its old number.
		if err := c.makeParent(); err != nil {
			return capture.Bypass{}, err
		}
		err = unix.Stat(path, &st)
	}
	if err != nil {
		return capture.Bypass{}, fmt.Errorf("cgroups: %s: %w", path, err)
	}
	return capture.Bypass{Path: c.parent, ID: st.Ino, Level: strings.Count(c.parent, "/") + 1}, nil
}

// make makes the cgroup of one proxy in every hierarchy, with the limits asked
// for, else the defaults; a *LimitError if one that was asked for cannot be had. It
// returns the v1 files that a thread writes itself into; in v2 a process is started
// in its cgroup, see open.
func (c *cgroups) make(name string, asked, defaults Limits) ([]string, error) {
	var tasks []string
	done := map[string]bool{}
	for _, root := range c.roots {
		dir := filepath.Join(root, c.parent, name)
		if err := makeCgroup(dir); err != nil {
			return nil, err
		}
		if err := asked.or(defaults).limit(dir, done); err != nil {
			return nil, err
		}
		if root != c.v2 {
			tasks = append(tasks, filepath.Join(dir, "tasks"))
		}
	}
	return tasks, asked.missing(done)
}

// open opens the v2 cgroup of one proxy, to start a process in it
// (CLONE_INTO_CGROUP, Linux 5.7).
func (c *cgroups) open(name string) (*os.File, error) {
	return os.Open(filepath.Join(c.v2, c.parent, name))
}

// pids lists the processes of one proxy's cgroup; normally one.
func (c *cgroups) pids(name string) []int {
	b, err := os.ReadFile(filepath.Join(c.v2, c.parent, name, "cgroup.procs"))
	if err != nil {
		return nil
	}
	var out []int
	for _, f := range strings.Fields(string(b)) {
		// A process of another PID namespace reads as 0.
		if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
			out = append(out, pid)
		}
	}
	return out
}

// remove ends whatever runs in one proxy's cgroup and removes it everywhere.
func (c *cgroups) remove(name string) error {
	deadline := time.Now().Add(removeTimeout)
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		for _, pid := range c.pids(name) {
			if fd, err := unix.PidfdOpen(pid, 0); err == nil {
				// Looked at again: the number may have been reused since it was read.
				if slices.Contains(c.pids(name), pid) {
					_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
				}
				unix.Close(fd)
			}
		}
		var left error
		for _, root := range c.roots {
			if err := os.Remove(filepath.Join(root, c.parent, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				left = err
			}
		}
		if left == nil {
			return nil
		}
		if !errors.Is(left, syscall.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("cgroups: %w", left)
		}
		time.Sleep(wait)
	}
}

// removeTimeout is how long a killed proxy may take to leave its cgroups.
const removeTimeout = 2 * time.Second
