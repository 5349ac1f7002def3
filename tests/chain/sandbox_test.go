package chain

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/tests/pod"
)

// reaped is how soon a sandbox that went without a DEL leaves nothing behind.
// FAULTS.md gives it five minutes.
const reaped = 20 * time.Second

// TestSandboxMadeAgain loses the DEL of a pod's sandbox and makes it another: the
// old one's DEL, when it comes late, touches nothing of the new one.
func TestSandboxMadeAgain(t *testing.T) {
	onNode(t)
	ctx := t.Context()
	chain, err := node.NewChain(programs.Folders(), nil)
	if err != nil {
		t.Fatal(err)
	}
	current := pods(t, "again", 1)[0]
	if err := cycle(ctx, chain, current, "again-first"); err != nil {
		t.Fatal(err)
	}
	before := settled(t, nil)

	if err := errors.Join(sandbox(current, "again-old"), chain.Add(ctx, current)); err != nil {
		t.Fatal(err)
	}
	old := *current
	ofOld := proxyOf(t, old.ContainerID)
	if err := answers(&old); err != nil {
		t.Fatalf("the control: %v", err)
	}
	if err := node.RemoveNamespace(old.Netns); err != nil { // by a runtime that died then
		t.Fatal(err)
	}
	if err := errors.Join(sandbox(current, "again-new"), chain.Add(ctx, current)); err != nil {
		t.Fatal(err)
	}
	ofNew := proxyOf(t, current.ContainerID)
	if ofNew == ofOld {
		t.Errorf("the old sandbox's proxy (pid %d) serves the new one", ofOld)
	}
	rules, err := current.ShowRules(ctx, programs)
	if err != nil || rules.Rules == "" {
		t.Fatalf("rules %+v, %v", rules, err)
	}

	lost := time.Now()
	for {
		_, gone := node.CgroupPIDs(old.ContainerID)
		if gone != nil && answers(&old) != nil {
			break
		}
		if time.Since(lost) > reaped {
			t.Fatalf("%s after its namespace went, the old sandbox's proxy is gone: %v, and its address answers: %v", reaped, gone != nil, answers(&old) == nil)
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Logf("the old sandbox was reaped after %s", time.Since(lost).Round(time.Millisecond))

	if err := chain.Del(ctx, &old); err != nil {
		t.Errorf("the late DEL: %v", err)
	}
	if now := proxyOf(t, current.ContainerID); now != ofNew {
		t.Errorf("after the old sandbox's DEL the new one's proxy is %d, it was %d", now, ofNew)
	}
	if now, err := current.ShowRules(ctx, programs); err != nil || now.Rules != rules.Rules {
		t.Errorf("after the old sandbox's DEL the new one's rules are %+v, %v", now, err)
	}
	if err := errors.Join(chain.Del(ctx, current), node.RemoveNamespace(current.Netns)); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(before, settled(t, &before)); diff != "" {
		t.Errorf("left (-before, +after):\n%s", diff)
	}
}

// answers dials a pod where nobody listens: whoever has the address refuses.
func answers(p *pod.Pod) error {
	conn, err := net.DialTimeout("tcp", net.JoinHostPort(p.Address(false).String(), "9"), time.Second)
	if err == nil {
		conn.Close()
	}
	if err == nil || strings.Contains(err.Error(), "refused") {
		return nil
	}
	return err
}

// proxyOf is a sandbox's one proxy.
func proxyOf(t *testing.T, id string) int {
	t.Helper()
	pids, err := node.CgroupPIDs(id)
	if err != nil || len(pids) != 1 {
		t.Fatalf("proxies of %s: %v, %v, want one", id, pids, err)
	}
	return pids[0]
}

// TestSandboxAddedTogether runs the plugin several times at once for one container,
// as a runtime does that gave up on an ADD and repeats it.
func TestSandboxAddedTogether(t *testing.T) {
	onNode(t)
	bare, err := node.NewBareChain(programs.Folders())
	if err != nil {
		t.Fatal(err)
	}
	p := pods(t, "together", 1)[0]
	if err := errors.Join(sandbox(p, p.Name), bare.Add(t.Context(), p)); err != nil {
		t.Fatal(err)
	}
	const together = 6
	failed := make([]error, together)
	var group sync.WaitGroup
	for i := range together {
		group.Go(func() { failed[i] = runPlugin(t, "ADD", p) })
	}
	group.Wait()
	if err := errors.Join(failed...); err != nil {
		t.Error(err)
	}
	proxyOf(t, p.ContainerID)
	if err := runPlugin(t, "CHECK", p); err != nil {
		t.Errorf("after all of them: %v", err)
	}
	if err := errors.Join(runPlugin(t, "DEL", p), bare.Del(t.Context(), p), node.RemoveNamespace(p.Netns)); err != nil {
		t.Error(err)
	}
	if pids, err := node.CgroupPIDs(p.ContainerID); err == nil {
		t.Errorf("after one DEL the proxies %v run", pids)
	}
}

// runPlugin runs weir-cni alone, behind a primary that has run.
func runPlugin(t *testing.T, command string, p *pod.Pod) error {
	type object = map[string]any
	var ips []object
	for _, a := range p.Addresses {
		ips = append(ips, object{"address": fmt.Sprintf("%s/%d", a, a.BitLen()), "interface": 0})
	}
	conf, err := json.Marshal(object{
		"cniVersion": "1.1.0", "name": "weir-pods", "type": "weir-cni",
		"prevResult": object{
			"cniVersion": "1.1.0", "ips": ips,
			"interfaces": []object{{"name": "eth0", "sandbox": p.Netns}},
		},
	})
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(t.Context(), programs.Plugin)
	cmd.Env = slices.Concat(cmd.Environ(), []string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + p.ContainerID, "CNI_NETNS=" + p.Netns, "CNI_IFNAME=eth0", "CNI_PATH=" + programs.CNI,
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=" + p.Namespace + ";K8S_POD_NAME=" + p.Name,
	})
	cmd.Stdin = bytes.NewReader(conf)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return nil
}
