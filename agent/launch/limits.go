package launch

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Limits of one proxy. Zeros leave it to the Manager's Options.
type Limits struct {
	Memory    int64  // bytes
	CPUWeight uint32 // as cgroup v2's cpu.weight: 1 to 10000
}

// LimitError says that a pod asks for a limit that this node has no controller
// for.
type LimitError struct{ Limit string }

func (e *LimitError) Error() string {
	return fmt.Sprintf("no cgroup hierarchy of this node can limit a proxy's %s", e.Limit)
}

// or fills in what l leaves open.
func (l Limits) or(defaults Limits) Limits {
	if l.Memory == 0 {
		l.Memory = defaults.Memory
	}
	if l.CPUWeight == 0 {
		l.CPUWeight = defaults.CPUWeight
	}
	return l
}

// The two things that are limited, for LimitError.
const (
	memory = "memory"
	cpu    = "share of the CPU"
)

// limitFile is one file of a cgroup. Which of them there are depends on the
// hierarchy.
type limitFile struct{ limit, name, value string }

// files of both versions. Nothing is swapped: keys live in the memory.
func (l Limits) files() []limitFile {
	bytes := strconv.FormatInt(l.Memory, 10)
	return []limitFile{
		{memory, "memory.max", bytes},
		{memory, "memory.limit_in_bytes", bytes},
		{"", "memory.swap.max", "0"},
		{"", "memory.swappiness", "0"},
		{cpu, "cpu.weight", strconv.FormatUint(uint64(l.CPUWeight), 10)},
		{cpu, "cpu.shares", strconv.FormatUint(cpuShares(l.CPUWeight), 10)},
	}
}

// cpuShares is cpu.shares of cgroup v1 for a weight of v2: 2 to 262144, the inverse
// of how Kubernetes comes from shares to a weight.
func cpuShares(weight uint32) uint64 { return 2 + (uint64(weight)-1)*262142/9999 }

// weigh has all proxies of a node together, in the cgroup dir, weigh what kubelet has all
// its pods weigh: 1024 of cgroup v1's shares for each processor. A new cgroup weighs what
// one process does, and of a busy node's many processors all proxies would be left with
// part of one. It is no less than that, and what somebody else has set stays.
func weigh(dir string, processors int) {
	shares := min(1024*processors, 262144)
	weight := max(100, 1+(shares-2)*9999/262142) // as Kubernetes converts it
	for _, f := range []struct {
		name, unset string
		value       int
	}{{"cpu.shares", "1024", shares}, {"cpu.weight", "100", weight}} {
		path := filepath.Join(dir, f.name)
		if have, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(have)) == f.unset {
			_ = os.WriteFile(path, []byte(strconv.Itoa(f.value)), 0) // without it proxies run, too
		}
	}
}

// limit writes the files that the cgroup dir has. What was written is added to
// done.
func (l Limits) limit(dir string, done map[string]bool) error {
	for _, f := range l.files() {
		// A cgroup file system makes no files: what is not there may not be made.
		err := os.WriteFile(filepath.Join(dir, f.name), []byte(f.value), 0)
		switch {
		case err == nil:
			done[f.limit] = true
		case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission):
			return fmt.Errorf("cgroups: %w", err)
		}
	}
	return nil
}

// missing is the first limit that a pod asked for and that is not done.
func (l Limits) missing(done map[string]bool) error {
	switch {
	case l.Memory != 0 && !done[memory]:
		return &LimitError{memory}
	case l.CPUWeight != 0 && !done[cpu]:
		return &LimitError{cpu}
	}
	return nil
}
