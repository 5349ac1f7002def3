package e2e

import (
	"context"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// fineClass is a RuntimeClass that the agents of the test bed are told is fine.
const fineClass = "e2e-fine"

// runtimeClasses has pods with a RuntimeClass, whose traffic may never meet the
// rules (gVisor, Kata): refused, unless the class is listed.
func runtimeClasses(t *testing.T) {
	ns := newNamespace(t, captured())
	unknown := runtimeClass(t, metav1.ObjectMeta{GenerateName: "e2e-sandboxed-"})
	fine := runtimeClass(t, metav1.ObjectMeta{Name: fineClass})
	withClass := func(name, class string) *corev1.Pod {
		pod := appPod(name, "serve")
		pod.Spec.RuntimeClassName = &class
		return pod
	}
	refused := create(t, ns, withClass("refused", unknown))
	listed := create(t, ns, withClass("listed", fine))
	optedOut := create(t, ns, labelled(withClass("out", unknown), captureLabel, "disabled"))
	expectCaptured(t, waitReady(t, listed))
	expectNotCaptured(t, waitReady(t, optedOut))

	words := []string{unknown, "allowRuntimeClasses", "WEIR-C010"}
	waitEvent(t, refused, "CaptureFailed", words...) // the agent's
	waitEvent(t, refused, sandboxFailed, words...)
	neverRan(t, refused)
	// What the error names as a way out is one.
	patch(t, refused, `{"metadata":{"labels":{"weirmesh.io/capture":"disabled"}}}`)
	expectNotCaptured(t, waitReady(t, refused))
}

// runtimeClass makes a RuntimeClass that is runc under another name, for one test.
func runtimeClass(t *testing.T, meta metav1.ObjectMeta) string {
	t.Helper()
	classes := bed.kube.NodeV1().RuntimeClasses()
	made, err := classes.Create(t.Context(), &nodev1.RuntimeClass{ObjectMeta: meta, Handler: "runc"}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) { // of a run that was killed
		made, err = classes.Get(t.Context(), meta.Name, metav1.GetOptions{})
	}
	must(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), soon)
		defer cancel()
		if err := classes.Delete(ctx, made.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	return made.Name
}

// labelWithoutEffect labels pods that cannot be captured: their owners are told,
// and nothing is done to them, neither at first nor in place.
func labelWithoutEffect(t *testing.T) {
	ns := newNamespace(t, captured())
	hostNetwork := func(name string) *corev1.Pod {
		pod := appPod(name, "sleep", "1h")
		pod.Spec.HostNetwork = true
		return onNode(pod, 0)
	}
	asks := create(t, ns, labelled(hostNetwork("asks"), captureLabel, "enabled"))
	silent := create(t, ns, hostNetwork("silent")) // the namespace's label says nothing of it
	exempt := appPod("", "sleep", "1h")
	exempt.GenerateName = "e2e-exempt-"
	exempt = create(t, "kube-system", labelled(onNode(exempt, 0), captureLabel, "enabled"))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), soon)
		defer cancel()
		if err := bed.kube.CoreV1().Pods(exempt.Namespace).Delete(ctx, exempt.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	control := start(t, ns, onNode(labelled(appPod("control", "serve"), captureLabel, "disabled"), 0))
	asks, silent, exempt = waitReady(t, asks), waitReady(t, silent), waitReady(t, exempt)

	waitEvent(t, asks, "CaptureFailed", "has no effect", "on the host's network")
	waitEvent(t, exempt, "CaptureFailed", "has no effect", "namespace kube-system is exempt")
	// The repair that captures the control in place has looked at all of them.
	patch(t, control, `{"metadata":{"labels":{"weirmesh.io/capture":"enabled"}}}`)
	waitEvent(t, control, "CaptureRepaired", "without a restart")
	expectCaptured(t, control)
	expectNotCaptured(t, asks, silent, exempt)
	for _, pod := range []*corev1.Pod{asks, silent, exempt} {
		must(t, hasNoEvent(t.Context(), pod, "CaptureRepaired"))
	}
	must(t, hasNoEvent(t.Context(), silent, "CaptureFailed"))
}

func hasNoEvent(ctx context.Context, pod *corev1.Pod, reason string) error {
	events, err := bed.kube.CoreV1().Events(pod.Namespace).List(ctx, metav1.ListOptions{
		FieldSelector: "reason=" + reason + ",involvedObject.uid=" + string(pod.UID),
	})
	if err == nil && len(events.Items) > 0 {
		err = fmt.Errorf("pod %s has the event %s: %s", pod.Name, reason, events.Items[0].Message)
	}
	return err
}
