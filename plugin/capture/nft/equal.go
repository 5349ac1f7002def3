package nft

import (
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"

	"github.com/weirmesh/weir/plugin/capture"
)

// equal compares rules by what they do. Not by the bypass's path: the kernel
// keeps the cgroup's ID only. The order of counters and of chains means nothing
// (chains run in the order of their priority).
func equal(a, b capture.Ruleset) bool { return reflect.DeepEqual(canonical(a), canonical(b)) }

func canonical(r capture.Ruleset) capture.Ruleset {
	out := mapBypass(r, func(b capture.Bypass) capture.Bypass { b.Path = ""; return b })
	out.Counters = slices.Clone(r.Counters)
	slices.Sort(out.Counters)
	slices.SortFunc(out.Chains, func(a, b capture.Chain) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// named fills in the paths of bypass cgroups. One that is gone is said to be, as
// its rule matches nothing any more.
func named(r capture.Ruleset) capture.Ruleset {
	return mapBypass(r, func(b capture.Bypass) capture.Bypass {
		b.Path = cgroupPath(b)
		return b
	})
}

func mapBypass(r capture.Ruleset, f func(capture.Bypass) capture.Bypass) capture.Ruleset {
	out := capture.Ruleset{Dormant: r.Dormant, Counters: r.Counters}
	for _, c := range r.Chains {
		rules := c.Rules
		c.Rules = nil
		for _, rule := range rules {
			rule.Matches = slices.Clone(rule.Matches)
			for i, m := range rule.Matches {
				if own, ok := m.(capture.OwnSocket); ok {
					rule.Matches[i] = capture.OwnSocket{Cgroup: f(own.Cgroup)}
				}
			}
			c.Rules = append(c.Rules, rule)
		}
		out.Chains = append(out.Chains, c)
	}
	return out
}

// cgroupPath looks for the cgroup of a bypass at its depth, in the two places
// where the v2 hierarchy is mounted: alone, and beside v1 (hybrid).
func cgroupPath(b capture.Bypass) string {
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err != nil {
			continue
		}
		if path, ok := findInode(root, b); ok {
			return path
		}
	}
	return "(no such cgroup)"
}

func findInode(root string, b capture.Bypass) (string, bool) {
	found := ""
	// Errors mean that a cgroup went while it was looked at.
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		rel, err := filepath.Rel(root, path)
		if err != nil || rel == "." {
			return nil
		}
		if strings.Count(rel, "/")+1 < b.Level {
			return nil
		}
		if info, err := d.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Ino == b.ID {
				found = rel
				return filepath.SkipAll
			}
		}
		return filepath.SkipDir
	})
	return found, found != ""
}
