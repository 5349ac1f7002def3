package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// process is one process of this machine, of whichever node.
type process struct {
	pid     int
	args    []string
	netns   uint64   // inode of its network namespace
	cgroups []string // its path in each hierarchy
}

// processes lists all that run and are not kernel threads.
func processes() ([]process, error) {
	folders, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var all []process
	for _, folder := range folders {
		p, err := readProcess(folder)
		switch {
		case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ESRCH):
			continue // it ended meanwhile
		case errors.Is(err, os.ErrPermission):
			continue // a supervisor of the machine's may be hidden even from root; nodes' are not
		case err != nil:
			return nil, err
		case len(p.args) > 0:
			all = append(all, p)
		}
	}
	return all, nil
}

func readProcess(folder string) (process, error) {
	pid, err := strconv.Atoi(filepath.Base(folder))
	if err != nil {
		return process{}, err
	}
	p := process{pid: pid}
	args, err := os.ReadFile(filepath.Join(folder, "cmdline"))
	if err != nil || len(args) == 0 {
		return p, err
	}
	p.args = strings.Split(string(bytes.TrimRight(args, "\x00")), "\x00")
	if p.netns, err = inode(filepath.Join(folder, "ns", "net")); err != nil {
		return p, err
	}
	cgroups, err := os.ReadFile(filepath.Join(folder, "cgroup"))
	if err != nil {
		return p, err
	}
	for line := range strings.Lines(string(cgroups)) {
		// hierarchy:controllers:path, cgroups(7)
		if fields := strings.SplitN(strings.TrimSpace(line), ":", 3); len(fields) == 3 {
			p.cgroups = append(p.cgroups, fields[2])
		}
	}
	return p, nil
}

// isProxy reports whether the process is a weir-proxy, by what it calls itself.
func (p process) isProxy() bool { return filepath.Base(p.args[0]) == "weir-proxy" }

// isPause reports whether the process is the one that holds a pod's sandbox.
func (p process) isPause() bool { return filepath.Base(p.args[0]) == "pause" }

// in reports whether a cgroup of that name is in the path of one of its own.
func (p process) in(name string) bool {
	for _, path := range p.cgroups {
		if strings.Contains(path+"/", "/"+name+"/") {
			return true
		}
	}
	return false
}

// path is a file of the process's in /proc.
func (p process) path(parts ...string) string {
	return filepath.Join(append([]string{"/proc", strconv.Itoa(p.pid)}, parts...)...)
}

// status reads the process's status(5) as fields of a name.
func (p process) status() (map[string][]string, error) {
	content, err := os.ReadFile(p.path("status"))
	if err != nil {
		return nil, err
	}
	status := map[string][]string{}
	for line := range strings.Lines(string(content)) {
		if name, value, ok := strings.Cut(line, ":"); ok {
			status[name] = strings.Fields(value)
		}
	}
	return status, nil
}

// kill sends SIGKILL, and returns when the process has ended: until then it may accept
// connections still.
func (p process) kill() error {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil {
		return fmt.Errorf("pid %d: %w", p.pid, err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		return fmt.Errorf("pid %d: %w", p.pid, err)
	}
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// end sends SIGTERM.
func (p process) end() error { return unix.Kill(p.pid, unix.SIGTERM) }

// inode is the number of the file behind a path.
func inode(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return st.Ino, nil
}
