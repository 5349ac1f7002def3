package decide

import (
	"cmp"
	"maps"
	"slices"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// Peers is what is demanded of the callers of a pod of a namespace: on any port, and by
// port where that is something else; beside it, of which policies it is made. policies are
// all there are, in any order; those of the namespace root that select nothing are the
// whole mesh's.
//
// Nil labels are not known: of the policies that might select the pod, those count that
// say Strict.
func Peers(root, namespace string, labels map[string]string, policies []model.PeerAuthentication) (route.PeerMode, map[uint16]route.PeerMode, []model.Governing) {
	d := demand{byPort: map[uint16]route.PeerMode{}}
	for _, p := range byReach(root, namespace, policies) {
		switch unsure := labels == nil && len(p.Selector) > 0; {
		case unsure:
			d.suspect(p)
		case p.Selector.Matches(labels):
			d.add(p)
		}
	}
	if d.closed {
		return route.Strict, nil, d.governing
	}
	for port, mode := range d.byPort {
		if mode == d.mode || d.mode == route.Strict && d.suspected {
			delete(d.byPort, port)
		}
	}
	return d.mode, d.byPort, d.governing
}

// byReach are the policies that can be about pods of a namespace, first those that go
// before the others.
func byReach(root, namespace string, policies []model.PeerAuthentication) []model.PeerAuthentication {
	reach := func(p model.PeerAuthentication) int {
		switch {
		case len(p.Selector) > 0:
			return 0
		case p.Namespace != root:
			return 1
		}
		return 2
	}
	out := slices.DeleteFunc(slices.Clone(policies), func(p model.PeerAuthentication) bool {
		return p.Namespace != namespace && reach(p) < 2
	})
	slices.SortFunc(out, func(a, b model.PeerAuthentication) int {
		return cmp.Or(reach(a)-reach(b), a.Created.Compare(b.Created), cmp.Compare(a.ID(), b.ID()))
	})
	return out
}

// demand is what policies have said so far; the zero value with a byPort is nothing.
type demand struct {
	mode      route.PeerMode
	said      bool // mode was
	suspected bool // by one that may not be about the pod
	closed    bool
	byPort    map[uint16]route.PeerMode
	governing []model.Governing
}

// add adds what goes before what is added later.
func (d *demand) add(p model.PeerAuthentication) {
	counts := p.Closed
	d.closed = d.closed || p.Closed
	if p.Mode != nil && !d.said {
		d.mode, d.said, counts = *p.Mode, true, true
	}
	for port, mode := range p.Ports {
		if _, said := d.byPort[port]; !said {
			d.byPort[port], counts = mode, true
		}
	}
	if counts {
		d.governing = append(d.governing, model.Governing{Object: p.FullName(), Generation: p.Generation})
	}
}

// suspect adds of a policy that may not be about the pod what is Strict.
func (d *demand) suspect(p model.PeerAuthentication) {
	strict := model.PeerAuthentication{Namespace: p.Namespace, Name: p.Name, Generation: p.Generation, Closed: p.Closed}
	if p.Mode != nil && *p.Mode == route.Strict {
		strict.Mode, d.suspected = p.Mode, true
	}
	strict.Ports = maps.Clone(p.Ports)
	maps.DeleteFunc(strict.Ports, func(_ uint16, mode route.PeerMode) bool { return mode != route.Strict })
	d.add(strict)
}
