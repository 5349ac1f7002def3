package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A machine's cgroup is one folder of that name in every hierarchy: on a host
// with cgroup v2 alone that is one, on a v1 or hybrid host about ten. Processes
// of the machine itself are in its "system" child, as v2 wants processes in
// leaves only; kubelet makes "kubepods" beside it.
const systemCgroup = "system"

// hierarchy is one mounted cgroup tree.
type hierarchy struct {
	mount string
	v2    bool
	cpus  bool // v1's cpuset: a new group takes no process before it has CPUs
}

// hierarchies reads what is mounted, seen from the root of each tree.
func hierarchies() ([]hierarchy, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var all []hierarchy
	scanner := bufio.NewScanner(file)
	for scanner.Scan() {
		// 36 25 0:31 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw
		before, after, ok := strings.Cut(scanner.Text(), " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(kind) < 3 || fields[3] != "/" {
			continue
		}
		options := strings.Split(kind[2], ",")
		switch kind[0] {
		case "cgroup2":
			all = append(all, hierarchy{mount: fields[4], v2: true})
		case "cgroup":
			all = append(all, hierarchy{mount: fields[4], cpus: slices.Contains(options, "cpuset")})
		}
	}
	if err := scanner.Err(); err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(all, func(h hierarchy) bool { return h.v2 }) {
		return nil, errors.New("no cgroup v2 is mounted (on a host with cgroup v1: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified)")
	}
	return all, nil
}

// makeCgroup creates the cgroup of a machine and its "system" child, and
// returns the latter's cgroup v2 folder: a process started in it can be found,
// and killed, whatever becomes of the process that started it.
func makeCgroup(name string) (string, error) {
	all, err := hierarchies()
	if err != nil {
		return "", err
	}
	system := ""
	for _, h := range all {
		for _, group := range []string{name, filepath.Join(name, systemCgroup)} {
			dir := filepath.Join(h.mount, group)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return "", fmt.Errorf("cgroup %s: %w", group, err)
			}
			if h.cpus {
				for _, key := range []string{"cpuset.cpus", "cpuset.mems"} {
					if err := inherit(dir, key); err != nil {
						return "", err
					}
				}
			}
		}
		if h.v2 {
			system = filepath.Join(h.mount, name, systemCgroup)
			if err := delegate(h.mount, filepath.Join(h.mount, name)); err != nil {
				return "", err
			}
		}
	}
	return system, nil
}

func inherit(dir, key string) error {
	value, err := os.ReadFile(filepath.Join(filepath.Dir(dir), key))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, key), value, 0o644)
}

// delegate hands every controller of a v2 tree down to a group's children. On a
// hybrid host there is none to hand.
func delegate(root, group string) error {
	available, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, controller := range strings.Fields(string(available)) {
		for _, dir := range []string{root, group} {
			if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0o644); err != nil {
				return fmt.Errorf("cgroup controller %s: %w", controller, err)
			}
		}
	}
	return nil
}

// joinCgroup moves a process to the machine's "system" group in the v1
// hierarchies; in v2 it was born there.
func joinCgroup(name string, pid int) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if h.v2 {
			continue
		}
		path := filepath.Join(h.mount, name, systemCgroup, "cgroup.procs")
		if err := os.WriteFile(path, []byte(strconv.Itoa(pid)), 0o644); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("move process %d: %w", pid, err)
		}
	}
	return nil
}

// killCgroup kills every process in the group (cgroup.kill: Linux 5.14).
func killCgroup(name string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if !h.v2 {
			continue
		}
		err := os.WriteFile(filepath.Join(h.mount, name, "cgroup.kill"), []byte("1"), 0o644)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// removeCgroup removes the group with all below it, waiting for the processes
// that were killed to be gone.
func removeCgroup(ctx context.Context, name string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	return poll(ctx, "cgroup "+name+" to be empty", func(context.Context) error {
		var last error
		for _, h := range all {
			if err := removeTree(filepath.Join(h.mount, name)); err != nil {
				last = err
			}
		}
		return last
	})
}

// removeTree is rmdir from the leaves up: a cgroup's files cannot be removed.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeTree(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}
