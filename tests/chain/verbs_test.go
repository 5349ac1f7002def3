package chain

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/tests/pod"
)

// TestEveryVerbInEveryVersion drives the chain by libcni, as a runtime does. A
// verb that a version does not have, libcni refuses by itself.
func TestEveryVerbInEveryVersion(t *testing.T) {
	onNode(t)
	for _, c := range []struct {
		version            string
		check, gcAndStatus bool
	}{
		{"0.3.1", false, false},
		{"0.4.0", true, false},
		{"1.0.0", true, false},
		{"1.1.0", true, true},
	} {
		t.Run(c.version, func(t *testing.T) {
			ctx := t.Context()
			chain, err := node.NewChainIn(c.version, programs.Folders())
			if err != nil {
				t.Fatal(err)
			}
			ps := pods(t, "verbs-"+strings.ReplaceAll(c.version, ".", "-"), 2)
			p, forgotten := ps[0], ps[1]
			// What the first pod of a node brings, the bridge, stays.
			if err := cycle(ctx, chain, p, p.Name+"-first"); err != nil {
				t.Fatal(err)
			}
			before := settled(t, nil)
			if err := sandbox(p, p.Name); err != nil {
				t.Fatal(err)
			}

			status := chain.Status(ctx)
			if c.gcAndStatus && status != nil {
				t.Errorf("a ready agent: %v", status)
			}

			if err := chain.Add(ctx, p); err != nil {
				t.Fatal(err)
			}
			if len(p.Addresses) != 2 {
				t.Errorf("the result that is passed on has the addresses %v, want one of each family", p.Addresses)
			}
			rules, err := p.ShowRules(ctx, programs)
			if err != nil || rules.Rules == "" {
				t.Errorf("after ADD: rules %+v, %v", rules, err)
			}
			if pids, err := node.CgroupPIDs(p.ContainerID); err != nil || len(pids) != 1 {
				t.Errorf("after ADD: proxies %v, %v", pids, err)
			}

			check := chain.Check(ctx, p)
			switch {
			case c.check && check != nil:
				t.Errorf("as ADD left it: %v", check)
			case !c.check && !errors.Is(check, libcni.ErrorCheckNotSupp):
				t.Errorf("CHECK is of 0.4.0: %v", check)
			}

			if err := errors.Join(sandbox(forgotten, forgotten.Name), chain.Add(ctx, forgotten)); err != nil {
				t.Fatal(err)
			}
			if err := chain.GC(ctx, p); err != nil {
				t.Error(err)
			}
			if pids, err := node.CgroupPIDs(forgotten.ContainerID); err == nil {
				t.Errorf("GC left the proxies %v of a pod that it was not told of", pids)
			}
			if err := node.RemoveNamespace(forgotten.Netns); err != nil {
				t.Error(err)
			}
			if now, err := p.ShowRules(ctx, programs); err != nil || now.Rules != rules.Rules {
				t.Errorf("GC changed a pod that is there: %+v, %v", now, err)
			}

			for _, which := range []string{"the first", "a repeated"} {
				if err := chain.Del(ctx, p); err != nil {
					t.Errorf("%s DEL: %v", which, err)
				}
			}
			if err := node.RemoveNamespace(p.Netns); err != nil {
				t.Fatal(err)
			}
			if err := chain.Del(ctx, p); err != nil {
				t.Errorf("DEL without the namespace: %v", err)
			}
			if diff := cmp.Diff(before, settled(t, &before)); diff != "" {
				t.Errorf("left after DEL (-before, +after):\n%s", diff)
			}
		})
	}
}

// TestFailuresHaveACode shows what a runtime is told, beside the same call
// that succeeds above.
func TestFailuresHaveACode(t *testing.T) {
	onNode(t)
	chain, err := node.NewChain(programs.Folders(), nil)
	if err != nil {
		t.Fatal(err)
	}
	fails := func(err error, want attachpb.Code) {
		t.Helper()
		var said *types.Error
		if !errors.As(err, &said) || said.Code != want.CNI || !strings.Contains(said.Msg, want.ID) {
			t.Errorf("%v, want %s with code %d", err, want.ID, want.CNI)
		}
	}

	nobody := &pod.Pod{Namespace: namespace, Name: "nobody"}
	if err := sandbox(nobody, "nobody"); err != nil {
		t.Fatal(err)
	}
	fails(chain.Add(t.Context(), nobody), attachpb.PodUnknown)
	if err := errors.Join(chain.Del(t.Context(), nobody), node.RemoveNamespace(nobody.Netns)); err != nil {
		t.Error(err)
	}

	const marker, aside = pod.NodeDir + "/weir/ready", pod.NodeDir + "/weir/ready.aside"
	if err := os.Rename(marker, aside); err != nil {
		t.Fatal(err)
	}
	fails(chain.Status(t.Context()), attachpb.NotReady)
	if err := os.Rename(aside, marker); err != nil {
		t.Fatal(err)
	}
	if err := chain.Status(t.Context()); err != nil {
		t.Error(err)
	}
}
