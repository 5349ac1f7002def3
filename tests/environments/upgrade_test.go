package environments

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/tests/pod"
)

// TestAProxyThatIsAskedToEndIsFollowedAtOnce: new connections are the next one's while the
// one before has connections left, and it ends with the last of these; with an agent that
// starts again meanwhile, and does not know one of the pods any more, or another proxy that
// is asked to.
func TestAProxyThatIsAskedToEndIsFollowedAtOnce(t *testing.T) {
	onNode(t)
	agent := agentOf(t, programs)
	client, server, address := twoPods(t, "upgraded")
	pods := []*pod.Pod{client, server}
	if err := node.Write(server.Name+".yaml", server.Running(nil)); err != nil { // by this it is found
		t.Fatal(err)
	}
	first := dialed(t, client, server, address)
	askToEnd(t, pods, 1)
	second := dialed(t, client, server, address)

	if err := agent.End(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	before := proxiesOf(t, pods, 2)
	if err := os.Remove(filepath.Join(attachments, server.ContainerID+".json")); err != nil {
		t.Fatal(err)
	}
	agentOf(t, programs)
	for i, now := range proxiesOf(t, pods, 2) {
		if !slices.Equal(now, before[i]) {
			t.Errorf("the proxies of %s were %v and are %v", pods[i].ID(), before[i], now)
		}
	}
	third := dialed(t, client, server, address)
	signalNewest(t, pods, 2, syscall.SIGKILL) // their listeners came back to the agent
	fourth := dialed(t, client, server, address)
	if err := talk(first); err != nil {
		t.Errorf("the first connection: %v", err)
	}
	for i, conn := range []net.Conn{second, third} {
		if err := talk(conn); err == nil {
			t.Errorf("connection %d has outlived its proxy", i+2)
		}
	}
	askToEnd(t, pods, 2)
	fifth := dialed(t, client, server, address)
	for i, conn := range []net.Conn{first, fourth, fifth} {
		if err := talk(conn); err != nil {
			t.Errorf("of three generations' connections, number %d: %v", i+1, err)
		}
	}
	first.Close()
	fourth.Close()
	proxiesOf(t, pods, 1)
	if err := talk(fifth); err != nil {
		t.Errorf("the last connection: %v", err)
	}
}

// TestAnOlderProxyGoesOnThoughTheNewestHasDiedWithoutAnAgent: and callers wait for the
// next one.
func TestAnOlderProxyGoesOnThoughTheNewestHasDiedWithoutAnAgent(t *testing.T) {
	onNode(t)
	agent := agentOf(t, programs)
	client, server, address := twoPods(t, "older")
	pods := []*pod.Pod{client, server}
	first := dialed(t, client, server, address)
	askToEnd(t, pods, 1)
	dialed(t, client, server, address)
	if err := agent.End(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	signalNewest(t, pods, 2, syscall.SIGKILL)
	proxiesOf(t, pods, 1)
	agentOf(t, programs)
	dialed(t, client, server, address)
	if err := talk(first); err != nil {
		t.Errorf("the connection of the older proxies: %v", err)
	}
	first.Close()
	proxiesOf(t, pods, 1)
	expectCaptured(t, client, server, address)
}

// TestAReleasedPodIsLetGoOnceAllItsProxiesHaveEnded: one of them had been asked to before.
func TestAReleasedPodIsLetGoOnceAllItsProxiesHaveEnded(t *testing.T) {
	onNode(t)
	agentOf(t, programs)
	client, server, address := twoPods(t, "let-go")
	first := dialed(t, client, server, address)
	askToEnd(t, []*pod.Pod{client}, 1)
	second := dialed(t, client, server, address)
	if err := node.Write(client.Name+".yaml", disabled(t, client)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = node.Write(client.Name+".yaml", client.Manifest()) }) // for when it is run again
	eventually(t, 10*time.Second, "the pod to be released", func() error {
		rules, err := client.ShowRules(t.Context(), programs)
		if _, turns := rules.Counters["out_turned"]; err == nil && turns {
			err = fmt.Errorf("connections are turned aside: %+v", rules.Counters)
		}
		return err
	})
	second.Close()
	proxiesOf(t, []*pod.Pod{client}, 1)
	for range 50 { // what would end it may take a moment
		if err := talk(first); err != nil {
			t.Fatalf("the connection that is left: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	first.Close()
	eventually(t, 10*time.Second, "the pod to be let go", func() error {
		if pids, err := node.CgroupPIDs(client.ContainerID); err == nil {
			return fmt.Errorf("proxies %v run", pids)
		}
		return nil
	})
}

// dialed is a connection that was turned aside in both pods. It ends with the test.
func dialed(t *testing.T, from, to *pod.Pod, addr netip.AddrPort) net.Conn {
	t.Helper()
	expectCaptured(t, from, to, addr)
	conn, err := dial(from, addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// askToEnd asks the newest proxy of each pod to end, of so many, and returns when there is
// one more.
func askToEnd(t *testing.T, pods []*pod.Pod, of int) {
	t.Helper()
	signalNewest(t, pods, of, syscall.SIGTERM)
	proxiesOf(t, pods, of+1)
}

// signalNewest signals the newest proxy of each pod, once it has so many.
func signalNewest(t *testing.T, pods []*pod.Pod, of int, signal syscall.Signal) {
	t.Helper()
	for _, pids := range proxiesOf(t, pods, of) {
		if err := syscall.Kill(slices.Max(pids), signal); err != nil {
			t.Fatal(err)
		}
	}
}

// twoPods are a client and a server whose names begin so, and where the server answers.
func twoPods(t *testing.T, name string) (*pod.Pod, *pod.Pod, netip.AddrPort) {
	t.Helper()
	chain := chained(t)
	client, server := start(t, chain, name+"-client", nil), start(t, chain, name+"-server", nil)
	return client, server, echo(t, server)
}

// proxiesOf waits until each pod has so many proxies, and returns them.
func proxiesOf(t *testing.T, pods []*pod.Pod, n int) [][]int {
	t.Helper()
	all := make([][]int, len(pods))
	for i, p := range pods {
		eventually(t, 10*time.Second, fmt.Sprintf("%d proxies of %s", n, p.ID()), func() error {
			pids, err := node.CgroupPIDs(p.ContainerID)
			if err == nil && len(pids) != n {
				err = fmt.Errorf("%v run", pids)
			}
			all[i] = pids
			return err
		})
	}
	return all
}

// disabled is a pod that is not to be captured.
func disabled(t *testing.T, p *pod.Pod) any {
	t.Helper()
	b, err := json.Marshal(p.Running(nil))
	if err != nil {
		t.Fatal(err)
	}
	var out map[string]any
	if err := json.Unmarshal(b, &out); err != nil {
		t.Fatal(err)
	}
	out["metadata"].(map[string]any)["labels"] = map[string]string{"weirmesh.io/capture": "disabled"}
	return out
}
