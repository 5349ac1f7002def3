package launch

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// nsfsMagic is the file system type of an open namespace (NSFS_MAGIC).
const nsfsMagic = 0x6e736673

// namespace is an open network namespace and the number that names it while it
// exists.
type namespace struct {
	*os.File
	inode uint64
}

// openNamespace opens a network namespace by path.
func openNamespace(path string) (namespace, error) {
	f, err := os.Open(path)
	if err != nil {
		return namespace{}, err
	}
	ns := namespace{File: f}
	var fs unix.Statfs_t
	var st unix.Stat_t
	err = unix.Fstatfs(int(f.Fd()), &fs)
	if err == nil {
		err = unix.Fstat(int(f.Fd()), &st)
	}
	if err != nil || fs.Type != nsfsMagic {
		f.Close()
		return namespace{}, fmt.Errorf("%s is not a namespace (anymore)", path)
	}
	if kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return namespace{}, fmt.Errorf("%s is not a network namespace", path)
	}
	ns.inode = st.Ino
	return ns, nil
}

// hostInode is the number of the namespace this agent runs in, the host's.
func hostInode() (uint64, error) {
	ns, err := openNamespace("/proc/self/ns/net")
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	return ns.inode, nil
}

// missing returns those of want that the namespace does not hold.
func (ns namespace) missing(want []netip.Addr) ([]netip.Addr, error) {
	have, err := ns.addresses()
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, w := range want {
		if !slices.Contains(have, w.Unmap()) {
			out = append(out, w)
		}
	}
	return out, nil
}

// do runs f on a thread that is in the namespace. The thread is never used
// again: it ends with its goroutine, locked.
func (ns namespace) do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter the pod's network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// hostNetnsPath turns the path the runtime named into where this agent sees it:
// what the host has in /run/netns (or /var/run/netns, the same) is at dir.
func hostNetnsPath(dir, path string) string {
	for _, prefix := range []string{"/run/netns/", "/var/run/netns/"} {
		if rest, ok := strings.CutPrefix(path, prefix); ok {
			return filepath.Join(dir, rest)
		}
	}
	return path
}

// runtimeNetnsPath is the reverse: where the host has what this agent sees at path.
func runtimeNetnsPath(dir, path string) string {
	if rest, ok := strings.CutPrefix(path, strings.TrimSuffix(dir, "/")+"/"); ok {
		return "/run/netns/" + rest
	}
	return path
}
