package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// uninstalled goes the documented way: first the chain, then the rest. Pods that
// run go on at every step, captured ones on their proxies.
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
	expectCaptured(t, x.front)
	remove(t, goes)
	left.expectNone(t)

	_, err = bed.Kubectl(ctx, "delete", "-k", installOverlay)
	must(t, err)
	if _, err := bed.kube.CoreV1().Namespaces().Get(ctx, weirNamespace, metav1.GetOptions{}); err == nil {
		t.Errorf("namespace %s is still there", weirNamespace)
	}
	expectNotCaptured(t, start(t, ns, onNode(appPod("after-all", "serve"), 0)))
	remove(t, goesLater)
	x.end(t)

	// What nobody was there to end, the next agent ends.
	must(t, bed.install(ctx))
	expectCaptured(t, startAll(t, ns, onNode(appPod("again-0", "serve"), 0), onNode(appPod("again-1", "serve"), 1))...)
	expectCaptured(t, x.front)
	leftLater.expectNone(t)
	x.newsFlow(t, ns)
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
