package launch

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
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
		weigh(dir, runtime.NumCPU())
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

// made is a proxy's cgroups while they are being made: what was asked for, what
// is put in, and which limits some hierarchy has taken.
type made struct {
	*cgroups
	name          string
	asked, limits Limits
	done          map[string]bool
}

// begin starts making the cgroups of one proxy, with the limits asked for, else
// the defaults.
func (c *cgroups) begin(name string, asked, defaults Limits) *made {
	return &made{cgroups: c, name: name, asked: asked, limits: asked.or(defaults), done: map[string]bool{}}
}

// v2 makes the v2 cgroup and opens it to start a process in (CLONE_INTO_CGROUP,
// Linux 5.7).
func (m *made) v2() (*os.File, error) {
	dir, err := m.in(m.cgroups.v2)
	if err != nil {
		return nil, err
	}
	return os.Open(dir)
}

// v1 makes the cgroups in the v1 hierarchies and returns the files that a thread
// writes itself into. A limit that was asked for and that no hierarchy has taken
// is a *LimitError.
func (m *made) v1() ([]string, error) {
	var tasks []string
	for _, root := range m.roots {
		if root == m.cgroups.v2 {
			continue
		}
		dir, err := m.in(root)
		if err != nil {
			return nil, err
		}
		tasks = append(tasks, filepath.Join(dir, "tasks"))
	}
	return tasks, m.asked.missing(m.done)
}

// in makes the cgroup in one hierarchy.
func (m *made) in(root string) (string, error) {
	dir := filepath.Join(root, m.parent, m.name)
	if err := makeCgroup(dir); err != nil {
		return "", err
	}
	return dir, m.limits.limit(dir, m.done)
}

// names lists the proxies' cgroups.
func (c *cgroups) names() []string {
	entries, err := os.ReadDir(filepath.Join(c.v2, c.parent))
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() {
			out = append(out, e.Name())
		}
	}
	return out
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
