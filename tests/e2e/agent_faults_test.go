package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/tests/cluster"
)

// traffic is what goes on while agents come and go: new connections all the
// time, and one that stays.
type traffic struct {
	front    *corev1.Pod
	backs    map[string]*corev1.Pod
	requests load
	talk     *command
	proxies  map[string]process // by pod, at the beginning
}

func beginTraffic(t *testing.T, ns string) *traffic {
	t.Helper()
	return beginTrafficFrom(t, ns, 0)
}

// beginTrafficFrom has the traffic asked for on the i-th node. What asks is run by
// way of that node's runtime.
func beginTrafficFrom(t *testing.T, ns string, i int) *traffic {
	t.Helper()
	x := &traffic{backs: backs(t, ns, 2), proxies: map[string]process{}}
	service(t, ns, "echo", 9000)
	pods := startAll(t, ns, onNode(appPod("front", "serve"), i), onNode(appPod("echo", "serve", "-echo", ":9000"), 1-i))
	x.front = pods[0]
	waitAnswers(t, x.front, "http://back:8080/", x.backs)
	for _, pod := range append(pods, x.backs["back-0"], x.backs["back-1"]) {
		x.proxies[pod.Name] = proxyOf(t, pod)
	}
	x.requests = beginLoad(t, x.front, "http://back:8080/")
	waitEcho(t, x.front)
	x.talk = begin(t, x.front, "talk", "echo:9000")
	return x
}

// waitEcho waits until the agents have heard of echo's endpoint.
func waitEcho(t *testing.T, from *corev1.Pod) {
	t.Helper()
	eventually(t, soon, "an echo", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), soon)
		defer cancel()
		said, err := begin(t, from, "talk", "echo:9000").finish(ctx)
		if err != nil {
			return fmt.Errorf("%q: %w", said, err)
		}
		return nil
	})
}

// end fails the test unless every request was served, the connection that stays
// has stayed, and the proxies are those that were there at the beginning.
func (x *traffic) end(t *testing.T) {
	t.Helper()
	x.requests.waitFor(t, 20)
	results := x.requests.end(t)
	allServed(t, "running pods", results)
	if got := answeredBy(results); len(got) != len(x.backs) {
		t.Errorf("answers came from %v, want all of back's", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	said, err := x.talk.finish(ctx)
	if err != nil {
		t.Errorf("the connection that stays: %q, %v", said, err)
	}
	all, err := processes()
	must(t, err)
	for pod, proxy := range x.proxies {
		if !slices.ContainsFunc(all, func(p process) bool { return p.pid == proxy.pid && p.isProxy() }) {
			t.Errorf("the proxy of %s (pid %d) did not outlive its agent", pod, proxy.pid)
		}
	}
	t.Logf("%d requests were served meanwhile, the slowest in %s", len(results), slowest(results).Round(time.Millisecond))
}

// newsFlow makes sure that proxies learn of endpoints that come and go.
func (x *traffic) newsFlow(t *testing.T, ns string) {
	t.Helper()
	added := labelled(appPod("back-new", "serve"), "app", "back")
	x.backs["back-new"] = start(t, ns, added)
	waitAnswers(t, x.front, "http://back:8080/", x.backs)
	remove(t, x.backs["back-0"])
	delete(x.backs, "back-0")
	waitAnswers(t, x.front, "http://back:8080/", x.backs)
	allServed(t, "with other endpoints", get(t, x.front, "-n", "20", "http://back:8080/"))
}

// agentKilled kills both agents' containers by way of containerd; kubelet starts
// them again. Then it deletes their pods, and with them the containers' shims.
func agentKilled(t *testing.T) {
	ns := newNamespace(t, captured())
	x := beginTraffic(t, ns)
	ctx := t.Context()
	pods, err := bed.agentPods(ctx)
	must(t, err)
	for _, pod := range pods {
		id := agentContainer(t, &pod)
		_, err := output(bed.node(pod.Spec.NodeName).Command(ctx, "ctr", "--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", id))
		must(t, err)
	}
	for _, pod := range pods {
		waitPod(t, &pod, "to have its agent started again", func(pod *corev1.Pod) bool {
			for _, s := range pod.Status.ContainerStatuses {
				if s.Name == "agent" {
					return s.RestartCount > 0 && s.Ready
				}
			}
			return false
		})
	}
	x.requests.waitFor(t, 20)

	for _, pod := range pods {
		must(t, bed.kube.CoreV1().Pods(weirNamespace).Delete(ctx, pod.Name, metav1.DeleteOptions{}))
	}
	eventually(t, startLimit, "other agents", func() error {
		now, err := bed.agentPods(ctx)
		if err != nil {
			return err
		}
		for _, pod := range now {
			if slices.ContainsFunc(pods, func(old corev1.Pod) bool { return old.UID == pod.UID }) {
				return fmt.Errorf("%s is still there", pod.Name)
			}
		}
		return bed.agentsReady(ctx, len(bed.Nodes))
	})
	x.end(t)
	x.newsFlow(t, ns)
	expectCaptured(t, start(t, ns, appPod("later", "serve")), x.front)
}

func agentContainer(t *testing.T, pod *corev1.Pod) string {
	t.Helper()
	for _, s := range pod.Status.ContainerStatuses {
		if s.Name == "agent" {
			return strings.TrimPrefix(s.ContainerID, "containerd://")
		}
	}
	t.Fatalf("pod %s has no agent: %+v", pod.Name, pod.Status.ContainerStatuses)
	return ""
}

// absent is a node label that no node has.
const absent = "weirmesh.io/e2e-absent"

// agentAway takes all agents away, without uninstalling.
func agentAway(t *testing.T) {
	ns := newNamespace(t, captured())
	x := beginTraffic(t, ns)
	ctx := t.Context()
	bringBack := takeAgents(t)
	eventually(t, startLimit, "no agent to be left", func() error { return bed.agentsReady(ctx, 0) })
	for _, node := range bed.Nodes {
		plugins, err := chain(node)
		must(t, err)
		if !slices.Contains(plugins, pluginName) {
			t.Errorf("without an agent, the chain of %s is %v: pods start uncaptured", node.Name, plugins)
		}
	}

	waiting := create(t, ns, onNode(appPod("waits", "serve"), 0))
	// The control: what the cluster itself needs can start.
	exempt := onNode(appPod("e2e-exempt", "sleep", "1h"), 0)
	exempt = create(t, "kube-system", exempt)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), soon)
		defer cancel()
		if err := bed.kube.CoreV1().Pods(exempt.Namespace).Delete(ctx, exempt.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	expectNotCaptured(t, waitReady(t, exempt))
	waitEvent(t, waiting, sandboxFailed, "WEIR-C003", waiting.Spec.NodeName)
	neverRan(t, waiting)
	x.requests.waitFor(t, 20)

	bringBack()
	back := time.Now()
	waiting = waitReady(t, waiting)
	t.Logf("the waiting pod was ready %s after the agents were let back", time.Since(back).Round(100*time.Millisecond))
	eventually(t, startLimit, "the agents", func() error { return bed.agentsReady(ctx, len(bed.Nodes)) })
	expectCaptured(t, waiting, x.front)
	x.end(t)
	x.newsFlow(t, ns)
}

// takeAgents makes the DaemonSet ask for nodes that there are none of, until
// the function it returns is called or the test ends.
func takeAgents(t *testing.T) func() {
	t.Helper()
	done := false
	bringBack := func() {
		if done {
			return
		}
		done = true
		ctx, cancel := context.WithTimeout(context.Background(), soon)
		defer cancel()
		if err := bed.changeAgents(ctx, func(ds *appsv1.DaemonSet) { delete(ds.Spec.Template.Spec.NodeSelector, absent) }); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(bringBack)
	must(t, bed.changeAgents(t.Context(), func(ds *appsv1.DaemonSet) {
		if ds.Spec.Template.Spec.NodeSelector == nil {
			ds.Spec.Template.Spec.NodeSelector = map[string]string{}
		}
		ds.Spec.Template.Spec.NodeSelector[absent] = "true"
	}))
	return bringBack
}

// attachment is what a test wants to know of an agent's state file.
type attachment struct{ ContainerID, PodUID string }

func readAttachments(node *cluster.Node) ([]attachment, error) {
	files, err := filepath.Glob(filepath.Join(node.Path("/run/weir/attachments"), "*.json"))
	if err != nil {
		return nil, err
	}
	var all []attachment
	for _, file := range files {
		var a attachment
		err := readJSON(file, &a)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, a)
	}
	return all, nil
}
