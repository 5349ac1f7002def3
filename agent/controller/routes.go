package controller

import (
	"context"
	"log/slog"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1alpha2 "sigs.k8s.io/gateway-api/apis/v1alpha2"

	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// routeWatches are the controller's view of Services, of what routes to them and of
// policies.
type routeWatches struct {
	services *kept[*corev1.Service, model.Service]
	routes   map[route.Kind]*kept[cluster.Object, routeObject]
	policies *kept[*v1alpha1.TrafficPolicy, policyObject]
	authz    *kept[*v1alpha1.AuthorizationPolicy, authzObject]
	peerAuth *kept[*v1alpha1.PeerAuthentication, authzObject]
	changed  chan struct{} // one waiting change, or round of the census, stands for all
}

// routeObject is what is known of a route.
type routeObject struct {
	kind            route.Kind
	namespace, name string

	route      model.Route
	unread     error  // why the route is not all there, if it is not
	version    string // resourceVersion
	generation int64
	old        bool                          // of v1alpha2
	refs       []gatewayv1.ParentReference   // those of route.Parents, as the spec has them
	parents    []gatewayv1.RouteParentStatus // the status
}

func newRouteWatches() *routeWatches {
	w := &routeWatches{changed: make(chan struct{}, 1)}
	w.services, w.policies = newKept(toService, w.change), newKept(toPolicy, w.change)
	w.authz, w.peerAuth = newKept(toAuthz, w.change), newKept(toPeerAuth, w.change)
	w.routes = map[route.Kind]*kept[cluster.Object, routeObject]{}
	for _, k := range []route.Kind{route.HTTPRoute, route.GRPCRoute, route.TCPRoute} {
		w.routes[k] = newKept(toRoute, w.change)
	}
	return w
}

func (w *routeWatches) change() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// toService: one whose addresses cannot be read has none.
func toService(s *corev1.Service) model.Service {
	out, err := cluster.Service(s)
	if err != nil {
		return model.Service{Namespace: s.Namespace, Name: s.Name}
	}
	return out
}

func toRoute(o cluster.Object) routeObject {
	out := routeObject{namespace: o.GetNamespace(), name: o.GetName(), version: o.GetResourceVersion(), generation: o.GetGeneration()}
	var spec gatewayv1.CommonRouteSpec
	switch r := o.(type) {
	case *gatewayv1.HTTPRoute:
		out.kind, spec, out.parents = route.HTTPRoute, r.Spec.CommonRouteSpec, r.Status.Parents
		out.route, out.unread = cluster.HTTPRoute(r)
	case *gatewayv1.GRPCRoute:
		out.kind, spec, out.parents = route.GRPCRoute, r.Spec.CommonRouteSpec, r.Status.Parents
		out.route, out.unread = cluster.GRPCRoute(r)
	case *gatewayv1.TCPRoute:
		out.kind, spec, out.parents = route.TCPRoute, r.Spec.CommonRouteSpec, r.Status.Parents
		out.route, out.unread = cluster.TCPRoute(r)
	case *gatewayv1alpha2.TCPRoute:
		out.kind, spec, out.parents, out.old = route.TCPRoute, r.Spec.CommonRouteSpec, r.Status.Parents, true
		out.route, out.unread = cluster.TCPRouteV1Alpha2(r)
	}
	for _, p := range spec.ParentRefs {
		if cluster.IsServiceParent(p) {
			out.refs = append(out.refs, p)
		}
	}
	return out
}

// fullName is "HTTPRoute/namespace/name".
func (r routeObject) fullName() string {
	return model.Route{Kind: r.kind, Namespace: r.namespace, Name: r.name}.FullName()
}

// follow starts the watches, in the group.
func (w *routeWatches) follow(ctx context.Context, group *sync.WaitGroup, c clients, log *slog.Logger) {
	routes := c.gateway
	v1, alpha := routes.GatewayV1(), routes.GatewayV1alpha2()
	group.Go(func() {
		cluster.Follow(ctx, c.Interface, log, "services", &corev1.Service{}, cluster.Selector{}, c.CoreV1().Services(""), w.services)
	})
	served := func(name string, to cache.ReflectorStore, versions ...cluster.Version) {
		absent := func() { _ = to.Replace(nil, "") } // of nothing, nothing is of the wrong type
		group.Go(func() { cluster.FollowServed(ctx, log, name, absent, versions...) })
	}
	served(v1alpha1.TrafficPolicyResource, w.policies,
		cluster.VersionOf(c.policies, log, v1alpha1.TrafficPolicyResource, &v1alpha1.TrafficPolicy{}, c.policies.TrafficPolicies(""), w.policies))
	served(v1alpha1.AuthorizationPolicyResource, w.authz,
		cluster.VersionOf(c.policies, log, v1alpha1.AuthorizationPolicyResource, &v1alpha1.AuthorizationPolicy{}, c.policies.AuthorizationPolicies(""), w.authz))
	served(v1alpha1.PeerAuthenticationResource, w.peerAuth,
		cluster.VersionOf(c.policies, log, v1alpha1.PeerAuthenticationResource, &v1alpha1.PeerAuthentication{}, c.policies.PeerAuthentications(""), w.peerAuth))
	served("httproutes", w.routes[route.HTTPRoute],
		cluster.VersionOf(routes, log, "httproutes", &gatewayv1.HTTPRoute{}, v1.HTTPRoutes(""), w.routes[route.HTTPRoute]))
	served("grpcroutes", w.routes[route.GRPCRoute],
		cluster.VersionOf(routes, log, "grpcroutes", &gatewayv1.GRPCRoute{}, v1.GRPCRoutes(""), w.routes[route.GRPCRoute]))
	served("tcproutes", w.routes[route.TCPRoute],
		cluster.VersionOf(routes, log, "tcproutes", &gatewayv1.TCPRoute{}, v1.TCPRoutes(""), w.routes[route.TCPRoute]),
		cluster.VersionOf(routes, log, "tcproutes", &gatewayv1alpha2.TCPRoute{}, alpha.TCPRoutes(""), w.routes[route.TCPRoute]))
}

// synced says whether all is known that there is.
func (w *routeWatches) synced() bool {
	for _, k := range w.routes {
		if !k.done() {
			return false
		}
	}
	return w.services.done() && w.policies.done() && w.authz.done() && w.peerAuth.done()
}

// waitSynced returns when synced is true, or an error with ctx.
func (w *routeWatches) waitSynced(ctx context.Context) error {
	first := []chan struct{}{w.services.synced, w.policies.synced, w.authz.synced, w.peerAuth.synced}
	for _, k := range w.routes {
		first = append(first, k.synced)
	}
	return waitAll(ctx, first...)
}

// view is all of it at one time.
func (w *routeWatches) view() routeView {
	v := routeView{
		services: map[string]model.Service{}, byParent: map[string][]model.Route{}, byTarget: map[string][]model.TrafficPolicy{},
	}
	for s := range w.services.each {
		v.services[s.ID()] = s
	}
	for _, k := range w.routes {
		for r := range k.each {
			v.routes = append(v.routes, r)
			if r.unread != nil {
				continue
			}
			seen := map[string]bool{}
			for _, p := range r.route.Parents {
				id := p.Namespace + "/" + p.Name
				if !seen[id] {
					v.byParent[id] = append(v.byParent[id], r.route)
				}
				seen[id] = true
			}
		}
	}
	for p := range w.policies.each {
		v.policies = append(v.policies, p)
		if p.unread == nil {
			id := p.namespace + "/" + p.policy.Service
			v.byTarget[id] = append(v.byTarget[id], p.policy)
		}
	}
	v.authz = slices.AppendSeq(slices.Collect(w.authz.each), w.peerAuth.each)
	return v
}

// routeView is what routes and policies are judged by.
type routeView struct {
	services map[string]model.Service
	routes   []routeObject
	policies []policyObject
	authz    []authzObject
	byParent map[string][]model.Route         // Service → routes that name it
	byTarget map[string][]model.TrafficPolicy // Service → policies about it
}

// about is a decide.Policies.
func (v routeView) about(namespace, name string) []model.TrafficPolicy {
	return v.byTarget[namespace+"/"+name]
}

// find is a decide.Lookup. A verdict does not depend on endpoints.
func (v routeView) find(namespace, name string) (model.Service, []model.EndpointSlice, bool) {
	s, ok := v.services[namespace+"/"+name]
	return s, nil, ok
}
