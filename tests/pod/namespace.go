package pod

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"
)

// netnsDir is where a node's network namespaces are, as container runtimes have
// them.
const netnsDir = NodeDir + "/netns"

// NewNamespace makes a network namespace, empty but for a lo that is down, and
// returns its path.
func (n *Node) NewNamespace(name string) (string, error) {
	path := filepath.Join(netnsDir, name)
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return "", fmt.Errorf("network namespace: %w", err)
	}
	file.Close()
	done := make(chan error, 1)
	go unshareTo(path, done)
	if err := <-done; err != nil {
		return "", errors.Join(fmt.Errorf("network namespace %s: %w", name, err), os.Remove(path))
	}
	return path, nil
}

// unshareTo puts the calling thread into a new network namespace and pins that
// to path. The thread ends with the goroutine, as it stays locked.
func unshareTo(path string, done chan<- error) {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		done <- err
		return
	}
	done <- unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
}

// RemoveNamespace lets go of a namespace that NewNamespace made. It ends when
// nothing else holds it.
func (n *Node) RemoveNamespace(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	return os.Remove(path)
}

// In runs f in a network namespace: on a thread that is in it, which f must not
// leave. Processes that f starts, and sockets it opens, are there for good.
func In(path string, f func() error) error {
	return ns.WithNetNSPath(path, func(ns.NetNS) error { return f() })
}
