package interop

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/tests/pod"
)

// nobody is the user, and the group, that servers run as.
const nobody = 65534

// program is one that runs in a pod. Where it is not known, its package is to be
// installed: .ci/packages does that.
func program(ctx context.Context, t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	path := name
	if !filepath.IsAbs(name) {
		var err error
		if path, err = exec.LookPath(name); err != nil {
			t.Fatalf("%v: make packages installs it", err)
		}
	}
	return exec.CommandContext(ctx, path, args...)
}

// startIn starts a program in a pod.
func startIn(p *pod.Pod, cmd *exec.Cmd) error { return pod.In(p.Netns, cmd.Start) }

// serve runs a server in a pod, as nobody, until the test ends.
func serve(t *testing.T, p *pod.Pod, name string, args ...string) {
	t.Helper()
	serveAs(t, p, nobody, name, args...)
}

// serveAs is serve, as another user. What the server said follows a failure.
func serveAs(t *testing.T, p *pod.Pod, uid uint32, name string, args ...string) {
	t.Helper()
	cmd := program(context.Background(), t, name, args...)
	cmd.SysProcAttr = as(uid)
	cmd.Dir = "/"
	said := &output{}
	cmd.Stdout, cmd.Stderr = said, said
	cmd.WaitDelay = time.Second // its children may hold the output
	if err := startIn(p, cmd); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // it is killed
	}()
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
		if t.Failed() {
			t.Logf("what %s said:\n%s", name, said)
		}
	})
}

// as has a program run as that user, in a process group of its own.
func as(uid uint32) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}, Setpgid: true}
}

// output is what a program says while it runs.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// clientTimeout is how long a client may take, on a machine that is busy.
const clientTimeout = 40 * time.Second

// call runs a client in caller to its end and returns what it wrote to its
// standard output. stdin may be nil.
func call(t *testing.T, stdin io.Reader, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), clientTimeout)
	defer cancel()
	cmd := program(ctx, t, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	cmd.Env = append(os.Environ(), "HOME="+pod.NodeDir)
	err := startIn(caller, cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = errors.Join(err, ctx.Err(), errors.New(strings.TrimSpace(stderr.String())))
	}
	return stdout.String(), err
}

// mustCall is call of a client that must not fail.
func mustCall(t *testing.T, stdin io.Reader, name string, args ...string) string {
	t.Helper()
	out, err := call(t, stdin, name, args...)
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return out
}

// address is a host and a port, as command lines have them.
type address struct{ host, port string }

func addressOf(a netip.AddrPort) address {
	return address{host: a.Addr().String(), port: strconv.Itoa(int(a.Port()))}
}
