// Package nstest makes network namespaces and cgroups for tests, with what every
// suite needs to work in them. A namespace has no name anywhere: an open file
// holds it, so it is gone when the test process is, however that ends.
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
type NS struct{ file *os.File }

// New makes a namespace that lives until the end of the test. Tests without root
// are skipped.
func New(t testing.TB) *NS {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	n := new(NS)
	var err error
	onThread(func() {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			n.file, err = os.Open("/proc/thread-self/ns/net")
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.file.Close() })
	return n
}

// onThread runs f on a thread that ends with it, and is fit for nothing else.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		f()
	}()
	<-done
}

// Path names the namespace to this and other processes.
func (n *NS) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.FD()) }

// FD is a file descriptor of the namespace.
func (n *NS) FD() int { return int(n.file.Fd()) }

// Do runs f on a thread in the namespace: sockets it opens and processes it
// starts are there. It must not call t.FailNow.
func (n *NS) Do(f func()) {
	onThread(func() {
		if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
			panic(err) // or f would do to the host what is meant for the namespace
		}
		f()
	})
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
