package environments

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/tests/pod"
)

// TestProxiesRunWhereNothingOfTheHostMayBeExecuted: from one copy in memory, which
// goes on when the agent that made it does not.
func TestProxiesRunWhereNothingOfTheHostMayBeExecuted(t *testing.T) {
	onNode(t)
	for _, c := range []struct {
		name   string
		flags  uintptr
		memory bool
	}{
		{"usual", 0, false}, // the control
		{"noexec", unix.MS_NOEXEC, true},
		{"readonly", unix.MS_RDONLY, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(pod.NodeDir, "proxies-"+c.name)
			if err := errors.Join(os.Mkdir(dir, 0o755), unix.Mount("tmpfs", dir, "tmpfs", c.flags, "")); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
					t.Error(err)
				}
			})
			agent := agentOf(t, programs, "--proxy-dir", dir)
			chain := chained(t)
			client, server := start(t, chain, c.name+"-client", nil), start(t, chain, c.name+"-server", nil)
			address := echo(t, server)
			expectCaptured(t, client, server, address)

			ofClient, ofServer := program(t, proxyOf(t, client)), program(t, proxyOf(t, server))
			if ofClient != ofServer {
				t.Errorf("two programs: %+v and %+v", ofClient, ofServer)
			}
			if got := strings.HasPrefix(ofClient.path, "/memfd:weir-proxy-"); got != c.memory {
				t.Errorf("the proxy runs %s", ofClient.path)
			}
			if err := agent.End(syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			expectCaptured(t, client, server, address)
			agentOf(t, programs, "--proxy-dir", dir)
			if err := syscall.Kill(proxyOf(t, server), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			expectCaptured(t, client, server, address)
		})
	}
}

// executable is what a process executes.
type executable struct {
	path          string
	device, inode uint64
}

func program(t *testing.T, pid int) executable {
	t.Helper()
	link := fmt.Sprintf("/proc/%d/exe", pid)
	path, err := os.Readlink(link)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(link, &st); err != nil {
		t.Fatal(err)
	}
	return executable{path, st.Dev, st.Ino}
}
