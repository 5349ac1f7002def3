package e2e

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// Beside each pod that asks for what means nothing starts one that asks right.

func wrongLabel(t *testing.T) {
	ns := newNamespace(t, captured())
	pod := create(t, ns, labelled(appPod("wrong", "serve"), captureLabel, "maybe"))
	heldBack(t, ns, pod, `{"metadata":{"labels":{"weirmesh.io/capture":"enabled"}}}`, captureLabel, "maybe")
}

func unknownAnnotation(t *testing.T) {
	ns := newNamespace(t, captured())
	pod := appPod("wrong", "serve")
	const annotation = "weirmesh.io/exclude-inbound-port" // one letter short
	pod.Annotations = map[string]string{annotation: "9090"}
	pod = create(t, ns, pod)
	heldBack(t, ns, pod, `{"metadata":{"annotations":{"weirmesh.io/exclude-inbound-port":null}}}`, annotation, "9090")
}

// heldBack waits for the events that hold words and the code, makes sure that
// the pod never ran, corrects it and waits until it runs, captured.
func heldBack(t *testing.T, ns string, pod *corev1.Pod, correction string, words ...string) {
	t.Helper()
	right := start(t, ns, appPod("right", "serve"))
	words = append(words, "WEIR-C006")
	waitEvent(t, pod, "InvalidAnnotation", words...) // the agent's
	waitEvent(t, pod, sandboxFailed, words...)
	neverRan(t, pod)
	patch(t, pod, correction)
	expectCaptured(t, waitReady(t, pod), right)
}
