package launch_test

import (
	"context"
	"log/slog"
	"os/exec"
	"strings"
	"testing"

	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/repair"
	"github.com/weirmesh/weir/plugin/capture/nstest"
)

// TestAPodThatEndsHasNoDrift: what a runtime undoes, once a sandbox's processes have
// ended, is put right like any drift, as there is no telling how soon a DEL comes, but
// nobody hears of it. Of a pod that runs they do.
func TestAPodThatEndsHasNoDrift(t *testing.T) {
	n := newNode(t)
	ns, req := n.sandbox("c-1")
	a := n.start(req)
	apply := []launch.Task{{Netns: a.Netns, Do: launch.Apply, Spec: a.Spec}}
	if done, err := n.manager.Rules(t.Context(), apply); err != nil || done[0].Err() != nil {
		t.Fatalf("%v, %v", done, err)
	}
	if err := n.manager.Commit("c-1"); err != nil {
		t.Fatal(err)
	}
	pause := startIn(t, ns)
	if n.manager.PodEnded("c-1") {
		t.Error("a pod with a process has ended")
	}
	said := loAfterRound(t, n, ns)
	if want := "counted, DriftRepaired lo is down"; said != want {
		t.Errorf("of a pod that runs: %q, want %q", said, want)
	}
	pause()
	if !n.manager.PodEnded("c-1") {
		t.Error("a pod whose proxy is all there is runs")
	}
	if said := loAfterRound(t, n, ns); said != "" {
		t.Errorf("of a pod that ends: %q", said)
	}
	n.manager.End("c-1", "")
	if !n.manager.PodEnded("c-1") {
		t.Error("a pod without an attachment runs")
	}
}

// startIn starts a process in the namespace, and returns what ends it.
func startIn(t *testing.T, ns *nstest.NS) func() {
	cmd := exec.Command("sleep", "600")
	var err error
	ns.Do(func() { err = cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	end := func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	t.Cleanup(end)
	return end
}

// loAfterRound sets lo down, has it set up by a round of repair, and returns what that
// said.
func loAfterRound(t *testing.T, n *node, ns *nstest.NS) string {
	ns.Run(t, "ip", "link", "set", "lo", "down")
	var said strings.Builder
	loop := &repair.Loop{
		View: nothing{}, Proxies: n.manager, Current: func() bool { return false }, Log: slog.New(slog.DiscardHandler),
		Event: func(_ model.Pod, _, reason, message string) {
			_, difference, _ := strings.Cut(message, "put right: ")
			said.WriteString(reason + " " + difference)
		},
		Count: func(_ string, err error) {
			if err != nil {
				t.Error(err)
			}
			said.WriteString("counted, ")
		},
	}
	ctx, cancel := context.WithCancel(t.Context())
	ran, changed := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ran)
		loop.Run(ctx, changed)
	}()
	changed <- struct{}{} // received after the first round
	cancel()
	<-ran
	if state := ns.Run(t, "ip", "link", "show", "lo"); !strings.Contains(state, ",UP") {
		t.Errorf("lo stays down: %s", state)
	}
	return said.String()
}

type nothing struct{}

func (nothing) Pods() []model.Pod                { return nil }
func (nothing) Namespace(string) model.Namespace { return model.Namespace{} }
