package e2e

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/telemetry"
)

// asServiceAccount has a pod run as a service account, and makes that.
func asServiceAccount(t *testing.T, namespace, name string, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
	_, err := bed.kube.CoreV1().ServiceAccounts(namespace).Create(t.Context(), account, metav1.CreateOptions{})
	must(t, err)
	pod.Spec.ServiceAccountName = name
	return pod
}

// whoMayCall has policies decide between callers of three service accounts, and one that
// has no identity, on both nodes and in all ways.
func whoMayCall(t *testing.T) {
	ns := newNamespace(t, captured())
	serviceAll(t, ns, "back")
	idle := func(name string) *corev1.Pod { return appPod(name, "sleep", "1h") }
	pods := startAll(t, ns, onNode(serveAll("back"), 1),
		asServiceAccount(t, ns, "web", onNode(idle("web"), 0)),
		asServiceAccount(t, ns, "batch", onNode(idle("batch"), 1)),
		asServiceAccount(t, ns, "guest", onNode(idle("guest"), 0)),
		labelled(onNode(idle("plain"), 0), captureLabel, "disabled"))
	web, batch, guest, callers := pods[1], pods[2], pods[3], pods[1:]
	for _, pod := range pods[:4] {
		identified(t, pod)
	}
	all := expectedOutcomes(func(string) bool { return true })
	none := expectedOutcomes(func(string) bool { return false })
	outcomesBecome(t, "without a policy", callers, map[string]string{"web": all, "batch": all, "guest": all, "plain": all})

	must(t, createPolicy(t, ns, authorizationPolicy, "callers", `{"action":"ALLOW","podSelector":{"matchLabels":{"app":"back"}},"rules":[
		{"sources":[{"type":"ServiceAccount","serviceAccount":{"name":"web"}}]},
		{"sources":[{"type":"ServiceAccount","serviceAccount":{"name":"batch"}}],"http":{"methods":["GET"],"paths":[{"type":"PathPrefix","value":"/public"}]}}]}`))
	outcomesBecome(t, "with ALLOW", callers, map[string]string{"web": all, "batch": none, "guest": none, "plain": none})
	asked(t, ns, time.Now())
	for _, c := range []struct {
		from *corev1.Pod
		path string
		want string
	}{{batch, "public/a", served}, {batch, "private/a", "403"}, {guest, "public/a", "403"}} {
		if got := overHTTP(t, c.from, "back", c.path); got != c.want {
			t.Errorf("%s asked for /%s and got %s, want %s", c.from.Name, c.path, got, c.want)
		}
	}
	denied(t, ns, "/private/a", "batch", "no policy allowed it")

	talk := begin(t, web, "talk", "back:9000")
	waitSaid(t, talk, "connected")
	must(t, createPolicy(t, ns, authorizationPolicy, "no-talk", `{"action":"DENY","rules":[
		{"sources":[{"type":"ServiceAccount","serviceAccount":{"name":"web"}}],"networkAttributes":{"ports":[9000]}}]}`))
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	// It talks until it is told to end, which it is not.
	if said, err := talk.wait(ctx); outcomeOfTalk(err) != "reset" {
		t.Errorf("the connection that stays got %v, want a reset; it said %q", err, said)
	}
	outcomesBecome(t, "with DENY of a port", []*corev1.Pod{web, batch}, map[string]string{
		"web": expectedOutcomes(func(way string) bool { return way != "TCP" }), "batch": none})

	for _, name := range []string{"no-talk", "callers"} {
		must(t, deletePolicy(t, ns, authorizationPolicy, name))
	}
	outcomesBecome(t, "without a policy again", []*corev1.Pod{web, guest}, map[string]string{"web": all, "guest": all})
}

// outcomesBecome waits until each caller gets from back what it is to get.
func outcomesBecome(t *testing.T, when string, callers []*corev1.Pod, want map[string]string) {
	t.Helper()
	eventually(t, startLimit, "outcomes "+when, func() error {
		got := map[string]string{}
		for _, pod := range callers {
			got[pod.Name] = outcomes(t, pod, "back")
		}
		if diff := cmp.Diff(want, got); diff != "" {
			return fmt.Errorf("-want +got:\n%s", diff)
		}
		return nil
	})
}

// denied waits until back's proxy has recorded that a request of a service account was
// refused, and by what.
func denied(t *testing.T, ns, path, account, by string) {
	t.Helper()
	caller := "spiffe://cluster.local/ns/" + ns + "/sa/" + account
	waitRecord(t, "a refusal of "+path, func(r telemetry.Record) bool {
		return r.Pod == ns+"/back" && r.Direction == "inbound" && r.Reason == "policy_denied" && r.Policy == by &&
			r.PeerIdentity == caller && r.HTTP != nil && r.Path == path
	})
}

// asked waits until kubelet, which no policy allows, has asked back how it is, later than
// that, and was answered.
func asked(t *testing.T, ns string, since time.Time) {
	t.Helper()
	waitRecord(t, "kubelet's request", func(r telemetry.Record) bool {
		return r.Pod == ns+"/back" && r.Direction == "inbound" && r.HTTP != nil && r.Path == "/healthz" &&
			r.Status == http.StatusOK && r.Timestamp.After(since)
	})
}

func deletePolicy(t *testing.T, namespace string, kind policyKind, name string) error {
	t.Helper()
	return bed.kube.CoreV1().RESTClient().Delete().
		AbsPath("/apis", v1alpha1.GroupVersion.String(), "namespaces", namespace, kind.resource, name).
		SetHeader("Accept", "application/json").Do(t.Context()).Error()
}
