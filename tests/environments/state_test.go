package environments

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/tests/pod"
)

const attachments = pod.NodeDir + "/weir/attachments"

// TestWhatAnAgentKnewIsRebuilt: the agent's files are corrupt, or gone, when it
// starts again. Pods that have their proxies keep them, and their connections.
func TestWhatAnAgentKnewIsRebuilt(t *testing.T) {
	onNode(t)
	agent := agentOf(t, programs)
	chain := chained(t)
	client, server := start(t, chain, "rebuilt-client", nil), start(t, chain, "rebuilt-server", nil)
	// What the rules leave alone shows that the pod was found, not only its proxy.
	excluded := map[string]string{"weirmesh.io/exclude-outbound-ports": "5432"}
	for p, annotations := range map[*pod.Pod]map[string]string{client: excluded, server: nil} {
		if err := node.Write(p.Name+".yaml", p.Running(annotations)); err != nil {
			t.Fatal(err)
		}
	}
	address := echo(t, server)
	leavesAlone := func() error {
		rules, err := client.ShowRules(t.Context(), programs)
		if err == nil && !strings.Contains(rules.Rules, "5432") {
			err = fmt.Errorf("the rules are %s", rules.Rules)
		}
		return err
	}
	eventually(t, 5*time.Second, "the pod's annotation", leavesAlone)
	expectCaptured(t, client, server, address)
	lasting, err := dial(client, address)
	if err != nil {
		t.Fatal(err)
	}
	defer lasting.Close()
	proxies := map[*pod.Pod]int{client: proxyOf(t, client), server: proxyOf(t, server)}

	if err := agent.End(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	corrupt := filepath.Join(attachments, client.ContainerID+".json")
	if err := os.WriteFile(corrupt, []byte(`{"ContainerID": "re`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(attachments, server.ContainerID+".json")); err != nil {
		t.Fatal(err)
	}
	next := agentOf(t, programs)
	for p, pid := range proxies {
		if now := proxyOf(t, p); now != pid {
			t.Errorf("the proxy of %s was %d and is %d", p.ID(), pid, now)
		}
		eventually(t, 5*time.Second, "the pod to be found", func() error {
			if !strings.Contains(next.Log(), `msg="rebuilt attachment identified" container=`+p.ContainerID+" pod="+p.ID()) {
				return errors.New("nothing was logged of it")
			}
			return nil
		})
	}
	if kept, err := os.ReadFile(corrupt + ".bad"); err != nil || string(kept) != `{"ContainerID": "re` {
		t.Errorf("the corrupt file: %q, %v", kept, err)
	}
	if !strings.Contains(next.Log(), corrupt+".bad") {
		t.Error("the log does not say where the corrupt file is")
	}
	if err := talk(lasting); err != nil {
		t.Errorf("the connection that was there: %v", err)
	}
	expectCaptured(t, client, server, address)
	if err := leavesAlone(); err != nil {
		t.Errorf("after the rebuild: %v", err)
	}
	if err := chain.Check(t.Context(), client); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	// A proxy that dies is replaced on its own listeners, as ever.
	if err := syscall.Kill(proxies[server], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	expectCaptured(t, client, server, address)
	for p := range proxies {
		written, err := os.ReadFile(filepath.Join(attachments, p.ContainerID+".json"))
		if err != nil || !strings.Contains(string(written), `"PodName":"`+p.Name+`"`) {
			t.Errorf("what is written of %s: %s, %v", p.ID(), written, err)
		}
	}
	// And the runtime's DEL finds it.
	if err := chain.Del(t.Context(), client); err != nil {
		t.Error(err)
	}
	if pids, err := node.CgroupPIDs(client.ContainerID); err == nil {
		t.Errorf("after DEL: proxies %v", pids)
	}
}

// TestAPodWhoseProxyIsLostTooIsCapturedAnew: of what ran nothing is left but the
// rules.
func TestAPodWhoseProxyIsLostTooIsCapturedAnew(t *testing.T) {
	onNode(t)
	agent := agentOf(t, programs)
	chain := chained(t)
	client, server := start(t, chain, "anew-client", nil), start(t, chain, "anew-server", nil)
	for _, p := range []*pod.Pod{client, server} {
		if err := node.Write(p.Name+".yaml", p.Running(nil)); err != nil {
			t.Fatal(err)
		}
	}
	address := echo(t, server)
	expectCaptured(t, client, server, address)
	pid := proxyOf(t, client)
	if err := agent.End(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(attachments, client.ContainerID+".json"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	next := agentOf(t, programs)
	eventually(t, 5*time.Second, "the pod to be captured anew", func() error {
		if !strings.Contains(next.Log(), `msg="pod captured in place" pod=`+client.ID()) {
			return errors.New("nothing was logged of it")
		}
		return nil
	})
	expectCaptured(t, client, server, address)
	if pids, err := node.CgroupPIDs(client.ContainerID); err == nil {
		t.Errorf("the cgroup of before is still there, with %v", pids)
	}
}
