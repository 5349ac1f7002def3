package cluster

import (
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1alpha2 "sigs.k8s.io/gateway-api/apis/v1alpha2"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// gatewayServer is a fake API server's Gateway API, which serves what install says.
type gatewayServer struct {
	*gatewayfake.Clientset

	mu      sync.Mutex
	served  map[string]bool // "v1/httproutes"
	streams []watch.Interface
}

func newGateway(objects ...runtime.Object) *gatewayServer {
	s := &gatewayServer{Clientset: gatewayfake.NewClientset(objects...), served: map[string]bool{}}
	s.PrependReactor("list", "*", func(a k8stesting.Action) (bool, runtime.Object, error) {
		return !s.serves(a), nil, apierrors.NewNotFound(a.GetResource().GroupResource(), "")
	})
	s.PrependWatchReactor("*", func(a k8stesting.Action) (bool, watch.Interface, error) {
		if !s.serves(a) {
			return true, nil, apierrors.NewNotFound(a.GetResource().GroupResource(), "")
		}
		stream, err := s.Tracker().Watch(a.GetResource(), a.GetNamespace())
		s.mu.Lock()
		defer s.mu.Unlock()
		s.streams = append(s.streams, stream)
		return true, stream, err
	})
	return s
}

func (s *gatewayServer) serves(a k8stesting.Action) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.served[a.GetResource().Version+"/"+a.GetResource().Resource]
}

// install puts CRDs there in place of those that are; streams end.
func (s *gatewayServer) install(resources ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.served = map[string]bool{}
	for _, r := range resources {
		s.served[r] = true
	}
	for _, stream := range s.streams {
		stream.Stop()
	}
	s.streams = nil
}

var all = []string{"v1/httproutes", "v1/grpcroutes", "v1/tcproutes"}

func parentRef(name string) gatewayv1.CommonRouteSpec {
	return gatewayv1.CommonRouteSpec{ParentRefs: []gatewayv1.ParentReference{
		{Group: new(gatewayv1.Group("")), Kind: new(gatewayv1.Kind("Service")), Name: gatewayv1.ObjectName(name)},
	}}
}

func apiRoute(name string) *gatewayv1.HTTPRoute {
	r := &gatewayv1.HTTPRoute{ObjectMeta: meta("shop", name)}
	r.Spec.CommonRouteSpec = parentRef("back")
	return r
}

// kindOf is the kind of what governs the Service, 0 without any.
func kindOf(s *Store) route.Kind {
	d := told(s, netip.MustParseAddrPort("10.96.0.7:80"))
	if d.Routes == nil {
		return 0
	}
	return d.Routes.Kind
}

func TestRoutesAreFollowed(t *testing.T) {
	routes := newGateway(apiRoute("canary"))
	routes.install(all...)
	s, _ := runGatewayAPI(t, fake.NewClientset(apiService(), apiSlice("10.0.0.1")), routes)
	dial := netip.MustParseAddrPort("10.96.0.7:80")
	d := told(s, dial)
	if d.Routes == nil || len(d.Routes.Rules) != 1 || d.Routes.Rules[0].Route != "HTTPRoute/shop/canary" {
		t.Fatalf("once the store is complete, routes are there: %+v", d.Routes)
	}

	api := routes.GatewayV1().HTTPRoutes("shop")
	moved := apiRoute("canary")
	moved.Spec.CommonRouteSpec = parentRef("front")
	check(t)(api.Update(t.Context(), moved, metav1.UpdateOptions{}))
	eventually(t, "the route has another parent", func() bool { return kindOf(s) == 0 })
	s.mu.RLock()
	if _, stale := s.byParent[key{"shop", "back"}]; stale || len(s.byParent) != 1 {
		t.Errorf("the parent that it had is still noted: %v", s.byParent)
	}
	s.mu.RUnlock()
	check(t)(api.Update(t.Context(), apiRoute("canary"), metav1.UpdateOptions{}))
	eventually(t, "the route is back", func() bool { return kindOf(s) == route.HTTPRoute })

	grpc := &gatewayv1.GRPCRoute{ObjectMeta: meta("shop", "canary"), Spec: gatewayv1.GRPCRouteSpec{CommonRouteSpec: parentRef("back")}}
	check(t)(routes.GatewayV1().GRPCRoutes("shop").Create(t.Context(), grpc, metav1.CreateOptions{}))
	eventually(t, "a GRPCRoute of the same name is another route", func() bool { return kindOf(s) == route.GRPCRoute })
	if err := routes.GatewayV1().GRPCRoutes("shop").Delete(t.Context(), "canary", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the HTTPRoute is still there", func() bool { return kindOf(s) == route.HTTPRoute })
	if err := api.Delete(t.Context(), "canary", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no route", func() bool { return kindOf(s) == 0 })
}

// TestADestinationNamesItsRoutes: those that govern it for a client, in the generation
// that they are in.
func TestADestinationNamesItsRoutes(t *testing.T) {
	s := NewStore()
	set := func(kind route.Kind, namespace, name string, generation int64) {
		s.tables.routes.set(model.Route{Kind: kind, Namespace: namespace, Name: name, Generation: generation, Rules: []model.RouteRule{{}},
			Parents: []model.ParentRef{{Namespace: "shop", Name: "back"}}})
	}
	s.tables.services.set(model.Service{Namespace: "shop", Name: "back", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.7")},
		Ports: []model.ServicePort{{Port: 80, Protocol: model.TCP}}})
	set(route.HTTPRoute, "shop", "back", 3)
	set(route.TCPRoute, "shop", "loser", 1)
	set(route.HTTPRoute, "test", "ours", 7)
	for client, want := range map[string]model.Governing{
		"shop": {Object: "HTTPRoute/shop/back", Parent: "shop/back", Generation: 3},
		"test": {Object: "HTTPRoute/test/ours", Parent: "shop/back", Generation: 7},
	} {
		_, got := s.Destination(netip.MustParseAddrPort("10.96.0.7:80"), client)
		if diff := cmp.Diff([]model.Governing{want}, got); diff != "" {
			t.Errorf("to clients in %s: %s", client, diff)
		}
	}
	want := map[string]int64{"HTTPRoute/shop/back": 3, "TCPRoute/shop/loser": 1, "HTTPRoute/test/ours": 7}
	if diff := cmp.Diff(want, s.Known()); diff != "" {
		t.Errorf("all routes: %s", diff)
	}
}

func TestCRDsMayComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tcp := &gatewayv1.TCPRoute{ObjectMeta: meta("shop", "raw"), Spec: gatewayv1.TCPRouteSpec{
			CommonRouteSpec: parentRef("back"), Rules: []gatewayv1.TCPRouteRule{{}},
		}}
		routes := newGateway(apiRoute("canary"), tcp)
		began := time.Now()
		s, log := runGatewayAPI(t, fake.NewClientset(apiService()), routes)
		if waited := time.Since(began); waited > 0 || kindOf(s) != 0 {
			t.Errorf("the store is complete after %s, governed by %d", waited, kindOf(s))
		}
		for _, step := range []struct {
			what      string
			installed []string
			want      route.Kind
		}{
			{"HTTPRoutes come", []string{"v1/httproutes"}, route.HTTPRoute},
			{"TCPRoutes come, HTTPRoutes go", []string{"v1/tcproutes"}, route.TCPRoute},
			{"all go", nil, 0},
			{"all come", all, route.HTTPRoute},
		} {
			time.Sleep(time.Hour) // the least frequent looking
			routes.install(step.installed...)
			time.Sleep(3 * lastLook)
			synctest.Wait()
			if got := kindOf(s); got != step.want {
				t.Errorf("%s: governed by %d", step.what, got)
			}
		}
		if log.String() != "" {
			t.Errorf("CRDs that are not there are no news:\n%s", log)
		}
	})
}

func TestOldTCPRoutesAreFollowedWhereTheyAreTheOnlyOnes(t *testing.T) {
	old := &gatewayv1alpha2.TCPRoute{ObjectMeta: meta("shop", "raw"), Spec: gatewayv1alpha2.TCPRouteSpec{
		CommonRouteSpec: parentRef("back"), Rules: []gatewayv1alpha2.TCPRouteRule{{}},
	}}
	for want, resources := range map[route.Kind][]string{
		route.TCPRoute: {"v1alpha2/tcproutes"},
		0:              {"v1alpha2/tcproutes", "v1/tcproutes"},
	} {
		routes := newGateway(old)
		routes.install(resources...)
		s, _ := runGatewayAPI(t, fake.NewClientset(apiService()), routes)
		if got := kindOf(s); got != want {
			t.Errorf("%v: governed by %d, want %d", resources, got, want)
		}
	}
}

func TestTheZoneIsThisNodes(t *testing.T) {
	slice := apiSlice("10.0.0.1", "10.0.0.2")
	for i, zone := range []string{"a", "b"} {
		slice.Endpoints[i].Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: zone}}}
	}
	node := &corev1.Node{ObjectMeta: meta("", "n1")}
	node.Labels = map[string]string{corev1.LabelTopologyZone: "b"}
	client := fake.NewClientset(apiService(), slice, node)
	s, _ := runAPI(t, client)
	endpoints := func() int { return len(told(s, netip.MustParseAddrPort("10.96.0.7:80")).Endpoints) }
	if d := told(s, netip.MustParseAddrPort("10.96.0.7:80")); len(d.Endpoints) != 1 || d.Endpoints[0].Addr.String() != "10.0.0.2:8080" {
		t.Errorf("got %v", d.Endpoints)
	}
	node = node.DeepCopy()
	node.Labels = nil
	check(t)(client.CoreV1().Nodes().Update(t.Context(), node, metav1.UpdateOptions{}))
	eventually(t, "a node without a zone uses all", func() bool { return endpoints() == 2 })
}

func TestRoutesAreKeptForAnotherAgent(t *testing.T) {
	s := NewStore()
	httpRoute := must(HTTPRoute(apiRoute("canary")))
	httpRoute.Created = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	httpRoute.Rules[0].Filters = &model.RouteFilters{Redirect: &route.Redirect{Status: 302}}
	s.tables.routes.set(httpRoute)
	s.tables.services.set(must(Service(apiService())))
	s.setZone("b")
	lastGood := LastGood{Path: t.TempDir() + "/last-good.gz", Version: "v1"}
	if err := lastGood.save(s.copy()); err != nil {
		t.Fatal(err)
	}
	after, log := NewStore(), &logBuffer{}
	after.replaceRoutes(route.GRPCRoute, nil)
	lastGood.restore(after, log.logger())
	if !same(after.view.routes, s.view.routes) || after.view.zone != "b" || kindOf(after) != route.HTTPRoute {
		t.Errorf("got %v in zone %q; log %s", after.view.routes, after.view.zone, log)
	}
	listed := NewStore()
	listed.replaceRoutes(route.HTTPRoute, nil)
	lastGood.restore(listed, log.logger())
	if got := kindOf(listed); got != 0 {
		t.Errorf("what the server has listed is not taken from the file: %d", got)
	}
}

func TestTheModelOfAnHTTPRoute(t *testing.T) {
	s, _ := runDir(t, withFile(t, routeYAML))
	got := s.view.routes[routeKey{route.HTTPRoute, key{"shop", "canary"}}]
	want := model.Route{
		Kind: route.HTTPRoute, Namespace: "shop", Name: "canary", Created: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC),
		Parents: []model.ParentRef{{Namespace: "shop", Name: "back", Section: "http", Port: 80}},
		Rules: []model.RouteRule{
			{
				Name: "moved", Matches: []model.RouteMatch{{Path: model.RoutePath{Kind: route.PathPrefix, Value: "/old"}}},
				Filters: &model.RouteFilters{Redirect: &route.Redirect{Status: 302, Scheme: "https", Path: &route.PathChange{Prefix: true, Value: "/new"}}},
			},
			{
				Matches: []model.RouteMatch{{
					Path: model.RoutePath{Kind: route.PathExact, Value: "/a"}, Method: "GET",
					Headers: []model.RouteValue{{Name: "X-Canary", Value: "y.*", Regexp: true}}, Query: []model.RouteValue{{Name: "q", Value: "1"}},
				}},
				Filters: &model.RouteFilters{
					RequestHeaders: &route.HeaderChange{Set: []route.Header{{Name: "a", Value: "B"}}, Add: []route.Header{{Name: "c", Value: "d"}}, Remove: []string{"e"}},
					CORS:           &route.CORS{AllowOrigins: []string{"*"}, MaxAge: 5},
					Mirrors: []model.RouteMirror{
						{Target: model.Target{Namespace: "shop", Name: "shadow", Port: 80}, Numerator: 1, Denominator: 1},
						{Target: model.Target{Namespace: "shop", Name: "shadow", Port: 80}, Numerator: 5, Denominator: 100},
						{Target: model.Target{Namespace: "shop", Name: "shadow", Port: 80}, Numerator: 1, Denominator: 3},
					},
					Extensions: []string{"example.com/Limit slow"},
				},
				Backends: []model.BackendRef{
					{Target: model.Target{Namespace: "lab", Name: "back-v2", Port: 8080}, Weight: 1},
					{Target: model.Target{Kind: "example.com/Bucket", Namespace: "shop", Name: "b"}, Filters: &model.RouteFilters{Rewrite: &route.Rewrite{Hostname: "b.example.com"}}},
				},
				Timeout: new(10 * time.Second), BackendTimeout: 1500 * time.Millisecond,
				Retry:              &route.Retry{Attempts: 1, Codes: []uint16{500, 502, 503, 504}, Backoff: 25 * time.Millisecond},
				SessionPersistence: true,
			},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

const routeYAML = `apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: shop, name: canary, creationTimestamp: "2026-03-01T13:00:00+01:00"}
spec:
  parentRefs:
    - {name: outside}
    - {group: "", kind: Service, name: back, sectionName: http, port: 80}
  rules:
    - name: moved
      matches: [{path: {value: /old}}]
      filters: [{type: RequestRedirect, requestRedirect: {scheme: https, path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}}]
    - matches:
        - path: {type: Exact, value: /a}
          method: GET
          headers: [{name: X-Canary, type: RegularExpression, value: y.*}]
          queryParams: [{name: q, value: "1"}]
      filters:
        - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: A, value: B}], add: [{name: c, value: d}], remove: [E]}}
        - {type: CORS, cors: {allowOrigins: ["*"]}}
        - {type: RequestMirror, requestMirror: {backendRef: {name: shadow, port: 80}}}
        - {type: RequestMirror, requestMirror: {backendRef: {name: shadow, port: 80}, percent: 5}}
        - {type: RequestMirror, requestMirror: {backendRef: {name: shadow, port: 80}, fraction: {numerator: 1, denominator: 3}}}
        - {type: ExtensionRef, extensionRef: {group: example.com, kind: Limit, name: slow}}
      backendRefs:
        - {namespace: lab, name: back-v2, port: 8080}
        - {group: example.com, kind: Bucket, name: b, weight: 0, filters: [{type: URLRewrite, urlRewrite: {hostname: b.example.com}}]}
      timeouts: {request: 10s, backendRequest: 1s500ms}
      retry: {}
      sessionPersistence: {sessionName: sid}
`

func withFile(t *testing.T, content string) string {
	t.Helper()
	dir := t.TempDir()
	write(t, dir, "a.yaml", content)
	return dir
}

// TestValuesThatAnAPIServerHasAndWeDoNot: a CRD newer than this agent.
func TestValuesThatAnAPIServerHasAndWeDoNot(t *testing.T) {
	r := apiRoute("canary")
	r.Spec.Rules = []gatewayv1.HTTPRouteRule{{
		Matches: []gatewayv1.HTTPRouteMatch{{Path: &gatewayv1.HTTPPathMatch{Type: new(gatewayv1.PathMatchType("Glob"))}}},
		Filters: []gatewayv1.HTTPRouteFilter{{Type: "Compress"}},
	}}
	got := must(HTTPRoute(r))
	if rule := got.Rules[0]; rule.Matches[0].Unknown != "path.type Glob" || !same(rule.Filters.Unknown, []string{"Compress"}) {
		t.Errorf("got %+v", rule)
	}
}

func TestStrippedRoutesKeepTheirSpec(t *testing.T) {
	sameAfter(t, apiRoute("canary"), func(r *gatewayv1.HTTPRoute) { dropManagedFields(r) }, HTTPRoute)
}
