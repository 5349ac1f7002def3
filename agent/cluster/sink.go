package cluster

import (
	"maps"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// sink puts one kind of Kubernetes objects into a Store.
type sink[O any] struct {
	set     func(O) error
	drop    func(key)
	replace func(objects []O, skip func(O, error))
}

// newSink makes a sink of a conversion and what the Store does with its result.
func newSink[O any, K comparable, M any](
	convert func(O) (M, error), keyOf func(M) K, set func(M), drop func(key), replace func(map[K]M),
) sink[O] {
	return sink[O]{
		set: func(o O) error {
			m, err := convert(o)
			if err != nil {
				return err
			}
			set(m)
			return nil
		},
		drop: drop,
		replace: func(objects []O, skip func(O, error)) {
			all := make(map[K]M, len(objects))
			for _, o := range objects {
				m, err := convert(o)
				if err != nil {
					skip(o, err)
					continue
				}
				all[keyOf(m)] = m
			}
			replace(all)
		},
	}
}

// sinkOf is newSink, into a table.
func sinkOf[O any, M any](convert func(O) (M, error), to *table[key, M]) sink[O] {
	return newSink(convert, to.keyOf, to.set, to.drop, to.replace)
}

func podSink(s *Store) sink[*corev1.Pod] {
	return newSink(toCompactPod, podKey, s.setPod, s.dropPod, s.replacePods)
}

func peerSink(s *Store) sink[*corev1.Pod] {
	return newSink(toPeer, peerKey, s.setPeer, s.dropPeer, s.replacePeers)
}

func namespaceSink(s *Store) sink[*corev1.Namespace] {
	to := &s.tables.namespaces
	return newSink(toNamespace, to.keyOf, to.set, func(k key) { to.drop(k.name) }, to.replace)
}

func serviceSink(s *Store) sink[*corev1.Service] { return sinkOf(Service, &s.tables.services) }

func sliceSink(s *Store) sink[*discoveryv1.EndpointSlice] { return sinkOf(toSlice, &s.tables.slices) }

// zoneSink takes the one node that there is.
func zoneSink(s *Store) sink[*corev1.Node] {
	return newSink(toZone, func(string) struct{} { return struct{}{} }, s.setZone, func(key) { s.setZone("") }, s.replaceZone)
}

func routeSink[O Object](s *Store, kind route.Kind, convert func(O) (model.Route, error)) sink[O] {
	to := &s.tables.routes
	return newSink(convert, to.keyOf, to.set,
		func(k key) { to.drop(routeKey{kind, k}) },
		func(all map[routeKey]model.Route) { s.replaceRoutes(kind, all) })
}

func policySink(s *Store) sink[*v1alpha1.TrafficPolicy] {
	return sinkOf(TrafficPolicy, &s.tables.policies)
}

func authzSink(s *Store) sink[*v1alpha1.AuthorizationPolicy] {
	return sinkOf(closedPolicy, &s.tables.authz)
}

func peerAuthSink(s *Store) sink[*v1alpha1.PeerAuthentication] {
	return sinkOf(closedPeers, &s.tables.peerAuth)
}

func podKey(p compactPod) key               { return key{p.pod.Namespace, p.pod.Name} }
func peerKey(p *model.Peer) key             { return key{p.Namespace, p.Name} }
func namespaceKey(n model.Namespace) string { return n.Name }
func serviceKey(s model.Service) key        { return key{s.Namespace, s.Name} }
func sliceKey(s model.EndpointSlice) key    { return key{s.Namespace, s.Name} }
func keyOfRoute(r model.Route) routeKey     { return routeKey{r.Kind, key{r.Namespace, r.Name}} }
func policyKey(p model.TrafficPolicy) key   { return key{p.Namespace, p.Name} }

func authzKey(p model.AuthorizationPolicy) key   { return key{p.Namespace, p.Name} }
func peerAuthKey(p model.PeerAuthentication) key { return key{p.Namespace, p.Name} }

// The strip functions drop from an object what its conversion does not read.

func stripMeta(m *metav1.ObjectMeta) {
	m.ManagedFields, m.OwnerReferences, m.Finalizers = nil, nil, nil
}

func dropManagedFields(o metav1.Object) { o.SetManagedFields(nil) }

func stripPod(p *corev1.Pod) {
	owners := p.OwnerReferences // one, as a rule
	stripMeta(&p.ObjectMeta)
	p.OwnerReferences = owners
	p.Spec = corev1.PodSpec{
		ServiceAccountName: p.Spec.ServiceAccountName,
		NodeName:           p.Spec.NodeName,
		RuntimeClassName:   p.Spec.RuntimeClassName,
		HostNetwork:        p.Spec.HostNetwork,
		InitContainers:     probedContainers(p.Spec.InitContainers),
		Containers:         probedContainers(p.Spec.Containers),
	}
	status := corev1.PodStatus{Phase: p.Status.Phase, PodIPs: p.Status.PodIPs}
	for _, c := range p.Status.Conditions {
		if c.Type == ConditionCaptured {
			status.Conditions = []corev1.PodCondition{c}
		}
	}
	p.Status = status
}

// stripPeer is stripPod for what toPeer reads: nothing of containers, and of the labels
// what workload does.
func stripPeer(p *corev1.Pod) {
	p.Spec.InitContainers, p.Spec.Containers = nil, nil
	maps.DeleteFunc(p.Labels, func(name, _ string) bool { return name != appsv1.DefaultDeploymentUniqueLabelKey })
	stripPod(p)
}

func stripNamespace(n *corev1.Namespace) {
	stripMeta(&n.ObjectMeta)
	n.Annotations = nil
}

func stripService(s *corev1.Service) {
	stripMeta(&s.ObjectMeta)
	s.Annotations = nil
	s.Status = corev1.ServiceStatus{}
}

func stripSlice(s *discoveryv1.EndpointSlice) {
	stripMeta(&s.ObjectMeta)
	s.Annotations = nil
}

func stripNode(n *corev1.Node) {
	stripMeta(&n.ObjectMeta)
	n.Annotations = nil
	n.Spec, n.Status = corev1.NodeSpec{}, corev1.NodeStatus{}
}
