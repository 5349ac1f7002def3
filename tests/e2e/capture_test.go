package e2e

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/agent/telemetry"
)

func capturedByNamespace(t *testing.T) {
	ns := newNamespace(t, captured())
	pods := startAll(t, ns, onNode(appPod("one", "serve"), 0), onNode(appPod("two", "serve"), 1))
	expectCaptured(t, pods...)
}

func capturedByPod(t *testing.T) {
	ns := newNamespace(t, nil)
	pods := startAll(t, ns, labelled(appPod("asks", "serve"), captureLabel, "enabled"), appPod("asks-not", "serve"))
	expectCaptured(t, pods[0])
	expectNotCaptured(t, pods[1])
}

func optedOut(t *testing.T) {
	ns := newNamespace(t, captured())
	pods := startAll(t, ns, labelled(appPod("out", "serve"), captureLabel, "disabled"), appPod("in", "serve"))
	expectNotCaptured(t, pods[0])
	expectCaptured(t, pods[1])
}

// leftAlone shows it by traffic, too: what an uncaptured client asks of an
// uncaptured server, no proxy sees.
func leftAlone(t *testing.T) {
	ns := newNamespace(t, nil)
	service(t, ns, "server", 8080)
	pods := startAll(t, ns, appPod("client", "serve"), appPod("server", "serve"),
		labelled(appPod("captured", "serve"), captureLabel, "enabled"))
	client, server, control := pods[0], pods[1], pods[2]
	expectNotCaptured(t, client, server)

	results := get(t, client, "-n", "3", "-retry", "10s", "http://server:8080/")
	allServed(t, "uncaptured to uncaptured", results)
	seen := get(t, control, "-retry", "10s", "http://server:8080/")
	allServed(t, "captured to uncaptured", seen)
	// The control's record is written after those of the client would have been.
	waitRecord(t, "the captured client", func(r telemetry.Record) bool { return r.Client == seen[0].Local })
	all, err := records()
	must(t, err)
	x := newIndex(all)
	for _, r := range results {
		if r.Answer == nil {
			continue
		}
		if r.Answer.Client != r.Local {
			t.Errorf("the client called from %s, the server was called from %s", r.Local, r.Answer.Client)
		}
		if further := x.at(r.Local, r); len(further) > 0 {
			t.Errorf("a proxy saw the request of an uncaptured pod: %+v", further)
		}
	}
}

func specUnchanged(t *testing.T) {
	ns := newNamespace(t, captured())
	pod := appPod("plain", "serve")
	pod.Spec.AutomountServiceAccountToken = nil // as users write it
	pod = start(t, ns, pod)
	expectCaptured(t, pod)
	if len(pod.Spec.Containers) != 1 || len(pod.Spec.InitContainers) != 0 || len(pod.Spec.EphemeralContainers) != 0 {
		t.Errorf("the pod has %d containers, %d init containers and %d ephemeral ones, want one of the first",
			len(pod.Spec.Containers), len(pod.Spec.InitContainers), len(pod.Spec.EphemeralContainers))
	}
	if len(pod.Status.ContainerStatuses) != 1 {
		t.Errorf("%d containers run, want 1", len(pod.Status.ContainerStatuses))
	}
	if len(pod.Spec.Volumes) != 1 || pod.Spec.Volumes[0].Projected == nil {
		t.Errorf("the pod has the volumes %+v, want the service account's token alone", pod.Spec.Volumes)
	}
	if n := len(pod.Spec.Containers[0].VolumeMounts); n != 1 {
		t.Errorf("the container has %d mounts, want the service account's token alone", n)
	}
	if len(pod.Annotations) != 0 {
		t.Errorf("the pod has the annotations %v, want none", pod.Annotations)
	}
	for key := range pod.Labels {
		// The API server itself adds the node's topology (Kubernetes 1.35).
		if key != "app" && !strings.HasPrefix(key, "topology.kubernetes.io/") {
			t.Errorf("the pod has the label %s, which it was not made with", key)
		}
	}
	if c := pod.Spec.Containers[0]; c.Image != appImage || len(c.Env) != 0 || len(c.Ports) != 0 || len(c.Command) != 0 {
		t.Errorf("the container is %+v", c)
	}
}

func restricted(t *testing.T) {
	labels := captured()
	labels["pod-security.kubernetes.io/enforce"] = "restricted"
	ns := newNamespace(t, labels)
	// The control: this namespace does refuse what the standard forbids.
	root := appPod("root", "serve")
	root.Spec.SecurityContext = nil
	if _, err := bed.kube.CoreV1().Pods(ns).Create(t.Context(), root, metav1.CreateOptions{}); err == nil {
		t.Error("a pod that the standard forbids was taken")
	}
	service(t, ns, "server", 8080)
	pods := startAll(t, ns, appPod("client", "serve"), appPod("server", "serve"))
	expectCaptured(t, pods...)
	results := get(t, pods[0], "-retry", "10s", "http://server:8080/")
	allServed(t, "in a restricted namespace", results)
	followAll(t, results)
}

// initContainers has the pod's first init container ask a captured server.
func initContainers(t *testing.T) {
	ns := newNamespace(t, captured())
	service(t, ns, "server", 8080)
	server := start(t, ns, appPod("server", "serve"))
	pod := appPod("starts", "serve")
	pod.Spec.InitContainers = []corev1.Container{appContainer("asks", "get", "-retry", "20s", "http://server:8080/")}
	pod = start(t, ns, pod)
	expectCaptured(t, pod, server)

	log, err := bed.kube.CoreV1().Pods(ns).GetLogs(pod.Name, &corev1.PodLogOptions{Container: "asks"}).DoRaw(t.Context())
	must(t, err)
	results := parseResults(t, string(log))
	allServed(t, "the init container", results)
	for _, h := range followAll(t, results) {
		if want := fmt.Sprintf("%s/%s", ns, pod.Name); h.out.Pod != want {
			t.Errorf("the proxy of %s took the init container's connection, want that of %s", h.out.Pod, want)
		}
	}
}
