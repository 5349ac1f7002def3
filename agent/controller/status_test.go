package controller

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1alpha2 "sigs.k8s.io/gateway-api/apis/v1alpha2"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"
)

func aService(name string) *corev1.Service {
	s := &corev1.Service{}
	s.Namespace, s.Name = "shop", name
	s.Spec.ClusterIPs = []string{"10.96.0.7"}
	s.Spec.Ports = []corev1.ServicePort{{Name: "http", Port: 80}, {Name: "admin", Port: 90}}
	return s
}

func toServices(names ...string) gatewayv1.CommonRouteSpec {
	var spec gatewayv1.CommonRouteSpec
	for _, name := range names {
		p := gatewayv1.ParentReference{Group: new(gatewayv1.Group("")), Kind: new(gatewayv1.Kind("Service")), Name: gatewayv1.ObjectName(name)}
		if name == "gateway" {
			p.Group, p.Kind = new(gatewayv1.Group(gatewayv1.GroupName)), new(gatewayv1.Kind("Gateway"))
		}
		spec.ParentRefs = append(spec.ParentRefs, p)
	}
	return spec
}

func anHTTPRoute(name string, parents ...string) *gatewayv1.HTTPRoute {
	r := &gatewayv1.HTTPRoute{}
	r.Namespace, r.Name, r.Generation = "shop", name, 3
	r.Spec.CommonRouteSpec = toServices(parents...)
	return r
}

// entry is one of a status, as somebody wrote it at noon.
func entry(controller gatewayv1.GatewayController, parent string, conditions ...metav1.Condition) gatewayv1.RouteParentStatus {
	return gatewayv1.RouteParentStatus{ControllerName: controller, ParentRef: toServices(parent).ParentRefs[0], Conditions: conditions}
}

func condition(kind, status, reason, message string, generation int64) metav1.Condition {
	return metav1.Condition{
		Type: kind, Status: metav1.ConditionStatus(status), Reason: reason, Message: message,
		ObservedGeneration: generation, LastTransitionTime: metav1.NewTime(noon),
	}
}

// brief is a status in words; a time after noon is marked with !.
func brief(parents []gatewayv1.RouteParentStatus) []string {
	var out []string
	for _, p := range parents {
		var b strings.Builder
		fmt.Fprintf(&b, "%s %s:", strings.TrimPrefix(string(p.ControllerName), "weirmesh.io/"), p.ParentRef.Name)
		for _, c := range p.Conditions {
			fmt.Fprintf(&b, " %s=%s/%s@%d", c.Type, c.Status, c.Reason, c.ObservedGeneration)
			if !c.LastTransitionTime.Equal(new(metav1.NewTime(noon))) {
				b.WriteString("!")
			}
		}
		out = append(out, b.String())
	}
	return out
}

func TestParentStatus(t *testing.T) {
	accepted, resolved := condition("Accepted", "True", "Accepted", "", 3), condition("ResolvedRefs", "True", "ResolvedRefs", "", 3)
	other := entry("example.com/gateways", "gateway", condition("Accepted", "False", "Pending", "", 1))
	const good = " Accepted=True/Accepted@3! ResolvedRefs=True/ResolvedRefs@3!"
	tests := []struct {
		promise string
		parents []string
		have    []gatewayv1.RouteParentStatus
		want    []string // nil: nothing is to be written
	}{
		{"an entry for each Service, none for a Gateway", []string{"gateway", "back", "nobody"}, nil,
			[]string{"mesh-controller back:" + good, "mesh-controller nobody: Accepted=False/NoMatchingParent@3! ResolvedRefs=True/ResolvedRefs@3!"}},
		{"nothing for a route of Gateways", []string{"gateway"}, nil, nil},
		{"what is there already is not written", []string{"back"}, []gatewayv1.RouteParentStatus{entry(ControllerName, "back", accepted, resolved)}, nil},
		{"others' entries stay, where they are", []string{"gateway", "back"}, []gatewayv1.RouteParentStatus{other, entry(ControllerName, "nobody", accepted), other},
			[]string{"example.com/gateways gateway: Accepted=False/Pending@1", "example.com/gateways gateway: Accepted=False/Pending@1", "mesh-controller back:" + good}},
		{"others' entries about a Service stay", []string{"back"}, []gatewayv1.RouteParentStatus{entry("example.com/mesh", "back", accepted)},
			[]string{"example.com/mesh back: Accepted=True/Accepted@3", "mesh-controller back:" + good}},
		{"our entries about what is no parent any more go", []string{"gateway"}, []gatewayv1.RouteParentStatus{other, entry(ControllerName, "back", accepted, resolved)},
			[]string{"example.com/gateways gateway: Accepted=False/Pending@1"}},
		{"one of two equal entries goes", []string{"back"}, []gatewayv1.RouteParentStatus{entry(ControllerName, "back", accepted, resolved), entry(ControllerName, "back", accepted, resolved)},
			[]string{"mesh-controller back: Accepted=True/Accepted@3 ResolvedRefs=True/ResolvedRefs@3"}},
		{"a new generation is observed, and its time is the old one", []string{"back"},
			[]gatewayv1.RouteParentStatus{entry(ControllerName, "back", condition("Accepted", "True", "Accepted", "", 2), condition("ResolvedRefs", "True", "ResolvedRefs", "", 2))},
			[]string{"mesh-controller back: Accepted=True/Accepted@3 ResolvedRefs=True/ResolvedRefs@3"}},
		{"a status that turns has a new time", []string{"back"},
			[]gatewayv1.RouteParentStatus{entry(ControllerName, "back", condition("Accepted", "False", "Conflicted", "", 3), resolved)},
			[]string{"mesh-controller back: Accepted=True/Accepted@3! ResolvedRefs=True/ResolvedRefs@3"}},
		{"what is no longer partly invalid does not say so", []string{"back"},
			[]gatewayv1.RouteParentStatus{entry(ControllerName, "back", accepted, resolved, condition("PartiallyInvalid", "True", "UnsupportedValue", "", 3))},
			[]string{"mesh-controller back: Accepted=True/Accepted@3 ResolvedRefs=True/ResolvedRefs@3"}},
		{"conditions of other types stay", []string{"back"},
			[]gatewayv1.RouteParentStatus{entry(ControllerName, "back", accepted, condition("Audited", "True", "Audited", "", 3))},
			[]string{"mesh-controller back: Accepted=True/Accepted@3 Audited=True/Audited@3 ResolvedRefs=True/ResolvedRefs@3!"}},
	}
	for _, tt := range tests {
		t.Run(tt.promise, func(t *testing.T) {
			w := newRouteWatches()
			r := anHTTPRoute("canary", tt.parents...)
			r.Status.Parents = tt.have
			before := brief(tt.have)
			if err := errors.Join(w.services.Add(aService("back")), w.routes[toRoute(r).kind].Add(r)); err != nil {
				t.Fatal(err)
			}
			view := w.view()
			got, differs := parentStatus(view.routes[0], view.verdicts(view.routes[0]), nil, true, noon.Add(time.Hour))
			if differs != (tt.want != nil) {
				t.Errorf("to be written: %v", differs)
			}
			if diff := cmp.Diff(tt.want, brief(got)); differs && diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if diff := cmp.Diff(before, brief(r.Status.Parents)); diff != "" {
				t.Errorf("what was there is another now:\n%s", diff)
			}
		})
	}
}

func TestAMessageIsNoLongerThanItMayBe(t *testing.T) {
	r := anHTTPRoute("canary", "back")
	for range 16 {
		rule := gatewayv1.HTTPRouteRule{}
		for range 16 {
			rule.BackendRefs = append(rule.BackendRefs, gatewayv1.HTTPBackendRef{BackendRef: gatewayv1.BackendRef{
				BackendObjectReference: gatewayv1.BackendObjectReference{Name: gatewayv1.ObjectName(strings.Repeat("x", 253)), Port: new(gatewayv1.PortNumber(1))},
			}})
		}
		r.Spec.Rules = append(r.Spec.Rules, rule)
	}
	w := newRouteWatches()
	o := toRoute(r)
	got, _ := parentStatus(o, w.view().verdicts(o), nil, true, noon)
	if n := len(got[0].Conditions[1].Message); n != maxMessage {
		t.Errorf("%d bytes", n)
	}
}

// statusOf lets some time pass first.
func statusOf(t *testing.T, routes *gatewayfake.Clientset, name string) []string {
	t.Helper()
	time.Sleep(time.Second)
	synctest.Wait()
	r, err := routes.GatewayV1().HTTPRoutes("shop").Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, line := range brief(r.Status.Parents) {
		out = append(out, strings.ReplaceAll(line, "!", ""))
	}
	return out
}

func TestTheLeaderWritesStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		grpc := &gatewayv1.GRPCRoute{}
		grpc.Namespace, grpc.Name, grpc.Spec.CommonRouteSpec = "shop", "calls", toServices("front")
		tcp := &gatewayv1.TCPRoute{}
		tcp.Namespace, tcp.Name, tcp.Spec.CommonRouteSpec, tcp.Spec.Rules = "shop", "raw", toServices("back"), []gatewayv1.TCPRouteRule{{}}
		routes := gatewayfake.NewClientset(anHTTPRoute("canary", "back"), anHTTPRoute("edge", "gateway"), grpc, tcp)
		client := fake.NewClientset(aService("back"))
		startReplicaWith(t, client, routes, "a")
		startReplicaWith(t, client, routes, "b")
		if diff := cmp.Diff([]string{"mesh-controller back: Accepted=True/Accepted@3 ResolvedRefs=True/ResolvedRefs@3"}, statusOf(t, routes, "canary")); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if got := statusOf(t, routes, "edge"); got != nil {
			t.Errorf("a route of a Gateway: %v", got)
		}
		raw, err := routes.GatewayV1().TCPRoutes("shop").Get(t.Context(), "raw", metav1.GetOptions{})
		if err != nil || len(raw.Status.Parents) != 1 || raw.Status.Parents[0].Conditions[0].Reason != "Conflicted" {
			t.Errorf("a TCPRoute behind an HTTPRoute: %+v, %v", raw.Status, err)
		}
		calls, err := routes.GatewayV1().GRPCRoutes("shop").Get(t.Context(), "calls", metav1.GetOptions{})
		if err != nil || len(calls.Status.Parents) != 1 || calls.Status.Parents[0].Conditions[0].Reason != "NoMatchingParent" {
			t.Errorf("a GRPCRoute of nothing: %+v, %v", calls.Status, err)
		}

		check(t)(client.CoreV1().Services("shop").Create(t.Context(), aService("front"), metav1.CreateOptions{}))
		statusOf(t, routes, "canary")
		if calls, err = routes.GatewayV1().GRPCRoutes("shop").Get(t.Context(), "calls", metav1.GetOptions{}); err != nil || calls.Status.Parents[0].Conditions[0].Reason != "Accepted" {
			t.Errorf("its Service has come: %+v, %v", calls.Status, err)
		}
		patches := 0
		for _, a := range routes.Actions() {
			if a.GetVerb() == "patch" {
				patches++
				if a.GetSubresource() != "status" {
					t.Errorf("%s is patched, not its status", a.GetResource().Resource)
				}
			}
		}
		if patches != 4 {
			t.Errorf("%d patches, not one for each change of each route", patches)
		}
	})
}

func TestAStatusThatIsRefusedIsTriedAgain(t *testing.T) {
	for _, tt := range []struct {
		name   string
		err    error
		logged int
	}{
		// What has changed the route shows on the watch.
		{"a conflict", apierrors.NewConflict(schema.GroupResource{Resource: "httproutes"}, "canary", errors.New("changed")), 0},
		{"a refusal", errors.New("etcdserver: request timed out"), 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				routes := gatewayfake.NewClientset(anHTTPRoute("canary", "back"))
				failures := 1
				routes.PrependReactor("patch", "httproutes", func(k8stesting.Action) (bool, runtime.Object, error) {
					failures--
					return failures >= 0, nil, tt.err
				})
				r := startReplicaWith(t, fake.NewClientset(aService("back")), routes, "a")
				time.Sleep(100 * time.Millisecond)
				if tt.logged == 0 {
					changed := anHTTPRoute("canary", "back")
					changed.Generation = 4
					check(t)(routes.GatewayV1().HTTPRoutes("shop").Update(t.Context(), changed, metav1.UpdateOptions{}))
				}
				time.Sleep(time.Second)
				if got := statusOf(t, routes, "canary"); len(got) != 1 {
					t.Error("it was not tried again")
				}
				r.stop()
				if n := strings.Count(r.log.String(), "status not written; trying again"); n != tt.logged {
					t.Errorf("logged %d times:\n%s", n, r.log)
				}
			})
		})
	}
}

func TestAnOldTCPRouteIsWrittenInItsVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := &gatewayv1alpha2.TCPRoute{}
		old.Namespace, old.Name, old.Spec.CommonRouteSpec = "shop", "raw", toServices("back")
		old.Spec.Rules = []gatewayv1alpha2.TCPRouteRule{{}}
		routes := gatewayfake.NewClientset(old)
		routes.PrependReactor("list", "tcproutes", func(a k8stesting.Action) (bool, runtime.Object, error) {
			return a.GetResource().Version == "v1", nil, apierrors.NewNotFound(a.GetResource().GroupResource(), "")
		})
		startReplicaWith(t, fake.NewClientset(aService("back")), routes, "a")
		time.Sleep(time.Second)
		synctest.Wait()
		got, err := routes.GatewayV1alpha2().TCPRoutes("shop").Get(t.Context(), "raw", metav1.GetOptions{})
		if err != nil || len(got.Status.Parents) != 1 || got.Status.Parents[0].Conditions[0].Reason != "Accepted" {
			t.Errorf("%+v, %v", got.Status, err)
		}
	})
}
