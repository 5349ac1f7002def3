package controller

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func taint(key string, effect corev1.TaintEffect) corev1.Taint {
	return corev1.Taint{Key: key, Effect: effect}
}

// aNode registered at noon.
func aNode(name string, taints ...corev1.Taint) *corev1.Node {
	n := &corev1.Node{}
	n.Name, n.ResourceVersion, n.CreationTimestamp = name, "7", metav1.NewTime(noon)
	n.Spec.Taints = taints
	return n
}

// aPod is an agent's, made and ready some time after noon.
func aPod(name, node string, made, ready time.Duration) *corev1.Pod {
	p := &corev1.Pod{}
	p.Namespace, p.Name, p.CreationTimestamp = "weir-system", name, metav1.NewTime(noon.Add(made))
	p.Labels = map[string]string{"app": "weir-agent"}
	p.Spec.NodeName = node
	p.Status.Conditions = []corev1.PodCondition{
		{Type: corev1.ContainersReady, Status: corev1.ConditionTrue},
		{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(noon.Add(ready))},
	}
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "agent", Ready: true}, {Name: "install", Ready: true}}
	return p
}

func with[T any](o *T, change func(*T)) *T {
	change(o)
	return o
}

func notReady(p *corev1.Pod) {
	p.Status.Conditions[1].Status = corev1.ConditionFalse
}

func ending(p *corev1.Pod) { p.DeletionTimestamp = new(metav1.NewTime(noon)) }

func TestJudge(t *testing.T) {
	tainted := aNode("n1", taint(NotReadyTaint, corev1.TaintEffectNoSchedule))
	ready := func(name string) *corev1.Pod { return aPod(name, "n1", time.Second, 9*time.Second) }
	for _, tt := range []struct {
		name   string
		node   *corev1.Node
		pods   []*corev1.Pod
		remove bool
		why    string
	}{
		{"no agent yet", tainted, nil, false, "no pod of the agent's DaemonSet is on the node yet"},
		{"ready", tainted, []*corev1.Pod{ready("a")}, true, "pod weir-system/a is ready"},
		{"running, not ready", tainted, []*corev1.Pod{with(ready("a"), notReady)}, false, "pod weir-system/a: it is not ready"},
		{
			"not reported yet", tainted, []*corev1.Pod{with(ready("a"), func(p *corev1.Pod) { p.Status = corev1.PodStatus{} })},
			false, "pod weir-system/a: its container install is not ready",
		},
		{
			"the agent serves, the chain is without Weir", tainted,
			[]*corev1.Pod{with(ready("a"), func(p *corev1.Pod) { p.Status.ContainerStatuses[1].Ready = false })},
			false, "pod weir-system/a: its container install is not ready",
		},
		{
			"chained, the agent does not serve", tainted,
			[]*corev1.Pod{with(ready("a"), func(p *corev1.Pod) { p.Status.ContainerStatuses[0].Ready = false })},
			false, "pod weir-system/a: its container agent is not ready",
		},
		{
			"ready, but a pod of the uninstall, which has no installer", tainted,
			[]*corev1.Pod{with(ready("a"), func(p *corev1.Pod) { p.Status.ContainerStatuses = p.Status.ContainerStatuses[:1] })},
			false, "pod weir-system/a: its container install is not ready",
		},
		{"ending", tainted, []*corev1.Pod{with(ready("a"), ending)}, false, "pod weir-system/a is ending, and another not ready yet"},
		{"one ends, the next is ready", tainted, []*corev1.Pod{with(ready("a"), ending), ready("b")}, true, "pod weir-system/b is ready"},
		{"one is not ready, the next is", tainted, []*corev1.Pod{with(ready("a"), notReady), ready("b")}, true, "pod weir-system/b is ready"},
		{
			"of an earlier machine of that name", tainted, []*corev1.Pod{aPod("a", "n1", -time.Hour, -50*time.Minute)},
			false, "pod weir-system/a was ready before the node registered; if it does run there, delete it: the next one counts",
		},
		{
			"of an earlier machine, ready again on this one", tainted, []*corev1.Pod{aPod("a", "n1", -time.Hour, 30*time.Second)},
			true, "pod weir-system/a is ready",
		},
		{
			"the node's clock is ten minutes slow", tainted, []*corev1.Pod{aPod("a", "n1", time.Second, -10*time.Minute)},
			true, "pod weir-system/a is ready",
		},
		{
			"API servers' clocks differ by seconds", tainted, []*corev1.Pod{aPod("a", "n1", -5*time.Second, -10*time.Minute)},
			true, "pod weir-system/a is ready",
		},
		{"the node is being deleted", with(aNode("n1", tainted.Spec.Taints...), func(n *corev1.Node) { n.DeletionTimestamp = new(metav1.NewTime(noon)) }), []*corev1.Pod{ready("a")}, false, "the node is being deleted"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var agents []agent
			for _, p := range tt.pods {
				agents = append(agents, toAgent(p))
			}
			if got := judge(toNode(tt.node), agents); got != (verdict{tt.remove, tt.why}) {
				t.Errorf("got %+v, want remove %v: %s", got, tt.remove, tt.why)
			}
		})
	}
}

func TestOnlyTaintedNodesAreLookedAt(t *testing.T) {
	w := newWatches()
	nodes := []any{
		aNode("plain"),
		aNode("other", taint("node.kubernetes.io/not-ready", corev1.TaintEffectNoExecute)),
		aNode("new", taint("x", corev1.TaintEffectNoSchedule), taint(NotReadyTaint, corev1.TaintEffectNoExecute)),
	}
	pods := []any{aPod("b", "new", 1, 2), aPod("a", "new", 1, 2), aPod("c", "plain", 1, 2)}
	if err := w.nodes.Replace(nodes, "1"); err != nil {
		t.Fatal(err)
	}
	if err := w.agents.Replace(pods, "1"); err != nil {
		t.Fatal(err)
	}
	got := map[string][]string{}
	for name, x := range w.waiting() {
		for _, a := range x.agents {
			got[name] = append(got[name], a.pod)
		}
	}
	if diff := cmp.Diff(map[string][]string{"new": {"weir-system/a", "weir-system/b"}}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestWithoutTaint(t *testing.T) {
	other := taint("node.kubernetes.io/unschedulable", corev1.TaintEffectNoSchedule)
	for _, tt := range []struct {
		name string
		have []corev1.Taint
		want []corev1.Taint
	}{
		{"alone", []corev1.Taint{taint(NotReadyTaint, corev1.TaintEffectNoSchedule)}, nil},
		{"with both effects", []corev1.Taint{taint(NotReadyTaint, corev1.TaintEffectNoSchedule), taint(NotReadyTaint, corev1.TaintEffectNoExecute)}, nil},
		{"among others", []corev1.Taint{other, taint(NotReadyTaint, corev1.TaintEffectNoSchedule)}, []corev1.Taint{other}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := aNode("n1", tt.have...)
			patch, err := toNode(before).withoutTaint()
			if err != nil {
				t.Fatal(err)
			}
			nodes := fake.NewClientset(before).CoreV1().Nodes()
			after, err := nodes.Patch(t.Context(), "n1", types.MergePatchType, patch, metav1.PatchOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, after.Spec.Taints); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}
