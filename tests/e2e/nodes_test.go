package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/tests/cluster"
)

const notReadyTaint = "weirmesh.io/agent-not-ready"

// hold is how long something is watched that must not happen.
const hold = 4 * time.Second

// taintedUntilReady has a node register anew, by its own kubelet, with the taint:
// without an agent, then with one that serves and does not say so, then with one
// that is ready.
func taintedUntilReady(t *testing.T) {
	ns := newNamespace(t, captured())
	node := bed.Nodes[1]
	ctx := t.Context()
	bringBack := takeAgents(t)
	eventually(t, startLimit, "no agent to be left", func() error { return bed.agentsReady(ctx, 0) })
	admit := withholdReadiness(t)
	register(t, node)
	began := time.Now()

	scheduled := func(name string) *corev1.Pod {
		pod := appPod(name, "serve")
		pod.Spec.NodeSelector = map[string]string{corev1.LabelHostname: node.Name}
		return pod
	}
	waiting := create(t, ns, scheduled("waits"))
	waitEvent(t, waiting, "FailedScheduling", "untolerated taint")
	staysTainted(t, node, waiting)

	bringBack()
	eventually(t, startLimit, "an agent that is not ready", func() error { return onlyNotReady(ctx, node) })
	// The control: what tolerates the taint starts, and is captured.
	tolerant := scheduled("tolerates")
	tolerant.Spec.Tolerations = []corev1.Toleration{{Key: notReadyTaint, Operator: corev1.TolerationOpExists}}
	expectCaptured(t, start(t, ns, tolerant))
	staysTainted(t, node, waiting)

	admit()
	must(t, bed.waitInstalled(ctx)) // a rollout, one node after the other
	waiting = waitReady(t, waiting)
	t.Logf("the pod that waited was ready %s after the node registered", time.Since(began).Round(100*time.Millisecond))
	expectCaptured(t, waiting)
	if tainted(t, node) {
		t.Error("the pod runs, and the taint is there")
	}
	eventually(t, startLimit, "the agents", func() error { return bed.agentsReady(ctx, len(bed.Nodes)) })
	ready := readySince(t, node)
	for _, c := range waiting.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.LastTransitionTime.Before(&ready) {
			t.Errorf("the pod was scheduled at %s, the agent was ready at %s", c.LastTransitionTime, ready)
		}
	}
	// An agent that restarts does not make the node one that is not ready.
	if _, err := bed.Kubectl(ctx, "-n", weirNamespace, "rollout", "restart", "daemonset/"+agentName); err != nil {
		t.Error(err)
	}
	must(t, bed.waitInstalled(ctx))
	if tainted(t, node) {
		t.Error("the taint came back as the agent was restarted")
	}
}

// withholdReadiness has agents' readiness probes fail, until the function it
// returns is called or the test ends.
func withholdReadiness(t *testing.T) func() {
	t.Helper()
	var probe []string
	swap := func(ctx context.Context, command func([]string) []string) error {
		return bed.changeAgents(ctx, func(ds *appsv1.DaemonSet) {
			for _, c := range ds.Spec.Template.Spec.Containers {
				if c.Name == "agent" {
					c.ReadinessProbe.Exec.Command = command(c.ReadinessProbe.Exec.Command)
				}
			}
		})
	}
	must(t, swap(t.Context(), func(now []string) []string {
		probe = now
		return []string{"/weir-agent", "ready", "--run-dir=/nowhere"}
	}))
	done := false
	admit := func() {
		if done {
			return
		}
		done = true
		ctx, cancel := context.WithTimeout(context.Background(), soon)
		defer cancel()
		if err := swap(ctx, func([]string) []string { return probe }); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(admit)
	return admit
}

// onlyNotReady says how the node's agent falls short of: it runs, chained, and only
// its own readiness is missing.
func onlyNotReady(ctx context.Context, node *cluster.Node) error {
	pods, err := bed.agentPods(ctx)
	if err != nil {
		return err
	}
	for _, pod := range pods {
		if pod.Spec.NodeName != node.Name || pod.DeletionTimestamp != nil {
			continue
		}
		ready := map[string]bool{}
		for _, s := range pod.Status.ContainerStatuses {
			if s.State.Running != nil {
				ready[s.Name] = s.Ready
			}
		}
		if is, runs := ready["agent"]; !runs || is || !ready["install"] {
			return fmt.Errorf("the containers that run and whether they are ready: %v", ready)
		}
		return nil
	}
	return errors.New("there is no agent on " + node.Name)
}

// register removes the Node and has its kubelet make it anew, with the taint. What
// the test bed had given the old one it gives the new one.
func register(t *testing.T, node *cluster.Node) {
	t.Helper()
	ctx := t.Context()
	nodes := bed.kube.CoreV1().Nodes()
	old, err := nodes.Get(ctx, node.Name, metav1.GetOptions{})
	must(t, err)
	must(t, node.Stop(ctx, "kubelet"))
	must(t, nodes.Delete(ctx, node.Name, metav1.DeleteOptions{}))
	const key = "registerWithTaints"
	must(t, node.ConfigureKubelet(ctx, func(config map[string]any) {
		config[key] = []corev1.Taint{{Key: notReadyTaint, Effect: corev1.TaintEffectNoSchedule}}
	}))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), soon)
		defer cancel()
		if err := node.ConfigureKubelet(ctx, func(config map[string]any) { delete(config, key) }); err != nil {
			t.Error(err)
		}
	})
	eventually(t, startLimit, "node "+node.Name+" to register", func() error {
		made, err := nodes.Get(ctx, node.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(made.Spec.Taints, func(x corev1.Taint) bool { return x.Key == notReadyTaint }) {
			t.Fatalf("kubelet registered it with %v", made.Spec.Taints)
		}
		made.Labels, made.Spec.PodCIDR, made.Spec.PodCIDRs = old.Labels, old.Spec.PodCIDR, old.Spec.PodCIDRs
		_, err = nodes.Update(ctx, made, metav1.UpdateOptions{})
		return err
	})
}

func tainted(t *testing.T, node *cluster.Node) bool {
	t.Helper()
	now, err := bed.kube.CoreV1().Nodes().Get(t.Context(), node.Name, metav1.GetOptions{})
	must(t, err)
	return slices.ContainsFunc(now.Spec.Taints, func(x corev1.Taint) bool { return x.Key == notReadyTaint })
}

// staysTainted watches for a while that the node keeps its taint, and that the pod
// is bound nowhere.
func staysTainted(t *testing.T, node *cluster.Node, pod *corev1.Pod) {
	t.Helper()
	for end := time.Now().Add(hold); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if !tainted(t, node) {
			t.Fatal("the taint went before the agent was ready")
		}
		now, err := fresh(t.Context(), pod)
		must(t, err)
		if now.Spec.NodeName != "" {
			t.Fatalf("pod %s was bound to %s", pod.Name, now.Spec.NodeName)
		}
	}
}

// readySince is when the node's agent's pod became ready.
func readySince(t *testing.T, node *cluster.Node) metav1.Time {
	t.Helper()
	pods, err := bed.agentPods(t.Context())
	must(t, err)
	for _, pod := range pods {
		for _, c := range pod.Status.Conditions {
			if pod.Spec.NodeName == node.Name && c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				return c.LastTransitionTime
			}
		}
	}
	t.Fatalf("no agent is ready on %s", node.Name)
	return metav1.Time{}
}

// rebooted boots a node again and keeps its agent from it for a while. A captured
// pod on it floods connections first of all, and nothing of that gets out before it
// is captured. One that is not captured does the same, which is the control.
func rebooted(t *testing.T) {
	plain, ns := newNamespace(t, nil), newNamespace(t, captured())
	const here, there = 0, 1
	node := bed.Nodes[there]
	ctx := t.Context()
	floods := func(name string, sink *corev1.Pod) *corev1.Pod {
		pod := onNode(appPod(name, "serve"), there)
		pod.Spec.InitContainers = []corev1.Container{appContainer("flood", floodAt(t, sink)...)}
		return pod
	}
	sinks := startAll(t, plain, onNode(appPod("sink", "serve", "-sink", sinkPort), here), onNode(appPod("control-sink", "serve", "-sink", sinkPort), here))
	sink, controlSink := sinks[0], sinks[1]
	pod, control := start(t, ns, floods("captured", sink)), start(t, plain, floods("control", controlSink))
	expectCaptured(t, pod)
	before, controlBefore := sunk(t, sink), sunk(t, controlSink)
	if before.Others == 0 || before.Uncaptured != 0 || controlBefore.Uncaptured == 0 {
		t.Fatalf("before the reboot the sinks have %+v, and of the control %+v", before, controlBefore)
	}

	bringBack := takeAgents(t)
	eventually(t, startLimit, "no agent to be left", func() error { return bed.agentsReady(ctx, 0) })
	down := time.Now()
	must(t, bed.Reboot(ctx, node))
	eventually(t, startLimit, "the node to say why it is not ready", func() error { return notReadyFor(ctx, node, "WEIR-C011") })
	t.Logf("%s after the power went the node says that it waits for its agent", time.Since(down).Round(100*time.Millisecond))
	time.Sleep(hold)
	for _, pod := range []*corev1.Pod{pod, control} {
		if s, err := findSandboxNow(pod); err == nil {
			t.Errorf("pod %s runs on a node without an agent: sandbox %s", pod.Name, s.id)
		}
	}
	if now := sunk(t, sink); now != before {
		t.Errorf("without an agent the sink got from %+v to %+v", before, now)
	}

	bringBack()
	for _, p := range []**corev1.Pod{&pod, &control} {
		*p = waitPod(t, *p, "to have started again", func(p *corev1.Pod) bool {
			return len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].RestartCount > 0 && p.Status.ContainerStatuses[0].Ready
		})
	}
	t.Logf("%s after the power went the captured pod is ready", time.Since(down).Round(100*time.Millisecond))
	expectCaptured(t, pod)
	after, controlAfter := sunk(t, sink), sunk(t, controlSink)
	t.Logf("at the sink before the reboot %+v, after it %+v; of the control %+v, %+v", before, after, controlBefore, controlAfter)
	if after.Uncaptured != 0 {
		t.Errorf("%d connections got away uncaptured", after.Uncaptured)
	}
	if after.Others-before.Others < before.Others/2 {
		t.Error("the pod did not flood again")
	}
	if controlAfter.Uncaptured <= controlBefore.Uncaptured {
		t.Error("control: the connections of a pod that is not captured are not seen")
	}
	must(t, bed.waitInstalled(ctx))
}

func findSandboxNow(pod *corev1.Pod) (sandbox, error) {
	all, err := processes()
	if err != nil {
		return sandbox{}, err
	}
	return findSandbox(all, pod)
}

// notReadyFor says how a node falls short of: it is not ready, for that reason.
func notReadyFor(ctx context.Context, node *cluster.Node, reason string) error {
	now, err := bed.kube.CoreV1().Nodes().Get(ctx, node.Name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, c := range now.Status.Conditions {
		if c.Type == corev1.NodeReady {
			if c.Status == corev1.ConditionFalse && strings.Contains(c.Message, reason) {
				return nil
			}
			return fmt.Errorf("ready is %s: %s", c.Status, c.Message)
		}
	}
	return errors.New("it says nothing")
}

// controllerFollowed ends the controller that leads, and kills the next: each time
// the other goes on.
func controllerFollowed(t *testing.T) {
	ctx := t.Context()
	for _, tt := range []struct {
		name string
		kill bool
		most time.Duration // until the other leads
	}{
		{"told to end", false, 8 * time.Second},
		{"killed", true, 25 * time.Second}, // its lease of 15 s has to run out
	} {
		t.Run(tt.name, func(t *testing.T) {
			must(t, bed.waitInstalled(ctx))
			var leader *corev1.Pod
			eventually(t, startLimit, "a leader that stays", func() error {
				if leader = controllerThatLeads(t); leader.DeletionTimestamp != nil {
					return fmt.Errorf("%s is of the Deployment as it was before, and about to end", leader.Name)
				}
				return nil
			})
			eventually(t, soon, "the leader to act", untaints(t, bed.Nodes[0]))
			grace := metav1.DeleteOptions{}
			if tt.kill {
				now := int64(0)
				grace.GracePeriodSeconds = &now
				id := strings.TrimPrefix(leader.Status.ContainerStatuses[0].ContainerID, "containerd://")
				_, err := output(bed.node(leader.Spec.NodeName).Command(ctx, "ctr", "--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", id))
				must(t, err)
			}
			ended := time.Now()
			must(t, bed.kube.CoreV1().Pods(weirNamespace).Delete(ctx, leader.Name, grace))
			eventually(t, tt.most, "the other to lead", func() error {
				if next := controllerThatLeads(t); next.UID == leader.UID {
					return fmt.Errorf("%s still leads", leader.Name)
				}
				return nil
			})
			t.Logf("the other leads %s later", time.Since(ended).Round(100*time.Millisecond))
			eventually(t, soon, "it to act", untaints(t, bed.Nodes[0]))
		})
	}
	must(t, bed.waitInstalled(ctx))
}

// controllerThatLeads is the pod that holds the Lease.
func controllerThatLeads(t *testing.T) *corev1.Pod {
	t.Helper()
	var leader *corev1.Pod
	eventually(t, startLimit, "a controller that leads", func() error {
		lease, err := bed.kube.CoordinationV1().Leases(weirNamespace).Get(t.Context(), controllerName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if lease.Spec.HolderIdentity == nil || *lease.Spec.HolderIdentity == "" {
			return errors.New("nobody holds the Lease")
		}
		leader, err = bed.kube.CoreV1().Pods(weirNamespace).Get(t.Context(), *lease.Spec.HolderIdentity, metav1.GetOptions{})
		return err // the pod of one that was killed is gone before its lease has run out
	})
	return leader
}

// untaints gives a node the taint, and returns what says whether it is gone.
func untaints(t *testing.T, node *cluster.Node) func() error {
	t.Helper()
	nodes := bed.kube.CoreV1().Nodes()
	eventually(t, soon, "a taint on "+node.Name, func() error {
		now, err := nodes.Get(t.Context(), node.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		now.Spec.Taints = append(now.Spec.Taints, corev1.Taint{Key: notReadyTaint, Effect: corev1.TaintEffectNoSchedule})
		_, err = nodes.Update(t.Context(), now, metav1.UpdateOptions{})
		if apierrors.IsInvalid(err) {
			return nil // it has it already
		}
		return err
	})
	return func() error {
		if tainted(t, node) {
			return errors.New("the taint is still there")
		}
		return nil
	}
}
