// Package nstest makes network namespaces for tests, which go by themselves: a
// namespace lives as long as the thread that is in it, has no name anywhere, and
// ends with the test process, however that ends.
package nstest

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// NS is a fresh network namespace.
type NS struct {
	path string
	work chan func()
}

// New makes a namespace that lives until the end of the test. Tests without root
// are skipped.
func New(t testing.TB) *NS {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	n := &NS{work: make(chan func())}
	started := make(chan error)
	done := make(chan struct{})
	go n.serve(started, done)
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		close(n.work)
		<-done
	})
	return n
}

// serve runs work on a thread of its own, which is never unlocked: it ends with
// the goroutine, as it is not fit for any other.
func (n *NS) serve(started chan<- error, done chan<- struct{}) {
	defer close(done)
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		started <- fmt.Errorf("unshare: %w", err)
		return
	}
	n.path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
	started <- nil
	for f := range n.work {
		f()
	}
}

// Path names the namespace to this and other processes.
func (n *NS) Path() string { return n.path }

// Do runs f on a thread in the namespace: sockets it opens and processes it
// starts are there. It must not call Do, nor t.FailNow.
func (n *NS) Do(f func()) {
	done := make(chan struct{})
	n.work <- func() {
		defer close(done)
		f()
	}
	<-done
}

// Run runs a command in the namespace and returns what it wrote. Its failure is
// the test's.
func (n *NS) Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := n.Try(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Try is Run for commands that may fail.
func (n *NS) Try(name string, args ...string) (string, error) {
	var out []byte
	var err error
	n.Do(func() { out, err = exec.Command(name, args...).CombinedOutput() })
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// FD opens the namespace for the rest of the test.
func (n *NS) FD(t testing.TB) int {
	t.Helper()
	f, err := os.Open(n.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}
