package environments

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirmesh/weir/tests/pod"
)

// TestAProxyOutlivesAnAgentInACgroupNamespaceOfItsOwn: the agent runs as a runtime
// runs it on a node with cgroup v2 alone, and is killed with its whole container.
// What this machine has of v2 is not mounted with nsdelegate, which is the machine's
// to say: there the kernel refuses to start a process across the namespace's border.
// Here, that it did not cross it shows in the namespace that the proxy is in.
func TestAProxyOutlivesAnAgentInACgroupNamespaceOfItsOwn(t *testing.T) {
	onNode(t)
	container, err := node.NewContainer("agent")
	if err != nil {
		t.Fatal(err)
	}
	contained := programs
	contained.Agent = filepath.Join(t.TempDir(), "weir-agent")
	if err := container.Wrapper(contained.Agent, programs.Agent); err != nil {
		t.Fatal(err)
	}
	agent := agentOf(t, contained)
	if ours, theirs := cgroupNS(t, os.Getpid()), cgroupNS(t, agent.PID()); ours == theirs {
		t.Fatalf("the agent is in the host's %s", ours)
	}

	chain := chained(t)
	client, server := start(t, chain, "cgroupns-client", nil), start(t, chain, "cgroupns-server", nil)
	address := echo(t, server)
	expectCaptured(t, client, server, address)
	proxies := map[*pod.Pod]int{}
	for _, p := range []*pod.Pod{client, server} {
		pid := proxyOf(t, p)
		proxies[p] = pid
		if ours, theirs := cgroupNS(t, os.Getpid()), cgroupNS(t, pid); ours != theirs {
			t.Errorf("the proxy of %s is in %s, the host's is %s", p.ID(), theirs, ours)
		}
		cgroups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(cgroups)) {
			if want := "/" + node.Name + "/" + p.ContainerID + "\n"; !strings.HasSuffix(line, want) {
				t.Errorf("the proxy of %s is in cgroup %q", p.ID(), line)
			}
		}
	}
	lasting, err := dial(client, address)
	if err != nil {
		t.Fatal(err)
	}
	defer lasting.Close()

	if err := container.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := agent.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := talk(lasting); err != nil {
		t.Errorf("the connection that was there: %v", err)
	}
	expectCaptured(t, client, server, address)

	next := agentOf(t, programs)
	if n := strings.Count(next.Log(), "proxy adopted"); n != len(proxies) {
		t.Errorf("%d proxies were adopted, want %d", n, len(proxies))
	}
	for p, pid := range proxies {
		if now := proxyOf(t, p); now != pid {
			t.Errorf("the proxy of %s was %d and is %d", p.ID(), pid, now)
		}
	}
	if err := talk(lasting); err != nil {
		t.Errorf("the connection that was there, with another agent: %v", err)
	}
	expectCaptured(t, client, server, address)
}

func cgroupNS(t *testing.T, pid int) string {
	t.Helper()
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	return ns
}
