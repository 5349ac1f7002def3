package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// uninstalled goes the documented way: first the chain, then pods are let go in
// place, then all the rest. Traffic goes on at every step.
func uninstalled(t *testing.T) {
	ns := newNamespace(t, captured())
	x := beginTraffic(t, ns)
	ctx := t.Context()
	pods := startAll(t, ns, appPod("goes", "serve"), appPod("goes-later", "serve"))
	goes, goesLater := pods[0], pods[1]
	expectCaptured(t, pods...)
	left, leftLater := tracesOf(t, goes), tracesOf(t, goesLater)

	_, err := bed.Kubectl(ctx, "apply", "-k", uninstallOverlay)
	must(t, err)
	eventually(t, startLimit, "the chain to be without Weir", func() error {
		if err := bed.agentsReady(ctx, len(bed.Nodes)); err != nil {
			return err
		}
		return unchained()
	})
	expectNotCaptured(t, startAll(t, ns, onNode(appPod("after-0", "serve"), 0), onNode(appPod("after-1", "serve"), 1))...)
	for _, pod := range []*corev1.Pod{x.front, goes, goesLater} {
		waitEvent(t, pod, "CaptureReleased", "taken off this node")
	}
	waitLetGo(t, goes, goesLater, x.backs["back-0"], x.backs["back-1"])
	x.expectDirect(t)
	remove(t, goes)
	left.expectNone(t)

	_, err = bed.Kubectl(ctx, "delete", "-k", installOverlay)
	must(t, err)
	if _, err := bed.kube.CoreV1().Namespaces().Get(ctx, weirNamespace, metav1.GetOptions{}); err == nil {
		t.Errorf("namespace %s is still there", weirNamespace)
	}
	expectNotCaptured(t, start(t, ns, onNode(appPod("after-all", "serve"), 0)))
	remove(t, goesLater)
	leftLater.expectNone(t)
	x.endLetGo(t)
	eventually(t, soon, "nothing of Weir to be on the nodes", nothingOnNodes)
	expectNoRestart(t, x.front, x.backs["back-0"], x.backs["back-1"])

	installedAgain(t, ns, x.front)
	x.newsFlow(t, ns)
}

// daemonSetDeleted: nobody ran an uninstall.
func daemonSetDeleted(t *testing.T) {
	deletedWithoutUninstall(t, "-n", weirNamespace, "delete", "daemonset", agentName)
}

// namespaceDeleted: the rights to ask for anything go with it.
func namespaceDeleted(t *testing.T) {
	deletedWithoutUninstall(t, "delete", "namespace", weirNamespace)
}

func deletedWithoutUninstall(t *testing.T, command ...string) {
	ns := newNamespace(t, captured())
	x := beginTraffic(t, ns)
	before := startAll(t, ns, onNode(appPod("before-0", "serve"), 0), onNode(appPod("before-1", "serve"), 1))
	expectCaptured(t, before...)
	_, err := bed.Kubectl(t.Context(), command...)
	must(t, err)
	eventually(t, startLimit, "the chain to be without Weir", unchained)
	after := startAll(t, ns, onNode(appPod("after-0", "serve"), 0), onNode(appPod("after-1", "serve"), 1))
	expectNotCaptured(t, after...)
	waitLetGo(t, before...)
	x.expectDirect(t)
	remove(t, before[0])
	x.endLetGo(t)

	installedAgain(t, ns, before[1], after[0], after[1], x.front)
	expectNoRestart(t, before[1], after[0], after[1], x.front)
}

// installedAgain installs Weir on nodes full of running pods: they stay ready, and
// the plugin is in no chain before the node's agent has been ready. Pods that run
// are captured in place.
func installedAgain(t *testing.T, ns string, running ...*corev1.Pod) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	faults := make(chan error)
	go watchInstall(ctx, faults)
	must(t, bed.install(t.Context()))
	for _, pod := range running {
		waitEvent(t, pod, "CaptureRepaired", "without a restart")
	}
	cancel()
	if err := <-faults; err != nil {
		t.Error("while Weir was installed: ", err)
	}
	expectCaptured(t, running...)
	name := fmt.Sprint("again-", time.Now().UnixMilli(), "-")
	expectCaptured(t, startAll(t, ns, onNode(appPod(name+"0", "serve"), 0), onNode(appPod(name+"1", "serve"), 1))...)
}

// watchInstall looks at the nodes until ctx is done, and tells the first fault, or
// nil.
func watchInstall(ctx context.Context, faults chan<- error) {
	var fault error
	for ctx.Err() == nil && fault == nil {
		fault = errors.Join(chainedTooEarly(), notReady(ctx))
		time.Sleep(10 * time.Millisecond)
	}
	faults <- fault
}

// chainedTooEarly names nodes whose chain has the plugin although their agent has
// not been ready.
func chainedTooEarly() error {
	for _, node := range bed.Nodes {
		plugins, err := chain(node) // before the marker: that comes first and stays
		if err != nil {
			return err
		}
		if _, err := os.Stat(node.Path("/run/weir/ready")); err != nil && slices.Contains(plugins, pluginName) {
			return fmt.Errorf("the chain of %s is %v: %w", node.Name, plugins, err)
		}
	}
	return nil
}

// notReady names nodes that are not.
func notReady(ctx context.Context) error {
	list, err := bed.kube.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	for _, node := range list.Items {
		for _, c := range node.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
				return fmt.Errorf("node %s is not ready: %s", node.Name, c.Message)
			}
		}
	}
	return nil
}

// waitLetGo waits until pods have neither proxy nor rules.
func waitLetGo(t *testing.T, pods ...*corev1.Pod) {
	t.Helper()
	eventually(t, startLimit, "pods to be let go", func() error {
		all, err := processes()
		if err != nil {
			return err
		}
		for _, pod := range pods {
			if err := isNotCaptured(all, pod); err != nil {
				return err
			}
		}
		return nil
	})
}

// expectDirect fails the test unless front's rules turn nothing aside any more, and
// its proxy goes on with the connection that it has.
func (x *traffic) expectDirect(t *testing.T) {
	t.Helper()
	shown, err := sandboxOf(t, x.front).rules()
	must(t, err)
	if strings.Contains(shown.Rules, "redirect") {
		t.Errorf("front's connections are turned aside still:\n%s", shown.Rules)
	}
	allServed(t, "let go", get(t, x.front, "-n", "3", "http://back:8080/"))
	all, err := processes()
	must(t, err)
	for _, pod := range []string{"front", "echo"} {
		if !slices.ContainsFunc(all, func(p process) bool { return p.pid == x.proxies[pod].pid && p.isProxy() }) {
			t.Errorf("the proxy of %s is gone, with a connection that should go on", pod)
		}
	}
}

// endLetGo fails the test unless every request was served, and the connection that
// stays has stayed, through proxies that end with it.
func (x *traffic) endLetGo(t *testing.T) {
	t.Helper()
	x.requests.waitFor(t, 20)
	results := x.requests.end(t)
	allServed(t, "running pods", results)
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	said, err := x.talk.finish(ctx)
	if err != nil {
		t.Errorf("the connection that stays: %q, %v", said, err)
	}
	eventually(t, endLimit, "the last proxies to end with the last connection", func() error {
		all, err := processes()
		if err != nil {
			return err
		}
		for pod, proxy := range x.proxies {
			if slices.ContainsFunc(all, func(p process) bool { return p.pid == proxy.pid && p.isProxy() }) {
				return fmt.Errorf("the proxy of %s (pid %d) runs", pod, proxy.pid)
			}
		}
		return nil
	})
	t.Logf("%d requests were served meanwhile, the slowest in %s", len(results), slowest(results).Round(time.Millisecond))
}

// unchained says what of the plugin is left on the nodes.
func unchained() error {
	for _, node := range bed.Nodes {
		plugins, err := chain(node)
		if err != nil {
			return err
		}
		if slices.Contains(plugins, pluginName) {
			return fmt.Errorf("the chain of %s is %v", node.Name, plugins)
		}
		if _, err := os.Stat(filepath.Join(node.Path("/opt/cni/bin"), pluginName)); err == nil {
			return fmt.Errorf("the plugin's binary is still on %s", node.Name)
		}
	}
	return nil
}

// nothingOnNodes says what of Weir is left on the nodes, but for the state of
// proxies that ended when no agent was there.
func nothingOnNodes() error {
	for _, node := range bed.Nodes {
		for _, pattern := range []string{
			"/opt/weir/bin/*", "/run/weir/*", "/etc/cni/net.d/*weir*", "/etc/cni/net.d/*/*weir*",
		} {
			found, err := filepath.Glob(node.Path(pattern))
			if err != nil {
				return err
			}
			for _, path := range found {
				if name := filepath.Base(path); name != "p" && name != "attachments" {
					return fmt.Errorf("%s is still on %s", path, node.Name)
				}
			}
		}
	}
	return nil
}
