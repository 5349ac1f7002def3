package cluster

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	policyfake "github.com/weirmesh/weir/agent/api/client/fake"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// These tests run against client-go's fake clientset, which keeps objects in
// memory: no HTTP, no streamed lists, and it ignores field selectors. What only a
// real API server shows is tested on the cluster, in tests/e2e.

func meta(namespace, name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: namespace, Name: name, ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "kubelet"}}}
}

func apiPod(name, uid, capture string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: meta("shop", name)}
	p.UID = types.UID(uid)
	p.Labels = map[string]string{"app": "x", "weirmesh.io/capture": capture}
	p.Spec.NodeName = "n1"
	return p
}

func apiService() *corev1.Service {
	s := &corev1.Service{ObjectMeta: meta("shop", "back")}
	s.Spec.ClusterIPs = []string{"10.96.0.7"}
	s.Spec.Ports = []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}}
	return s
}

func apiSlice(addrs ...string) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{ObjectMeta: meta("shop", "back-4"), AddressType: discoveryv1.AddressTypeIPv4}
	s.Labels = map[string]string{discoveryv1.LabelServiceName: "back"}
	s.Ports = []discoveryv1.EndpointPort{{Name: new("http"), Port: new(int32(8080)), Protocol: new(corev1.ProtocolTCP)}}
	for _, a := range addrs {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}})
	}
	return s
}

// runAPI runs RunAPI on a fake clientset, of a server without the CRDs of routes,
// until the test ends.
func runAPI(t *testing.T, client *fake.Clientset) (*Store, *logBuffer) {
	t.Helper()
	return runGatewayAPI(t, client, newGateway())
}

func runGatewayAPI(t *testing.T, client *fake.Clientset, routes *gatewayServer) (*Store, *logBuffer) {
	t.Helper()
	return runPolicyAPI(t, client, routes, policyfake.New())
}

func runPolicyAPI(t *testing.T, client *fake.Clientset, routes *gatewayServer, policies *policyfake.Client) (*Store, *logBuffer) {
	t.Helper()
	s, log := NewStore(), &logBuffer{}
	core, own := watching(&client.Fake, client.Tracker()), watching(&policies.Fake, policies.Tracker())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- RunAPI(ctx, s, &API{client: client, gateway: routes, policies: policies, node: "n1", log: log.logger()}, LastGood{})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	if err := s.WaitSynced(t.Context()); err != nil {
		t.Fatal(err)
	}
	// What changes between a list and its watch the fakes tell nobody. What is not served
	// is never watched.
	all := func() bool {
		routes.mu.Lock()
		defer routes.mu.Unlock()
		return core() && own() && len(routes.streams) >= len(routes.served)
	}
	bubble := time.Now().Year() == 2000 // testing/synctest's clock: there nothing is late
	for end := time.Now().Add(time.Second); !bubble && !all() && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	return s, log
}

// watching reports whether there is a watch of every resource of a fake that was listed.
func watching(f *k8stesting.Fake, tracker k8stesting.ObjectTracker) func() bool {
	var mu sync.Mutex
	watched := map[string]int{}
	f.PrependWatchReactor("*", func(a k8stesting.Action) (bool, watch.Interface, error) {
		var opts metav1.ListOptions
		if w, ok := a.(k8stesting.WatchActionImpl); ok {
			opts = w.ListOptions
		}
		stream, err := tracker.Watch(a.GetResource(), a.GetNamespace(), opts)
		mu.Lock()
		defer mu.Unlock()
		watched[a.GetResource().Resource]++
		return true, stream, err
	})
	return func() bool {
		actions := f.Actions() // not with mu: reactors are called with f's own lock
		mu.Lock()
		defer mu.Unlock()
		listed := map[string]int{}
		for _, a := range actions {
			if a.GetVerb() == "list" {
				listed[a.GetResource().Resource]++
			}
		}
		for resource := range listed {
			want := 1
			if resource == "pods" {
				want = 2 // of this node, and of all
			}
			if watched[resource] < want {
				return false
			}
		}
		return true
	}
}

func TestAnAPIServerIsFollowed(t *testing.T) {
	ns := &corev1.Namespace{ObjectMeta: meta("", "shop")}
	ns.Labels = map[string]string{"weirmesh.io/capture": "enabled", "kubernetes.io/metadata.name": "shop"}
	front := apiPod("front", "u-1", "enabled")
	front.OwnerReferences = []metav1.OwnerReference{{Kind: "StatefulSet", Name: "web", Controller: new(true)}}
	client := fake.NewClientset(ns, front, apiService(), apiSlice("10.0.0.1"))
	s, _ := runAPI(t, client)
	ctx := t.Context()

	pod, namespace, err := s.WaitPod(ctx, "shop", "front", "u-1")
	if err != nil {
		t.Fatal(err)
	}
	want := model.Pod{UID: "u-1", Namespace: "shop", Name: "front", Workload: "web", Node: "n1", Labels: map[string]string{"app": "x", "weirmesh.io/capture": "enabled"}}
	if diff := cmp.Diff(want, pod); diff != "" {
		t.Errorf("pod: -want +got:\n%s", diff)
	}
	if diff := cmp.Diff(model.Namespace{Name: "shop", Labels: map[string]string{"weirmesh.io/capture": "enabled"}}, namespace); diff != "" {
		t.Errorf("namespace: -want +got:\n%s", diff)
	}

	dial := netip.MustParseAddrPort("10.96.0.7:80")
	endpoints := func(want ...string) func() bool {
		d := route.Destination{Service: "shop/back", Protocol: route.HTTP}
		for _, w := range want {
			d.Endpoints = append(d.Endpoints, route.Endpoint{Addr: netip.MustParseAddrPort(w)})
		}
		return func() bool { return cmp.Equal(d, told(s, dial), netipValues) }
	}
	eventually(t, "one endpoint", endpoints("10.0.0.1:8080"))
	check(t)(client.DiscoveryV1().EndpointSlices("shop").Update(ctx, apiSlice("10.0.0.1", "10.0.0.2"), metav1.UpdateOptions{}))
	eventually(t, "two endpoints", endpoints("10.0.0.1:8080", "10.0.0.2:8080"))
	if err := client.CoreV1().Services("shop").Delete(ctx, "back", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no Service", func() bool { return told(s, dial).Service == "" })

	check(t)(client.CoreV1().Pods("shop").Create(ctx, apiPod("back", "u-2", "enabled"), metav1.CreateOptions{}))
	if _, _, err := s.WaitPod(ctx, "shop", "back", "u-2"); err != nil {
		t.Error(err)
	}
	if err := client.CoreV1().Pods("shop").Delete(ctx, "front", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one pod", func() bool { return podNames(s) == "shop/back=enabled" })
}

// check fails the test if a call to the fake does.
func check(t *testing.T) func(runtime.Object, error) {
	return func(_ runtime.Object, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestOnlyThisNodeAndItsPodsAreAskedFor, and once the pods of all nodes, as peers.
func TestOnlyThisNodeAndItsPodsAreAskedFor(t *testing.T) {
	client := fake.NewClientset()
	runAPI(t, client)
	eventually(t, "a watch on each of six kinds", func() bool {
		n := 0
		for _, a := range client.Actions() {
			if a.GetVerb() == "watch" {
				n++
			}
		}
		return n == 6
	})
	peers := map[string]bool{}
	for _, a := range client.Actions() {
		var got string
		switch a := a.(type) {
		case k8stesting.ListAction:
			got = a.GetListRestrictions().Fields.String()
		case k8stesting.WatchAction:
			got = a.GetWatchRestrictions().Fields.String()
		}
		want := map[string]string{"pods": "spec.nodeName=n1", "nodes": "metadata.name=n1"}[a.GetResource().Resource]
		if got == "" && a.GetResource().Resource == "pods" && !peers[a.GetVerb()] {
			peers[a.GetVerb()] = true
			continue
		}
		if got != want {
			t.Errorf("%s %s: fields %q, want %q", a.GetVerb(), a.GetResource().Resource, got, want)
		}
	}
}

func TestAnAPIServerThatIsAwayAtTheStartIsRetried(t *testing.T) {
	client := fake.NewClientset()
	failures := 1
	client.PrependReactor("list", "services", func(k8stesting.Action) (bool, runtime.Object, error) {
		if failures--; failures >= 0 {
			return true, nil, errors.New("connect: connection refused")
		}
		return false, nil, nil
	})
	_, log := runAPI(t, client) // returns when synced
	for _, line := range []string{"API server does not answer", "API server answers again"} {
		if n := strings.Count(log.String(), line); n != 1 {
			t.Errorf("%q was logged %d times:\n%s", line, n, log)
		}
	}
}

func TestAnObjectThatDoesNotReadIsLeftOut(t *testing.T) {
	bad := apiService()
	bad.Name, bad.Spec.ClusterIPs = "bad", []string{"x"}
	s, log := runAPI(t, fake.NewClientset(apiService(), bad))
	if got := told(s, netip.MustParseAddrPort("10.96.0.7:80")).Service; got != "shop/back" {
		t.Errorf("the good one is left out too: %q", got)
	}
	if want := `msg="object left out" kind=services namespace=shop name=bad error="spec.clusterIPs[0]: ParseAddr`; !strings.Contains(log.String(), want) {
		t.Errorf("not in the log: %s\n%s", want, log)
	}
}

func TestThePodTheCacheLacksIsAskedFor(t *testing.T) {
	elsewhere := apiPod("elsewhere", "u-2", "enabled")
	elsewhere.Spec.NodeName = "n2"
	client := fake.NewClientset(apiPod("front", "u-1", "enabled"), elsewhere, &corev1.Namespace{ObjectMeta: meta("", "shop")})
	api := &API{client: client, node: "n1", log: slog.New(slog.DiscardHandler)}

	pod, ns, err := api.lookup(t.Context(), "shop", "front")
	if err != nil || pod.UID != "u-1" || ns.Name != "shop" {
		t.Errorf("got %v, %v, %v", pod, ns, err)
	}
	for name, want := range map[string]string{
		"nobody":    `pods "nobody" not found`,
		"elsewhere": `the pod is bound to node "n2", this is "n1"`,
	} {
		if _, _, err := api.lookup(t.Context(), "shop", name); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestEventsAreWritten(t *testing.T) {
	client := fake.NewClientset()
	recorder := (&API{client: client, node: "n1", log: slog.New(slog.DiscardHandler)}).NewRecorder()
	defer recorder.broadcaster.Shutdown()
	recorder.PodEvent(model.Pod{Namespace: "shop", Name: "front", UID: "u-1"}, EventWarning, CaptureFailed, strings.Repeat("x", 2000))

	var got *corev1.EventList
	eventually(t, "one event", func() bool {
		var err error
		got, err = client.CoreV1().Events("shop").List(t.Context(), metav1.ListOptions{})
		return err == nil && len(got.Items) == 1
	})
	event := got.Items[0]
	want := corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: "shop", Name: "front", UID: "u-1"}
	if diff := cmp.Diff(want, event.InvolvedObject); diff != "" {
		t.Error(diff)
	}
	if event.Type != "Warning" || event.Reason != "CaptureFailed" || len(event.Message) != maxEventMessage {
		t.Errorf("got %s %s, %d bytes", event.Type, event.Reason, len(event.Message))
	}
}

func TestEventsOnTheNodeAreWritten(t *testing.T) {
	client := fake.NewClientset()
	recorder := (&API{client: client, node: "n1", log: slog.New(slog.DiscardHandler)}).NewRecorder()
	defer recorder.broadcaster.Shutdown()
	recorder.NodeEvent(EventWarning, ConnectTimeBalancing, "elsewhere")

	var got *corev1.EventList
	eventually(t, "one event", func() bool {
		var err error
		got, err = client.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{})
		return err == nil && len(got.Items) == 1
	})
	want := corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: "n1", UID: "n1"}
	if diff := cmp.Diff(want, got.Items[0].InvolvedObject); diff != "" {
		t.Error(diff)
	}
}

func TestEventsAreLoggedWhereThereIsNoAPIServer(t *testing.T) {
	var log logBuffer
	recorder := &Recorder{Log: log.logger()}
	recorder.PodEvent(model.Pod{Namespace: "shop", Name: "front"}, EventWarning, ProxyRestarted, "exit code 2")
	recorder.NodeEvent(EventNormal, ConnectTimeBalancing, "elsewhere")
	for _, want := range []string{
		`level=WARN msg=event pod=shop/front reason=ProxyRestarted message="exit code 2"`,
		`level=INFO msg=event reason=ConnectTimeBalancing message=elsewhere`,
	} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("got %s", log.String())
		}
	}
}
