package authz

import (
	"slices"

	"github.com/weirmesh/weir/proxy/route"
)

// Evaluate decides on a request of HTTP by a peer, or, where r is nil, on a connection
// that carries none. port is the application's. It allocates nothing but the list of
// what was audited, and cannot fail: what could not be evaluated was not compiled.
func (s *Set) Evaluate(peer Identity, port uint16, r Request) Decision {
	out := Decision{Allowed: true}
	if s == nil {
		return out
	}
	who := s.who(peer)
	for i := range s.deny {
		p := &s.deny[i]
		switch {
		case !p.met(who, port, r, Deny):
		case p.audit:
			out.Audited = append(out.Audited, p.name)
		default:
			out.Allowed, out.Policy = false, p.name
			return out
		}
	}
	audited := false // an ALLOW policy with audit is met
	for i := range s.allow {
		p := &s.allow[i]
		switch {
		case p.audit && (audited || s.closed), !p.met(who, port, r, Allow):
		case p.audit:
			audited = true
		default:
			out.Policy = p.name
			return out
		}
	}
	switch {
	case s.closed:
		out.Allowed, out.Policy = false, NoPolicy
	case s.auditClosed && !audited:
		out.Audited = append(out.Audited, NoPolicy)
	}
	return out
}

// Hopeless reports whether nothing that the peer could ask for at the port is allowed,
// HTTP or not.
func (s *Set) Hopeless(peer Identity, port uint16) bool {
	if s == nil {
		return false
	}
	who := s.who(peer)
	for i := range s.deny {
		if p := &s.deny[i]; !p.audit && p.reached(who, port, true) {
			return true
		}
	}
	return s.closed && !slices.ContainsFunc(s.allow, func(p policy) bool { return !p.audit && p.reached(who, port, false) })
}

// reached reports whether a rule is met but for what it asks of HTTP; whole: one that
// asks for nothing of it.
func (p *policy) reached(who caller, port uint16, whole bool) bool {
	for i := range p.rules {
		if r := &p.rules[i]; r.about(who, port) && (!whole || r.http == nil) {
			return true
		}
	}
	return false
}

func (p *policy) met(who caller, port uint16, r Request, action Action) bool {
	for i := range p.rules {
		if one := &p.rules[i]; one.about(who, port) && one.http.met(r, action) {
			return true
		}
	}
	return false
}

// about reports whether the rule's sources and ports are met.
func (r *rule) about(who caller, port uint16) bool {
	return (r.anyone || who.named.have(r.number) || who.included.have(r.number)) &&
		(len(r.ports) == 0 || slices.Contains(r.ports, port))
}

// caller is a peer, as the rules that have it among their sources: by its name, and with
// all of its namespace.
type caller struct{ named, included numbers }

func (s *Set) who(peer Identity) caller {
	if !peer.Known() || peer.ServiceAccount == "" || len(s.sources) == 0 {
		return caller{}
	}
	named := s.sources[peer]
	peer.ServiceAccount = ""
	return caller{named, s.sources[peer]}
}

func (h *http) met(r Request, action Action) bool {
	switch {
	case h == nil:
		return true
	case r == nil:
		return action == Deny
	}
	if len(h.methods) > 0 && !has(h.methods, r.Method()) || !h.anyPath && !h.path(r.Path()) {
		return false
	}
	for i := range h.headers {
		if !h.headers[i].met(r, action) {
			return false
		}
	}
	return true
}

func has(list []string, text []byte) bool {
	for _, one := range list {
		if one == string(text) {
			return true
		}
	}
	return false
}

// path is of a path that is there: no condition is met where there is none.
func (h *http) path(path []byte) bool {
	if len(path) == 0 {
		return false
	}
	if _, ok := h.exact[string(path)]; ok {
		return true
	}
	for _, prefix := range h.prefixes {
		if route.UnderPrefix(path, prefix) {
			return true
		}
	}
	return false
}

// met is, for Allow, whether the field is there and has no other value; for Deny,
// whether it has that value once.
func (h *Header) met(r Request, action Action) bool {
	there := false
	for i := range r.Len() {
		if !r.Is(i, h.Name) {
			continue
		}
		switch same := string(r.Value(i)) == h.Value; {
		case same && action == Deny:
			return true
		case !same && action == Allow:
			return false
		}
		there = true
	}
	return there && action == Allow
}
