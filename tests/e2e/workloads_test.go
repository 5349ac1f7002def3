package e2e

import (
	"fmt"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// template is a pod template of the test application, and the selector of it.
func template(app string, args ...string) (corev1.PodTemplateSpec, *metav1.LabelSelector) {
	labels := map[string]string{"app": app}
	return corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: appSpec(args...)},
		&metav1.LabelSelector{MatchLabels: labels}
}

// waitPods waits until n pods of an app label are ready.
func waitPods(t *testing.T, namespace, app string, n int) []*corev1.Pod {
	t.Helper()
	var pods []*corev1.Pod
	eventually(t, startLimit, fmt.Sprintf("%d pods of %s", n, app), func() error {
		list, err := bed.kube.CoreV1().Pods(namespace).List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + app})
		if err != nil {
			return err
		}
		if len(list.Items) != n {
			return fmt.Errorf("there are %d", len(list.Items))
		}
		pods = nil
		for i := range list.Items {
			pods = append(pods, &list.Items[i])
		}
		return nil
	})
	for i, pod := range pods {
		pods[i] = waitReady(t, pod)
	}
	return pods
}

func newDeployment(t *testing.T, namespace, app string, replicas int32, args ...string) {
	t.Helper()
	pod, selector := template(app, args...)
	_, err := bed.kube.AppsV1().Deployments(namespace).Create(t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: app},
		Spec:       appsv1.DeploymentSpec{Replicas: &replicas, Selector: selector, Template: pod},
	}, metav1.CreateOptions{})
	must(t, err)
}

func deployment(t *testing.T) {
	ns := newNamespace(t, captured())
	newDeployment(t, ns, "web", 2, "serve")
	expectCaptured(t, waitPods(t, ns, "web", 2)...)
}

// statefulSet deletes a pod: the one that takes its name is another pod, with a
// proxy of its own, and answers under the name.
func statefulSet(t *testing.T) {
	ns := newNamespace(t, captured())
	replicas := int32(1)
	pod, selector := template("db", "serve")
	_, err := bed.kube.AppsV1().StatefulSets(ns).Create(t.Context(), &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Name: "db"},
		Spec:       appsv1.StatefulSetSpec{Replicas: &replicas, Selector: selector, Template: pod, ServiceName: "db"},
	}, metav1.CreateOptions{})
	must(t, err)
	service(t, ns, "db", 8080)
	client := start(t, ns, appPod("client", "serve"))

	first := waitPods(t, ns, "db", 1)[0]
	expectCaptured(t, first)
	before := proxyOf(t, first)
	allServed(t, "the first db-0", get(t, client, "-retry", "10s", "http://db:8080/"))
	remove(t, first)
	second := waitPods(t, ns, "db", 1)[0]
	if second.Name != first.Name || second.UID == first.UID {
		t.Fatalf("%s (%s) came after %s (%s), want another of the same name", second.Name, second.UID, first.Name, first.UID)
	}
	expectCaptured(t, second)
	if after := proxyOf(t, second); after.pid == before.pid {
		t.Errorf("the proxy of the first db-0 (pid %d) serves the second", before.pid)
	}
	results := get(t, client, "-n", "5", "-retry", "10s", "http://db:8080/")
	allServed(t, "the second db-0", results)
	for _, h := range followAll(t, results) {
		if h.in.Server != second.Status.PodIP+":8080" {
			t.Errorf("the request went to %s, want %s, the second db-0", h.in.Server, second.Status.PodIP)
		}
	}
}

func daemonSet(t *testing.T) {
	ns := newNamespace(t, captured())
	pod, selector := template("each", "serve")
	_, err := bed.kube.AppsV1().DaemonSets(ns).Create(t.Context(), &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "each"},
		Spec:       appsv1.DaemonSetSpec{Selector: selector, Template: pod},
	}, metav1.CreateOptions{})
	must(t, err)
	expectCaptured(t, waitPods(t, ns, "each", len(bed.Nodes))...)
}

// job asks a captured server and must end: a sidecar container would keep it.
func job(t *testing.T) {
	ns := newNamespace(t, captured())
	service(t, ns, "server", 8080)
	start(t, ns, appPod("server", "serve"))
	never := int32(0)
	pod, _ := template("asks", "get", "-n", "5", "-interval", "200ms", "-retry", "20s", "http://server:8080/")
	pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	made, err := bed.kube.BatchV1().Jobs(ns).Create(t.Context(), &batchv1.Job{
		ObjectMeta: metav1.ObjectMeta{Name: "asks"},
		Spec:       batchv1.JobSpec{BackoffLimit: &never, Template: pod},
	}, metav1.CreateOptions{})
	must(t, err)
	eventually(t, startLimit, "the Job to complete", func() error {
		now, err := bed.kube.BatchV1().Jobs(ns).Get(t.Context(), made.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range now.Status.Conditions {
			if condition.Type == batchv1.JobComplete && condition.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("%+v", now.Status)
	})
	pods, err := bed.kube.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=asks"})
	must(t, err)
	if len(pods.Items) != 1 {
		t.Fatalf("the Job took %d pods, want 1", len(pods.Items))
	}
	log, err := bed.kube.CoreV1().Pods(ns).GetLogs(pods.Items[0].Name, &corev1.PodLogOptions{}).DoRaw(t.Context())
	must(t, err)
	results := parseResults(t, string(log))
	allServed(t, "the Job's requests", results)
	followAll(t, results)
}
