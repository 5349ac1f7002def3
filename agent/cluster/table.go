package cluster

import (
	"github.com/weirmesh/weir/agent/model"
)

// table is one kind of objects in a Store's view, and what comes of a change of it.
type table[K comparable, V any] struct {
	store *Store
	kind  string
	all   *map[K]V // in the view
	keyOf func(V) K

	// What is kept beside the view: reset forgets it, index adds what there is of an
	// object in the view, and unindex takes that out. Nil: nothing is kept.
	reset          func()
	index, unindex func(K)
	gone           func() // called after an object has gone; nil: nothing but changed is
	changed        func() // called after all that
}

// tables are the kinds that are alike.
type tables struct {
	namespaces table[string, model.Namespace]
	services   table[key, model.Service]
	slices     table[key, model.EndpointSlice]
	routes     table[routeKey, model.Route]
	policies   table[key, model.TrafficPolicy]
	authz      table[key, model.AuthorizationPolicy]
	peerAuth   table[key, model.PeerAuthentication]
}

func newTables(s *Store) tables {
	return tables{
		namespaces: table[string, model.Namespace]{
			store: s, kind: kindNamespaces, all: &s.view.namespaces, keyOf: namespaceKey,
			changed: func() { s.wake(); s.signalPods() },
		},
		services: table[key, model.Service]{
			store: s, kind: kindServices, all: &s.view.services, keyOf: serviceKey,
			reset: s.resetServices, index: s.indexService, unindex: s.unindexService,
			gone:    s.touchAll, // it may have been the backend of any
			changed: s.signal,
		},
		slices: table[key, model.EndpointSlice]{
			store: s, kind: kindSlices, all: &s.view.slices, keyOf: sliceKey,
			reset: s.resetSlices, index: s.indexSlice, unindex: s.unindexSlice, changed: s.signal,
		},
		routes: table[routeKey, model.Route]{ // of which lists are of one kind: see replaceRoutes
			store: s, all: &s.view.routes, keyOf: keyOfRoute,
			reset: s.resetRoutes, index: s.indexRoute, unindex: s.unindexRoute, changed: s.signal,
		},
		policies: table[key, model.TrafficPolicy]{
			store: s, kind: kindPolicies, all: &s.view.policies, keyOf: policyKey,
			reset: s.resetPolicies, index: s.indexPolicy, unindex: s.unindexPolicy, changed: s.signal,
		},
		authz: table[key, model.AuthorizationPolicy]{
			store: s, kind: kindAuthz, all: &s.view.authz, keyOf: authzKey, changed: s.signalGuards,
		},
		peerAuth: table[key, model.PeerAuthentication]{
			store: s, kind: kindPeerAuth, all: &s.view.peerAuth, keyOf: peerAuthKey,
			changed: func() { s.touchAll(); s.signalGuards() }, // it may be about the pods behind any
		},
	}
}

func (t *table[K, V]) set(v V) {
	t.store.mu.Lock()
	defer t.store.mu.Unlock()
	k := t.keyOf(v)
	if old, ok := (*t.all)[k]; ok && same(old, v) {
		return
	}
	if t.index == nil {
		(*t.all)[k] = v
	} else {
		t.unindex(k) // it may be about another Service now
		(*t.all)[k] = v
		t.index(k)
	}
	t.changed()
}

func (t *table[K, V]) drop(k K) {
	t.store.mu.Lock()
	defer t.store.mu.Unlock()
	if _, ok := (*t.all)[k]; !ok {
		return
	}
	if t.index != nil {
		t.unindex(k)
	}
	delete(*t.all, k)
	if t.gone != nil {
		t.gone()
	}
	t.changed()
}

// replace takes a list of the source's.
func (t *table[K, V]) replace(all map[K]V) {
	t.store.mu.Lock()
	defer t.store.mu.Unlock()
	t.store.listed[t.kind] = true
	if same(*t.all, all) {
		return
	}
	*t.all = all
	t.reindex()
	t.changed()
}

// fallBack takes what was known last, unless the source has listed the kind. The lock
// must be held.
func (t *table[K, V]) fallBack(all map[K]V) {
	if !t.store.listed[t.kind] {
		*t.all = all
		t.reindex()
	}
}

// reindex makes anew what is kept beside the view. The lock must be held.
func (t *table[K, V]) reindex() {
	if t.index == nil {
		return
	}
	t.reset()
	for k := range *t.all {
		t.index(k)
	}
	t.store.touchAll()
}

// index is which objects are about a Service.
type index[K comparable] map[key]map[K]struct{}

func (x index[K]) add(service key, k K) {
	if x[service] == nil {
		x[service] = map[K]struct{}{}
	}
	x[service][k] = struct{}{}
}

func (x index[K]) remove(service key, k K) {
	delete(x[service], k)
	if len(x[service]) == 0 {
		delete(x, service)
	}
}
