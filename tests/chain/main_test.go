package chain

import (
	"context"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/weirmesh/weir/tests/pod"
)

// namespace is where the captured pods of these tests are.
const namespace = "shop"

// Node, programs and agent that the tests of one run share. node is nil where the
// tests cannot run, for want of root.
var (
	node     *pod.Node
	programs pod.Binaries
	agent    *pod.Agent
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(pod.Main("chain", pod.BuildMore, ready, m.Run))
}

func ready(ctx context.Context, entered *pod.Node, found pod.Binaries) error {
	programs = found
	if err := entered.Write("namespace.yaml", pod.CapturedNamespace(namespace)); err != nil {
		return err
	}
	// The agent's memory is measured: let it follow what the agent holds closely.
	if err := os.Setenv("GOGC", "25"); err != nil {
		return err
	}
	var err error
	if agent, err = entered.StartAgent(ctx, programs, nil); err != nil {
		return err
	}
	node = entered
	return nil
}

// onNode skips a test that has no node; on failure the agent's last words follow.
func onNode(t *testing.T) {
	if node == nil {
		t.Skip("a node of one's own needs root")
	}
	t.Cleanup(func() {
		if t.Failed() {
			lines := strings.Split(agent.Log(), "\n")
			t.Logf("the end of the agent's log:\n%s", strings.Join(lines[max(0, len(lines)-20):], "\n"))
		}
	})
}

// pods writes the manifests of n pods, and returns them without namespaces.
func pods(t *testing.T, prefix string, n int) []*pod.Pod {
	t.Helper()
	var out []*pod.Pod
	var manifests []any
	for i := range n {
		p := &pod.Pod{Namespace: namespace, Name: fmt.Sprintf("%s-%d", prefix, i)}
		out, manifests = append(out, p), append(manifests, p.Manifest())
	}
	if err := node.Write(prefix+".yaml", manifests...); err != nil {
		t.Fatal(err)
	}
	return out
}

// sandbox gives a pod a namespace of its own and a container ID.
func sandbox(p *pod.Pod, id string) error {
	path, err := node.NewNamespace(id)
	p.ContainerID, p.Netns = id, path
	return err
}
