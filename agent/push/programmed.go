package push

import (
	"cmp"
	"encoding/json"
	"maps"
	"net/http"
	"slices"

	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/model"
)

// ProgrammedPath is where an agent serves Programmed, on the port of its metrics.
const ProgrammedPath = "/programmed"

// ServeProgrammed answers with Programmed as JSON.
func (p *Pusher) ServeProgrammed(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(p.Programmed()) // who asked has gone
}

// Programmed is how far the node's proxies have the routes and policies, and the roots,
// that there are. A proxy that waits for its first config for a Service has no requests
// under way that are routed otherwise, and is not counted yet. One that does not answer
// has what it had.
func (p *Pusher) Programmed() model.Programmed {
	out := model.Programmed{Known: p.View.Known(), Trusted: p.trusted(), Uses: []model.Use{}}
	uses := map[use]*model.Use{}
	p.mu.Lock()
	sessions := slices.Collect(maps.Values(p.heard))
	p.mu.Unlock()
	for _, s := range sessions {
		for u, got := range s.programmed() {
			total := uses[u]
			if total == nil {
				total = &model.Use{Object: u.object, Parent: u.parent, Generation: out.Known[u.object]}
				uses[u] = total
			}
			total.Proxies++
			switch {
			case got.generation == total.Generation:
				total.Acknowledged++
			case got.refused:
				total.Refused++
			}
		}
	}
	for _, u := range uses {
		out.Uses = append(out.Uses, *u)
	}
	slices.SortFunc(out.Uses, func(a, b model.Use) int {
		return cmp.Or(cmp.Compare(a.Object, b.Object), cmp.Compare(a.Parent, b.Parent))
	})
	return out
}

// trusted is the digest of the roots that Trusted is true of, "" if it is not.
func (p *Pusher) trusted() string {
	if p.Issuer == nil {
		return ""
	}
	roots := p.Issuer.Roots()
	if len(roots) == 0 || !p.trusts(roots) {
		return ""
	}
	return identity.Digest(roots)
}

// use is of a route, for one of its parents, or of a policy.
type use struct{ object, parent string }

// acknowledged is what a proxy has of a route or a policy: the oldest generation that is
// in what it acknowledged, of all that is governed.
type acknowledged struct {
	generation int64
	refused    bool
}

// programmed is what the session's proxy has of each route and policy. One that has ceased
// to govern it does so until the proxy has acknowledged that.
func (s *session) programmed() map[use]acknowledged {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[use]acknowledged{}
	for name, h := range s.held {
		refused := s.refused[name] != ""
		if h.version == "" && !refused {
			continue
		}
		for _, g := range slices.Concat(h.governing, h.acked) {
			u := use{g.Object, g.Parent}
			now := acknowledged{generation: h.has(u), refused: refused}
			if before, ok := out[u]; ok {
				now = acknowledged{min(now.generation, before.generation), now.refused || before.refused}
			}
			out[u] = now
		}
	}
	return out
}

// has is the generation in which that is in what the proxy acknowledged; -1: it is not
// in it.
func (h held) has(u use) int64 {
	for _, g := range h.acked {
		if (use{g.Object, g.Parent}) == u {
			return g.Generation
		}
	}
	return -1
}
