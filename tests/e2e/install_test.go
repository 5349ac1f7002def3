package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/tests/cluster"
)

const (
	weirNamespace = "weir-system"
	agentName     = "weir-agent" // of the DaemonSet, and its pods' label app
	pluginName    = "weir-cni"
	// controllerName is that of the Deployment and of the Lease, and its pods' label app.
	controllerName = "weir-controller"
)

// The overlays of Weir's manifests.
const (
	installOverlay   = "weir/install"
	uninstallOverlay = "weir/uninstall"
)

// install applies Weir's manifests and waits until every node's chain has the
// plugin. On a cluster that has Weir already, its pods are replaced, as their
// image may be a new one of the same name.
func (b *testBed) install(ctx context.Context) error {
	if _, err := b.Kubectl(ctx, "apply", "-k", installOverlay); err != nil {
		return err
	}
	if !b.ours {
		// A run that was interrupted may have left it without nodes.
		err := b.changeAgents(ctx, func(ds *appsv1.DaemonSet) { delete(ds.Spec.Template.Spec.NodeSelector, absent) })
		if err != nil {
			return err
		}
		if _, err := b.Kubectl(ctx, "-n", weirNamespace, "rollout", "restart", "daemonset/"+agentName, "deployment/"+controllerName); err != nil {
			return err
		}
	}
	return b.waitInstalled(ctx)
}

// waitInstalled waits until Weir's pods are ready and the plugin is chained.
func (b *testBed) waitInstalled(ctx context.Context) error {
	// A container that ends as it starts is tried again after 10, 20 and 40 s.
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	return poll(ctx, "Weir to be installed", func() error {
		if err := b.agentsReady(ctx, len(b.Nodes)); err != nil {
			return err
		}
		if err := b.controllersReady(ctx); err != nil {
			return err
		}
		for _, node := range b.Nodes {
			plugins, err := chain(node)
			if err != nil {
				return err
			}
			if !slices.Contains(plugins, pluginName) {
				return fmt.Errorf("the chain of %s is %v", node.Name, plugins)
			}
		}
		return nil
	})
}

// unready says which containers of pods are not ready, and in which state they are.
func unready(pods []corev1.Pod) string {
	out := ""
	for _, p := range pods {
		for _, c := range p.Status.ContainerStatuses {
			if !c.Ready {
				out += fmt.Sprintf("; %s of %s on %s, restarted %d times: %s, before that %s",
					c.Name, p.Name, p.Spec.NodeName, c.RestartCount, c.State.String(), c.LastTerminationState.String())
			}
		}
	}
	return out
}

// agentsReady says whether the DaemonSet has come to rest with n ready pods.
func (b *testBed) agentsReady(ctx context.Context, n int) error {
	ds, err := b.kube.AppsV1().DaemonSets(weirNamespace).Get(ctx, agentName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	pods, err := b.agentPods(ctx)
	if err != nil {
		return err
	}
	s := ds.Status
	if s.ObservedGeneration < ds.Generation || int(s.DesiredNumberScheduled) != n ||
		int(s.UpdatedNumberScheduled) != n || int(s.NumberReady) != n || len(pods) != n {
		return fmt.Errorf("%d of %d agents are ready, %d of them up to date, of %d pods%s",
			s.NumberReady, n, s.UpdatedNumberScheduled, len(pods), unready(pods))
	}
	return nil
}

// controllersReady says whether the Deployment has come to rest with all replicas.
func (b *testBed) controllersReady(ctx context.Context) error {
	d, err := b.kube.AppsV1().Deployments(weirNamespace).Get(ctx, controllerName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if n, s := *d.Spec.Replicas, d.Status; s.ObservedGeneration < d.Generation || s.UpdatedReplicas != n || s.ReadyReplicas != n || s.Replicas != n {
		return fmt.Errorf("%d of %d controllers are ready, %d of them up to date, of %d pods", s.ReadyReplicas, n, s.UpdatedReplicas, s.Replicas)
	}
	return nil
}

// agentPods are the DaemonSet's pods, also those that are ending.
func (b *testBed) agentPods(ctx context.Context) ([]corev1.Pod, error) {
	list, err := b.kube.CoreV1().Pods(weirNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app=" + agentName})
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}

// changeAgents changes the DaemonSet.
func (b *testBed) changeAgents(ctx context.Context, change func(*appsv1.DaemonSet)) error {
	sets := b.kube.AppsV1().DaemonSets(weirNamespace)
	return poll(ctx, "a change of the DaemonSet", func() error {
		ds, err := sets.Get(ctx, agentName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		change(ds)
		_, err = sets.Update(ctx, ds, metav1.UpdateOptions{})
		return err
	})
}

// chain lists the types of the plugins that a node's runtime runs for a pod:
// those of the first file in its folder, and of the drop-ins beside it.
func chain(node *cluster.Node) ([]string, error) {
	const folder = "/etc/cni/net.d"
	type plugin struct{ Type string }
	var list struct {
		Name    string
		Plugins []plugin
	}
	files, err := filepath.Glob(filepath.Join(node.Path(folder), "*.conflist"))
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, errors.New("no conflist on " + node.Name)
	}
	if err := readJSON(files[0], &list); err != nil {
		return nil, err
	}
	dropIns, err := filepath.Glob(filepath.Join(node.Path(folder), list.Name, "*.conf"))
	if err != nil {
		return nil, err
	}
	for _, file := range dropIns {
		var p plugin
		if err := readJSON(file, &p); err != nil {
			return nil, err
		}
		list.Plugins = append(list.Plugins, p)
	}
	var types []string
	for _, p := range list.Plugins {
		types = append(types, p.Type)
	}
	return types, nil
}

func readJSON(path string, into any) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(content, into); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// removeNamespaces removes the tests' namespaces and waits for their pods to go.
func (b *testBed) removeNamespaces(ctx context.Context) error {
	namespaces := b.kube.CoreV1().Namespaces()
	selector := metav1.ListOptions{LabelSelector: testLabel}
	return poll(ctx, "the tests' namespaces to go", func() error {
		list, err := namespaces.List(ctx, selector)
		if err != nil {
			return err
		}
		for _, ns := range list.Items {
			if err := namespaces.Delete(ctx, ns.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
				return err
			}
		}
		if len(list.Items) > 0 {
			return fmt.Errorf("%d namespaces are left", len(list.Items))
		}
		return nil
	})
}
