package nft

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/weirmesh/weir/plugin/capture"
)

// named fills in the paths of bypass cgroups. One that is gone is said to be, as
// its rule matches nothing any more.
func named(r capture.Ruleset) capture.Ruleset {
	return r.MapBypass(func(b capture.Bypass) capture.Bypass {
		b.Path = cgroupPath(b)
		return b
	})
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
