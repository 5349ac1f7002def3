package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const (
	captureLabel = "weirmesh.io/capture"
	testLabel    = "weirmesh.io/e2e" // on every namespace of the tests
)

// How long things may take at most; on two busy cores, kubelet's own pauses
// after a failure (10 to 15 s) included.
const (
	startLimit = 60 * time.Second
	endLimit   = 60 * time.Second
	soon       = 15 * time.Second
)

// captured are the labels of a namespace whose pods are captured.
func captured() map[string]string { return map[string]string{captureLabel: "enabled"} }

// newNamespace makes a namespace for one test, which goes with the test. When
// the test failed, it says what was in it.
func newNamespace(t *testing.T, labels map[string]string) string {
	t.Helper()
	meta := metav1.ObjectMeta{GenerateName: "e2e-", Labels: map[string]string{testLabel: ""}}
	for key, value := range labels {
		meta.Labels[key] = value
	}
	ns, err := bed.kube.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: meta}, metav1.CreateOptions{})
	must(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), endLimit)
		defer cancel()
		if t.Failed() {
			t.Log(describe(ctx, ns.Name))
		}
		if err := bed.kube.CoreV1().Namespaces().Delete(ctx, ns.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	// Without it there are no pods, and the controller manager, which makes it, takes its time
	// where the API server was away.
	eventually(t, startLimit, "the default service account of "+ns.Name, func() error {
		_, err := bed.kube.CoreV1().ServiceAccounts(ns.Name).Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
	return ns.Name
}

// appPod is a pod of the test application, fit for the restricted Pod Security
// Standard.
func appPod(name string, args ...string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec:       appSpec(args...),
	}
}

func appSpec(args ...string) corev1.PodSpec {
	no, yes, grace := false, true, int64(1)
	return corev1.PodSpec{
		Containers:                    []corev1.Container{appContainer("app", args...)},
		TerminationGracePeriodSeconds: &grace,
		AutomountServiceAccountToken:  &no,
		EnableServiceLinks:            &no,
		SecurityContext: &corev1.PodSecurityContext{
			RunAsNonRoot:   &yes,
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
	}
}

func appContainer(name string, args ...string) corev1.Container {
	no := false
	c := corev1.Container{
		Name: name, Image: appImage, Args: args, ImagePullPolicy: corev1.PullNever,
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: &no,
			Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
	}
	if len(args) > 0 && args[0] == "serve" {
		c.ReadinessProbe = &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(8080)}},
			PeriodSeconds: 1, TimeoutSeconds: 5,
		}
	}
	return c
}

// onNode pins a pod to the i-th node, i from 0.
func onNode(pod *corev1.Pod, i int) *corev1.Pod {
	pod.Spec.NodeName = bed.Nodes[i].Name
	return pod
}

func labelled(pod *corev1.Pod, key, value string) *corev1.Pod {
	pod.Labels[key] = value
	return pod
}

func create(t *testing.T, namespace string, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	made, err := bed.kube.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{})
	must(t, err)
	return made
}

// start creates a pod and waits until it is ready.
func start(t *testing.T, namespace string, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	return waitReady(t, create(t, namespace, pod))
}

// startAll creates pods at once and waits until all are ready.
func startAll(t *testing.T, namespace string, pods ...*corev1.Pod) []*corev1.Pod {
	t.Helper()
	for i, pod := range pods {
		pods[i] = create(t, namespace, pod)
	}
	for i, pod := range pods {
		pods[i] = waitReady(t, pod)
	}
	return pods
}

// fresh reads a pod again; another of its name is an error.
func fresh(ctx context.Context, pod *corev1.Pod) (*corev1.Pod, error) {
	now, err := bed.kube.CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
	if err == nil && now.UID != pod.UID {
		return nil, fmt.Errorf("pod %s is another one now", pod.Name)
	}
	return now, err
}

func waitReady(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	return waitPod(t, pod, "to be ready", isReady)
}

func isReady(pod *corev1.Pod) bool {
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodReady {
			return condition.Status == corev1.ConditionTrue
		}
	}
	return false
}

func waitPod(t *testing.T, pod *corev1.Pod, what string, is func(*corev1.Pod) bool) *corev1.Pod {
	t.Helper()
	return waitPodFor(t, startLimit, pod, what, is)
}

func waitPodFor(t *testing.T, limit time.Duration, pod *corev1.Pod, what string, is func(*corev1.Pod) bool) *corev1.Pod {
	t.Helper()
	eventually(t, limit, "pod "+pod.Name+" "+what, func() error {
		now, err := fresh(t.Context(), pod)
		if err != nil {
			return err
		}
		if !is(now) {
			return fmt.Errorf("it is %s: %s", now.Status.Phase, reasons(now))
		}
		pod = now
		return nil
	})
	return pod
}

// reasons says what a pod's containers wait for.
func reasons(pod *corev1.Pod) string {
	var out []string
	for _, s := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
		switch {
		case s.State.Waiting != nil:
			out = append(out, s.Name+" waits: "+s.State.Waiting.Reason+" "+s.State.Waiting.Message)
		case s.State.Terminated != nil:
			out = append(out, s.Name+" ended: "+s.State.Terminated.Reason)
		case !s.Ready:
			out = append(out, s.Name+" is not ready")
		}
	}
	return strings.Join(out, "; ")
}

// neverRan fails the test if any container of the pod was ever created.
func neverRan(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	now, err := fresh(t.Context(), pod)
	must(t, err)
	if now.Status.Phase != corev1.PodPending {
		t.Errorf("pod %s is %s, it must not run", pod.Name, now.Status.Phase)
	}
	for _, s := range append(now.Status.InitContainerStatuses, now.Status.ContainerStatuses...) {
		if s.ContainerID != "" || s.State.Running != nil || s.State.Terminated != nil || s.RestartCount > 0 {
			t.Errorf("container %s of pod %s has run: %+v", s.Name, pod.Name, s)
		}
	}
}

// remove deletes a pod and waits until the API server no longer has it.
func remove(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	must(t, bed.kube.CoreV1().Pods(pod.Namespace).Delete(t.Context(), pod.Name, metav1.DeleteOptions{}))
	eventually(t, endLimit, "pod "+pod.Name+" to go", func() error {
		list, err := bed.kube.CoreV1().Pods(pod.Namespace).List(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + pod.Name})
		if err != nil {
			return err
		}
		for _, left := range list.Items {
			if left.UID == pod.UID {
				return fmt.Errorf("it is still there, %s", left.Status.Phase)
			}
		}
		return nil
	})
}

// patch merges a JSON patch into a pod.
func patch(t *testing.T, pod *corev1.Pod, merge string) {
	t.Helper()
	_, err := bed.kube.CoreV1().Pods(pod.Namespace).Patch(t.Context(), pod.Name, types.MergePatchType, []byte(merge), metav1.PatchOptions{})
	must(t, err)
}

// service makes a dual-stack Service for the pods of an app label.
func service(t *testing.T, namespace, app string, ports ...int32) *corev1.Service {
	t.Helper()
	dual := corev1.IPFamilyPolicyPreferDualStack
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: app},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": app}, IPFamilyPolicy: &dual},
	}
	for _, port := range ports {
		svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: fmt.Sprintf("p%d", port), Port: port})
	}
	made, err := bed.kube.CoreV1().Services(namespace).Create(t.Context(), svc, metav1.CreateOptions{})
	must(t, err)
	return made
}

// sandboxFailed is the reason of kubelet's event for a pod whose network failed.
const sandboxFailed = "FailedCreatePodSandBox"

// waitEvent waits for an event on the pod, of that reason and holding all of
// words, and logs it.
func waitEvent(t *testing.T, pod *corev1.Pod, reason string, words ...string) {
	t.Helper()
	eventually(t, startLimit, fmt.Sprintf("a %s event on pod %s with %q", reason, pod.Name, words), func() error {
		events, err := bed.kube.CoreV1().Events(pod.Namespace).List(t.Context(), metav1.ListOptions{
			FieldSelector: "involvedObject.uid=" + string(pod.UID),
		})
		if err != nil {
			return err
		}
		var seen []string
		for _, event := range events.Items {
			if event.Reason == reason && containsAll(event.Message, words) {
				t.Logf("%s: %s", event.Reason, event.Message)
				return nil
			}
			seen = append(seen, event.Reason+": "+event.Message)
		}
		return fmt.Errorf("there are only %q", seen)
	})
}

func containsAll(s string, words []string) bool {
	for _, word := range words {
		if !strings.Contains(s, word) {
			return false
		}
	}
	return true
}
