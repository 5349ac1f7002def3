package launch

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// PodEnded reports whether a container's sandbox is on its way out: nothing but its
// proxy is left in its network namespace, or it has no attachment any more. A runtime
// ends all that a sandbox runs, its own process last, and then has the network undone,
// lo set down first. What cannot be told has not ended.
func (m *Manager) PodEnded(id string) bool {
	a := m.find(id)
	if a == nil {
		return true
	}
	inode, proxies := a.snapshot().NetnsInode, m.cgroups.pids(id)
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return false
	}
	for _, p := range processes {
		pid, err := strconv.Atoi(p.Name())
		// This process's first thread may be one that entered the namespace for namespace.do.
		if err != nil || pid == os.Getpid() || slices.Contains(proxies, pid) {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(filepath.Join("/proc", p.Name(), "ns/net"), &st) == nil && st.Ino == inode {
			return false
		}
	}
	return true
}
