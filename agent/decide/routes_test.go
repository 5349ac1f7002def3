package decide

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// mesh is a cluster for tests: namespace shop with the Services back, at
// 10.96.0.7, and others that routes name.
type mesh struct {
	services map[string]model.Service
	slices   map[string][]model.EndpointSlice
	routes   []model.Route
	policies []model.TrafficPolicy
}

// about is a Policies.
func (m mesh) about(namespace, name string) []model.TrafficPolicy {
	var out []model.TrafficPolicy
	for _, p := range m.policies {
		if p.Namespace == namespace && p.Service == name {
			out = append(out, p)
		}
	}
	return out
}

func (m mesh) find(namespace, name string) (model.Service, []model.EndpointSlice, bool) {
	svc, ok := m.services[namespace+"/"+name]
	return svc, m.slices[namespace+"/"+name], ok
}

// dial asks for shop/back from a namespace.
func (m mesh) dial(t *testing.T, namespace string, port uint16) route.Destination {
	t.Helper()
	return Destination(m.services["shop/back"], m.routes, m.find, m.about, Client{Namespace: namespace}, netip.AddrPortFrom(netip.MustParseAddr("10.96.0.7"), port))
}

func newMesh(routes ...model.Route) mesh {
	m := mesh{services: map[string]model.Service{}, slices: map[string][]model.EndpointSlice{}, routes: routes}
	add := func(namespace, name, ip string, endpoint byte, ports ...model.ServicePort) {
		svc := model.Service{Namespace: namespace, Name: name, Ports: ports}
		if ip != "" {
			svc.ClusterIPs = []netip.Addr{netip.MustParseAddr(ip)}
		}
		m.services[svc.ID()] = svc
		for family, addr := range []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, endpoint}), netip.AddrFrom16([16]byte{0: 0xfd, 15: endpoint})} {
			slice := model.EndpointSlice{Namespace: namespace, Service: name, Name: fmt.Sprint(family), Endpoints: []model.Endpoint{{Address: addr, Ready: true}}}
			for i, p := range ports {
				slice.Ports = append(slice.Ports, model.EndpointPort{Name: p.Name, Port: uint16(8000 + i), Protocol: p.Protocol})
			}
			m.slices[svc.ID()] = append(m.slices[svc.ID()], slice)
		}
	}
	port := func(name string, number uint16, app string) model.ServicePort {
		return model.ServicePort{Name: name, Port: number, Protocol: model.TCP, AppProtocol: app}
	}
	add("shop", "back", "10.96.0.7", 7, port("web", 80, ""), port("admin", 90, ""), port("sql", 33, "mysql"),
		model.ServicePort{Name: "dns", Port: 53, Protocol: model.UDP})
	add("shop", "v1", "10.96.0.8", 8, port("a", 1, ""), port("web", 80, ""))
	add("lab", "v2", "10.96.0.9", 9, port("h2", 80, "kubernetes.io/h2c"), port("sql", 33, "mysql"), port("ws", 81, "kubernetes.io/ws"), port("tcp-x", 82, ""))
	add("shop", "headless", "", 10, port("web", 80, ""))
	m.services["shop/outside"] = model.Service{Namespace: "shop", Name: "outside", External: true, Ports: []model.ServicePort{port("web", 80, "")}}
	return m
}

// aRoute is attached to shop/back, with one rule; edits change it.
func aRoute(k route.Kind, namespace, name string, edits ...func(*model.Route)) model.Route {
	r := model.Route{Kind: k, Namespace: namespace, Name: name, Parents: []model.ParentRef{{Namespace: "shop", Name: "back"}}, Rules: []model.RouteRule{{}}}
	for _, edit := range edits {
		edit(&r)
	}
	return r
}

func to(p ...model.ParentRef) func(*model.Route) {
	return func(r *model.Route) { r.Parents = p }
}

func made(hour int) func(*model.Route) {
	return func(r *model.Route) { r.Created = time.Date(2026, 3, 1, hour, 0, 0, 0, time.UTC) }
}

func rule(edit func(*model.RouteRule)) func(*model.Route) {
	return func(r *model.Route) { edit(&r.Rules[0]) }
}

func onPaths(paths ...model.RoutePath) func(*model.Route) {
	return rule(func(r *model.RouteRule) {
		for _, p := range paths {
			r.Matches = append(r.Matches, model.RouteMatch{Path: p})
		}
	})
}

func backendRefs(refs ...model.BackendRef) func(*model.Route) {
	return rule(func(r *model.RouteRule) { r.Backends = refs })
}

func ref(namespace, name string, port uint16, weight uint32) model.BackendRef {
	return model.BackendRef{Target: model.Target{Namespace: namespace, Name: name, Port: port}, Weight: weight}
}

// governs are the routes whose rules a destination has.
func governs(d route.Destination) string {
	if d.Routes == nil {
		return ""
	}
	var names []string
	for _, r := range d.Routes.Rules {
		names = append(names, r.Route)
	}
	return strings.Join(names, " ")
}

func TestWhichRoutesGovernAPort(t *testing.T) {
	const h, g, tcp = route.HTTPRoute, route.GRPCRoute, route.TCPRoute
	unreadable := onPaths(model.RoutePath{Kind: route.PathRegexp, Value: "("})
	tests := []struct {
		promise string
		from    string
		port    uint16
		routes  []model.Route
		want    string
	}{
		{"no route: plain Kubernetes", "shop", 80, nil, ""},
		{"one that names no port is for all", "shop", 90, []model.Route{aRoute(h, "shop", "a")}, "HTTPRoute/shop/a"},
		{"one that names a port is for that", "shop", 80, []model.Route{aRoute(h, "shop", "a", to(model.ParentRef{Namespace: "shop", Name: "back", Port: 80}))}, "HTTPRoute/shop/a"},
		{"one that names a port is for no other", "shop", 90, []model.Route{aRoute(h, "shop", "a", to(model.ParentRef{Namespace: "shop", Name: "back", Port: 80}))}, ""},
		{"a sectionName is the port's name", "shop", 80, []model.Route{aRoute(h, "shop", "a", to(model.ParentRef{Namespace: "shop", Name: "back", Section: "web"}))}, "HTTPRoute/shop/a"},
		{"a sectionName is no other port's name", "shop", 90, []model.Route{aRoute(h, "shop", "a", to(model.ParentRef{Namespace: "shop", Name: "back", Section: "web"}))}, ""},
		{"both must match", "shop", 80, []model.Route{aRoute(h, "shop", "a", to(model.ParentRef{Namespace: "shop", Name: "back", Section: "admin", Port: 80}))}, ""},
		{"another Service's counts not", "shop", 80, []model.Route{aRoute(h, "shop", "a", to(model.ParentRef{Namespace: "lab", Name: "back"}))}, ""},
		{"two parentRefs to one port are one route", "shop", 80, []model.Route{aRoute(h, "shop", "a", to(model.ParentRef{Namespace: "shop", Name: "back", Port: 80}, model.ParentRef{Namespace: "shop", Name: "back"}))}, "HTTPRoute/shop/a"},
		{"a producer route is for all clients", "lab", 80, []model.Route{aRoute(h, "shop", "a")}, "HTTPRoute/shop/a"},
		{"a consumer route is for its namespace", "lab", 80, []model.Route{aRoute(h, "lab", "a")}, "HTTPRoute/lab/a"},
		{"a consumer route is for no other namespace", "yard", 80, []model.Route{aRoute(h, "lab", "a")}, ""},
		{"a consumer route is not for the Service's namespace", "shop", 80, []model.Route{aRoute(h, "lab", "a")}, ""},
		{"consumer routes replace the producer's", "lab", 80, []model.Route{aRoute(h, "shop", "a"), aRoute(h, "lab", "b")}, "HTTPRoute/lab/b"},
		{"whatever their kind", "lab", 80, []model.Route{aRoute(g, "shop", "a"), aRoute(tcp, "lab", "b")}, "TCPRoute/lab/b"},
		{"a consumer route for another port replaces nothing", "lab", 80, []model.Route{aRoute(h, "shop", "a"), aRoute(h, "lab", "b", to(model.ParentRef{Namespace: "shop", Name: "back", Port: 90}))}, "HTTPRoute/shop/a"},
		{"GRPC goes before HTTP before TCP", "shop", 80, []model.Route{aRoute(tcp, "shop", "a"), aRoute(g, "shop", "b"), aRoute(h, "shop", "c")}, "GRPCRoute/shop/b"},
		{"HTTP goes before TCP", "shop", 80, []model.Route{aRoute(tcp, "shop", "a"), aRoute(h, "shop", "c")}, "HTTPRoute/shop/c"},
		{"kinds weigh only on the port that they share", "shop", 90, []model.Route{aRoute(tcp, "shop", "a"), aRoute(h, "shop", "c", to(model.ParentRef{Namespace: "shop", Name: "back", Port: 80}))}, "TCPRoute/shop/a"},
		{"several of a kind govern together, the oldest first", "shop", 80, []model.Route{aRoute(h, "shop", "a", made(2)), aRoute(h, "shop", "b", made(1))}, "HTTPRoute/shop/b HTTPRoute/shop/a"},
		{"of one age, by name", "shop", 80, []model.Route{aRoute(h, "shop", "b"), aRoute(h, "shop", "a")}, "HTTPRoute/shop/a HTTPRoute/shop/b"},
		{"of TCPRoutes the oldest governs", "shop", 80, []model.Route{aRoute(tcp, "shop", "a", made(2)), aRoute(tcp, "shop", "b", made(1))}, "TCPRoute/shop/b"},
		{"a route whose every match cannot be read governs nothing", "shop", 80, []model.Route{aRoute(g, "shop", "a", unreadable), aRoute(h, "shop", "b")}, "HTTPRoute/shop/b"},
	}
	for _, tt := range tests {
		t.Run(tt.promise, func(t *testing.T) {
			if got := governs(newMesh(tt.routes...).dial(t, tt.from, tt.port)); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestARouteWithoutRulesMatchesNothing(t *testing.T) {
	none := func(r *model.Route) { r.Rules = nil }
	if d := newMesh(aRoute(route.GRPCRoute, "shop", "a", none)).dial(t, "shop", 80); d.Routes == nil || len(d.Routes.Matches) != 0 {
		t.Errorf("got %+v", d.Routes)
	}
}

// show is a match in words.
func show(m route.Match) string {
	var b strings.Builder
	switch m.Path.Kind {
	case route.PathExact:
		b.WriteString("=" + m.Path.Value)
	case route.PathPrefix:
		b.WriteString(m.Path.Value + "/")
	case route.PathRegexp:
		b.WriteString("~" + m.Path.Regexp.String())
	}
	if g := m.GRPC; g != nil {
		fmt.Fprintf(&b, "%s/%s", g.Service, g.Method)
		if g.ServiceRegexp != nil {
			b.WriteString("~" + g.ServiceRegexp.String())
		}
	}
	b.WriteString(m.Method)
	for _, h := range m.Headers {
		b.WriteString(" " + h.Name + ":" + h.Value)
	}
	for _, q := range m.Query {
		b.WriteString(" ?" + q.Name + "=" + q.Value)
	}
	return b.String()
}

func TestMatchesAreInOrderOfPrecedence(t *testing.T) {
	prefix := func(p string) model.RoutePath { return model.RoutePath{Kind: route.PathPrefix, Value: p} }
	val := func(name string) model.RouteValue { return model.RouteValue{Name: name, Value: "v"} }
	tests := []struct {
		promise string
		kind    route.Kind
		matches []model.RouteMatch // the greatest weight last
		want    []string
	}{
		{"HTTP: exact path, regular expression, the longest prefix, anything", route.HTTPRoute, []model.RouteMatch{
			{}, {Path: prefix("/a")}, {Path: prefix("/a/b")},
			{Path: model.RoutePath{Kind: route.PathRegexp, Value: "/.*"}}, {Path: model.RoutePath{Kind: route.PathExact, Value: "/a"}},
		}, []string{"=/a", "~/.*", "/a/b/", "/a/", ""}},
		{"HTTP: a prefix without its trailing slash is as long", route.HTTPRoute, []model.RouteMatch{
			{Path: prefix("/abc/")}, {Path: prefix("/abcd")},
		}, []string{"/abcd/", "/abc/"}},
		{"HTTP: the prefix / is any path", route.HTTPRoute, []model.RouteMatch{{Path: prefix("/")}}, []string{""}},
		{"HTTP: of one path, the method, then headers, then parameters", route.HTTPRoute, []model.RouteMatch{
			{Query: []model.RouteValue{val("a"), val("b")}}, {Headers: []model.RouteValue{val("a")}},
			{Headers: []model.RouteValue{val("a")}, Query: []model.RouteValue{val("a")}},
			{Headers: []model.RouteValue{val("a"), val("b")}}, {Method: "GET"},
		}, []string{"GET", " a:v b:v", " a:v ?a=v", " a:v", " ?a=v ?b=v"}},
		{"HTTP: a longer prefix goes before any number of headers", route.HTTPRoute, []model.RouteMatch{
			{Path: prefix("/a"), Method: "GET", Headers: []model.RouteValue{val("a"), val("b")}}, {Path: prefix("/ab")},
		}, []string{"/ab/", "/a/GET a:v b:v"}},
		{"of several entries for one header the first counts, whatever their case", route.HTTPRoute, []model.RouteMatch{
			{Headers: []model.RouteValue{{Name: "X-A", Value: "1"}, {Name: "x-a", Value: "2"}}},
			{Headers: []model.RouteValue{val("a"), val("b")}},
		}, []string{" a:v b:v", " x-a:1"}},
		{"names of parameters are exact", route.HTTPRoute, []model.RouteMatch{
			{Query: []model.RouteValue{{Name: "A", Value: "1"}, {Name: "a", Value: "2"}, {Name: "a", Value: "3"}}},
		}, []string{" ?A=1 ?a=2"}},
		{"GRPC: the longer service, the longer method, more headers, anything", route.GRPCRoute, []model.RouteMatch{
			{}, {Headers: []model.RouteValue{val("a")}}, {GRPC: &model.GRPCMethod{Method: "Get"}}, {GRPC: &model.GRPCMethod{Method: "GetAll"}},
			{GRPC: &model.GRPCMethod{Service: "s.*", Regexp: true}},
			{GRPC: &model.GRPCMethod{Service: "a.b"}}, {GRPC: &model.GRPCMethod{Service: "a.b"}, Headers: []model.RouteValue{val("a")}},
			{GRPC: &model.GRPCMethod{Service: "a.b", Method: "Get"}}, {GRPC: &model.GRPCMethod{Service: "a.bc"}},
		}, []string{"a.bc/", "a.b/Get", "a.b/ a:v", "a.b/", "/~s.*", "/GetAll", "/Get", " a:v", ""}},
	}
	for _, tt := range tests {
		t.Run(tt.promise, func(t *testing.T) {
			// Each in a rule, each second one in another route.
			one, other := aRoute(tt.kind, "shop", "a"), aRoute(tt.kind, "shop", "b")
			one.Rules, other.Rules = nil, nil
			for i, m := range tt.matches {
				into := []*model.Route{&one, &other}[i%2]
				into.Rules = append(into.Rules, model.RouteRule{Matches: []model.RouteMatch{m}})
			}
			routes := []model.Route{one}
			if len(other.Rules) > 0 {
				routes = append(routes, other)
			}
			var got []string
			for _, m := range newMesh(routes...).dial(t, "shop", 80).Routes.Matches {
				got = append(got, show(m))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestEqualMatchesAreInOrderOfAgeNameAndRule(t *testing.T) {
	named := func(hour int, name string, rules ...string) model.Route {
		r := aRoute(route.HTTPRoute, "shop", name, made(hour))
		r.Rules = nil
		for _, n := range rules {
			r.Rules = append(r.Rules, model.RouteRule{Name: n})
		}
		return r
	}
	d := newMesh(named(2, "a", "young"), named(1, "c", "late-1", "late-2"), named(1, "b", "first")).dial(t, "shop", 80)
	var got []string
	for _, m := range d.Routes.Matches {
		got = append(got, d.Routes.Rules[m.Rule].Name)
	}
	if diff := cmp.Diff([]string{"first", "late-1", "late-2", "young"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestWhereARulesRequestsGo(t *testing.T) {
	type b = route.Backend
	at := func(addrs ...string) []route.Endpoint {
		var out []route.Endpoint
		for _, a := range addrs {
			out = append(out, route.Endpoint{Addr: netip.MustParseAddrPort(a)})
		}
		return out
	}
	h := route.HTTPRoute
	invalid := func(service string) []route.WeightedBackend {
		return []route.WeightedBackend{{Weight: 1, Backend: b{Service: service, Invalid: true}}}
	}
	tests := []struct {
		promise string
		kind    route.Kind
		refs    []model.BackendRef
		want    []route.WeightedBackend
	}{
		{"without backendRefs, to the parent", h, nil, []route.WeightedBackend{{Weight: 1, Backend: b{Service: "shop/back", Endpoints: at("10.0.0.7:8000")}}}},
		{"by weight, at each Service's own target port, in any namespace", h, []model.BackendRef{ref("shop", "v1", 80, 9), ref("lab", "v2", 80, 1)},
			[]route.WeightedBackend{
				{Weight: 9, Backend: b{Service: "shop/v1", Endpoints: at("10.0.0.8:8001")}},
				{Weight: 1, Backend: b{Service: "lab/v2", Endpoints: at("10.0.0.9:8000"), Protocol: route.HTTP2}},
			}},
		{"a weight of 0 is kept", h, []model.BackendRef{ref("shop", "v1", 80, 0)}, []route.WeightedBackend{{Backend: b{Service: "shop/v1", Endpoints: at("10.0.0.8:8001")}}}},
		{"a reference to no Service keeps its share", h, []model.BackendRef{ref("shop", "v1", 80, 1), ref("shop", "nobody", 80, 3)},
			[]route.WeightedBackend{
				{Weight: 1, Backend: b{Service: "shop/v1", Endpoints: at("10.0.0.8:8001")}},
				{Weight: 3, Backend: b{Service: "shop/nobody", Invalid: true}},
			}},
		{"a reference to no port is invalid", h, []model.BackendRef{ref("shop", "v1", 99, 1)}, invalid("shop/v1")},
		{"a reference to a UDP port is invalid", h, []model.BackendRef{ref("shop", "back", 53, 1)}, invalid("shop/back")},
		{"a reference to another kind is invalid", h, []model.BackendRef{{Weight: 1, Target: model.Target{Kind: "example.com/Bucket", Namespace: "shop", Name: "v1", Port: 80}}}, invalid("shop/v1")},
		{"a reference to a name outside is invalid", h, []model.BackendRef{ref("shop", "outside", 80, 1)}, invalid("shop/outside")},
		{"HTTP cannot go to a port that is said to carry something else", h, []model.BackendRef{ref("lab", "v2", 33, 1)}, invalid("lab/v2")},
		{"TCP can", route.TCPRoute, []model.BackendRef{ref("lab", "v2", 33, 1)}, []route.WeightedBackend{{Weight: 1, Backend: b{Service: "lab/v2", Endpoints: at("10.0.0.9:8001"), Protocol: route.Opaque}}}},
		{"HTTP may go to a port that is only named like something else", h, []model.BackendRef{ref("lab", "v2", 82, 1)}, []route.WeightedBackend{{Weight: 1, Backend: b{Service: "lab/v2", Endpoints: at("10.0.0.9:8003")}}}},
		{"gRPC is HTTP/2, whatever is not said", route.GRPCRoute, []model.BackendRef{ref("shop", "v1", 80, 1)}, []route.WeightedBackend{{Weight: 1, Backend: b{Service: "shop/v1", Endpoints: at("10.0.0.8:8001"), Protocol: route.HTTP2}}}},
		{"gRPC to the parent, too", route.GRPCRoute, nil, []route.WeightedBackend{{Weight: 1, Backend: b{Service: "shop/back", Endpoints: at("10.0.0.7:8000"), Protocol: route.HTTP2}}}},
		{"gRPC cannot go to a port of WebSockets", route.GRPCRoute, []model.BackendRef{ref("lab", "v2", 81, 1)}, invalid("lab/v2")},
		{"a headless Service has endpoints", h, []model.BackendRef{ref("shop", "headless", 80, 1)}, []route.WeightedBackend{{Weight: 1, Backend: b{Service: "shop/headless", Endpoints: at("10.0.0.10:8000")}}}},
	}
	for _, tt := range tests {
		t.Run(tt.promise, func(t *testing.T) {
			got := newMesh(aRoute(tt.kind, "shop", "a", backendRefs(tt.refs...))).dial(t, "lab", 80).Routes.Rules[0].Backends
			if diff := cmp.Diff(tt.want, got, addrPorts); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestBackendsAreOfTheFamilyThatWasDialled(t *testing.T) {
	m := newMesh(aRoute(route.HTTPRoute, "shop", "a", backendRefs(ref("lab", "v2", 80, 1))))
	svc := m.services["shop/back"]
	svc.ClusterIPs = append(svc.ClusterIPs, netip.MustParseAddr("fd96::7"))
	d := Destination(svc, m.routes, m.find, m.about, Client{}, netip.MustParseAddrPort("[fd96::7]:80"))
	if got := d.Routes.Rules[0].Backends[0].Backend.Endpoints; len(got) != 1 || got[0].Addr.String() != "[fd00::9]:8000" {
		t.Errorf("got %v", got)
	}
}

func TestFilters(t *testing.T) {
	headers := &route.HeaderChange{Set: []route.Header{{Name: "a", Value: "b"}}}
	target := model.Target{Namespace: "shop", Name: "v1", Port: 80}
	v1 := route.Backend{Service: "shop/v1", Endpoints: []route.Endpoint{{Addr: netip.MustParseAddrPort("10.0.0.8:8001")}}}
	prefix := &route.Rewrite{Path: &route.PathChange{Prefix: true, Value: "/b"}}
	tests := []struct {
		promise string
		in      model.RouteFilters
		want    route.Filters
	}{
		{"are passed on", model.RouteFilters{RequestHeaders: headers, ResponseHeaders: headers, Rewrite: prefix, CORS: &route.CORS{MaxAge: 5}},
			route.Filters{RequestHeaders: headers, ResponseHeaders: headers, Rewrite: prefix, CORS: &route.CORS{MaxAge: 5}}},
		{"mirror to a Service's endpoints", model.RouteFilters{Mirrors: []model.RouteMirror{{Target: target, Numerator: 1, Denominator: 3}}},
			route.Filters{Mirrors: []route.Mirror{{Backend: v1, Numerator: 1, Denominator: 3}}}},
		{"mirror nothing to nowhere", model.RouteFilters{Mirrors: []model.RouteMirror{{Target: model.Target{Namespace: "shop", Name: "nobody", Port: 80}, Numerator: 1, Denominator: 1}}}, route.Filters{}},
		{"mirror nothing for a share of 0", model.RouteFilters{Mirrors: []model.RouteMirror{{Target: target, Denominator: 100}}}, route.Filters{}},
		{"that do not resolve are not skipped", model.RouteFilters{Extensions: []string{"example.com/Limit slow"}}, route.Filters{Invalid: true}},
		{"of an unknown type are not skipped", model.RouteFilters{Unknown: []string{"ExternalAuth"}}, route.Filters{Invalid: true}},
	}
	for _, tt := range tests {
		t.Run(tt.promise, func(t *testing.T) {
			m := newMesh(aRoute(route.HTTPRoute, "shop", "a", rule(func(r *model.RouteRule) { r.Filters = &tt.in })),
				aRoute(route.HTTPRoute, "shop", "b", backendRefs(model.BackendRef{Target: target, Weight: 1, Filters: &tt.in})))
			rules := m.dial(t, "shop", 80).Routes.Rules
			if diff := cmp.Diff(tt.want, rules[0].Filters, addrPorts); diff != "" {
				t.Errorf("of a rule (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.want, rules[1].Backends[0].Filters, addrPorts); diff != "" {
				t.Errorf("of a backend (-want +got):\n%s", diff)
			}
		})
	}
}

func TestFiltersThatExcludeEachOtherAreAnsweredWithAnError(t *testing.T) {
	redirect, rewrite := &model.RouteFilters{Redirect: &route.Redirect{Status: 302}}, &model.RouteFilters{Rewrite: &route.Rewrite{Hostname: "x"}}
	d := newMesh(aRoute(route.HTTPRoute, "shop", "a", rule(func(r *model.RouteRule) {
		r.Filters, r.Backends = redirect, []model.BackendRef{{Target: model.Target{Namespace: "shop", Name: "v1", Port: 80}, Filters: rewrite}}
	}))).dial(t, "shop", 80)
	if !d.Routes.Rules[0].Filters.Invalid {
		t.Error("it is not")
	}
}

func TestTimesAndRetriesArePassedOn(t *testing.T) {
	retry := &route.Retry{Attempts: 2, Codes: []uint16{503}, Backoff: time.Second}
	d := newMesh(aRoute(route.HTTPRoute, "shop", "a", rule(func(r *model.RouteRule) {
		r.Name, r.Timeout, r.BackendTimeout, r.Retry = "slow", new(3*time.Second), time.Second, retry
	}))).dial(t, "shop", 80)
	got := d.Routes.Rules[0]
	if got.Name != "slow" || *got.Timeout != 3*time.Second || got.BackendTimeout != time.Second || got.Retry != retry {
		t.Errorf("got %+v", got)
	}
}

func TestAnHTTPRouteHasAnOpaquePortLookedAt(t *testing.T) {
	m := newMesh()
	if got := m.dial(t, "shop", 33).Protocol; got != route.Opaque {
		t.Errorf("without a route: %d", got)
	}
	for k, want := range map[route.Kind]route.Protocol{route.HTTPRoute: route.Undeclared, route.TCPRoute: route.Opaque} {
		if got := newMesh(aRoute(k, "shop", "a")).dial(t, "shop", 33).Protocol; got != want {
			t.Errorf("with a %s: %d", model.KindName(k), got)
		}
	}
}

func TestAffinityIsPartOfTheServicesPolicy(t *testing.T) {
	m := newMesh(aRoute(route.HTTPRoute, "shop", "a", backendRefs(ref("shop", "v1", 80, 1))))
	for _, name := range []string{"shop/back", "shop/v1"} {
		svc := m.services[name]
		svc.Affinity = 3 * time.Hour
		m.services[name] = svc
	}
	d := m.dial(t, "shop", 80)
	if d.Policy == nil || d.Policy.Affinity != 3*time.Hour {
		t.Errorf("of the Service: %v", d.Policy)
	}
	if p := d.Routes.Rules[0].Backends[0].Backend.Policy; p == nil || p.Affinity != 3*time.Hour {
		t.Errorf("of a backend: %v", p)
	}
}

// TestOrderOfInputIsOfNoConsequence shuffles all that has no order of its own.
func TestOrderOfInputIsOfNoConsequence(t *testing.T) {
	var routes []model.Route
	for i := range 12 {
		r := aRoute([]route.Kind{route.HTTPRoute, route.GRPCRoute, route.TCPRoute}[i%3], []string{"shop", "lab"}[i%2], fmt.Sprint("r", i), made(i%4),
			to(model.ParentRef{Namespace: "shop", Name: "back", Port: []uint16{0, 80, 90, 33}[i%4]}),
			onPaths(model.RoutePath{Kind: route.PathPrefix, Value: fmt.Sprint("/", i%5)}, model.RoutePath{Kind: route.PathRegexp, Value: "/.*"}),
			backendRefs(ref("lab", "v2", 80, 1), ref("shop", "v1", 80, 2)))
		routes = append(routes, r)
	}
	type said struct {
		Destinations []route.Destination
		Verdicts     [][]Verdict
	}
	ask := func(m mesh) said {
		var out said
		for _, from := range []string{"shop", "lab", "yard"} {
			for _, port := range []uint16{80, 90, 33} {
				out.Destinations = append(out.Destinations, m.dial(t, from, port))
			}
		}
		for _, r := range routes {
			out.Verdicts = append(out.Verdicts, Verdicts(r, m.routes, m.find))
		}
		return out
	}
	want := ask(newMesh(routes...))
	sameRegexp := cmp.Comparer(func(a, b *route.Regexp) bool {
		return (a == nil) == (b == nil) && (a == nil || a.String() == b.String())
	})
	for seed := range uint64(50) {
		random := rand.New(rand.NewPCG(seed, 1))
		m := newMesh(slices.Clone(routes)...)
		random.Shuffle(len(m.routes), func(i, j int) { m.routes[i], m.routes[j] = m.routes[j], m.routes[i] })
		for _, s := range m.slices {
			random.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] })
		}
		if diff := cmp.Diff(want, ask(m), addrPorts, sameRegexp); diff != "" {
			t.Fatalf("seed %d: -in order +shuffled:\n%s", seed, diff)
		}
	}
}
