package model

import (
	"iter"
	"strconv"
	"time"

	"github.com/weirmesh/weir/proxy/route"
)

// Route is an HTTPRoute, GRPCRoute or TCPRoute of the Gateway API, with those of
// its parents that are Services.
type Route struct {
	Kind            route.Kind
	Namespace, Name string
	Created         time.Time   // in UTC, to the second; zero: unknown, older than any
	Generation      int64       // that of the spec; 0: unknown
	Parents         []ParentRef // in the order of the spec
	Rules           []RouteRule
}

// ID is "namespace/name".
func (r Route) ID() string { return r.Namespace + "/" + r.Name }

// FullName is "HTTPRoute/namespace/name".
func (r Route) FullName() string { return KindName(r.Kind) + "/" + r.ID() }

// Targets are what its backends and mirrors name, each as often as it is named.
func (r Route) Targets() iter.Seq[Target] {
	return func(yield func(Target) bool) {
		for _, rule := range r.Rules {
			if !rule.Filters.targets(yield) {
				return
			}
			for _, b := range rule.Backends {
				if !yield(b.Target) || !b.Filters.targets(yield) {
					return
				}
			}
		}
	}
}

// targets yields what the mirrors name, and reports whether more is wanted.
func (f *RouteFilters) targets(yield func(Target) bool) bool {
	if f == nil {
		return true
	}
	for _, m := range f.Mirrors {
		if !yield(m.Target) {
			return false
		}
	}
	return true
}

// KindName is the name of a kind of routes in the Gateway API.
func KindName(k route.Kind) string {
	switch k {
	case route.GRPCRoute:
		return "GRPCRoute"
	case route.HTTPRoute:
		return "HTTPRoute"
	case route.TCPRoute:
		return "TCPRoute"
	}
	return "?"
}

// ParentRef names a Service that a route is for.
type ParentRef struct {
	Namespace, Name string
	Section         string // name of the Service's port; empty: any
	Port            uint16 // number of the Service's port; 0: any
}

// String is "namespace/name", with what it says of the port behind colons.
func (p ParentRef) String() string {
	out := p.Namespace + "/" + p.Name
	if p.Port != 0 {
		out += ":" + strconv.Itoa(int(p.Port))
	}
	if p.Section != "" {
		out += ":" + p.Section
	}
	return out
}

// RouteRule is one rule of a route.
type RouteRule struct {
	Name     string
	Matches  []RouteMatch  // a request must meet one; none: all do
	Filters  *RouteFilters // nil: none
	Backends []BackendRef  // none: the parent itself

	Timeout        *time.Duration // 0: none; nil: not said
	BackendTimeout time.Duration  // 0: none
	Retry          *route.Retry   // nil: not said

	SessionPersistence bool // it is asked for; nothing is done about it
}

// RouteMatch is one set of conditions. Its regular expressions may be none.
type RouteMatch struct {
	Path    RoutePath
	Method  string      // empty: any
	GRPC    *GRPCMethod // nil: any
	Headers []RouteValue
	Query   []RouteValue
	Unknown string // a condition that is none of those we know, in words; empty: there is none
}

// RoutePath is a condition on a path, as it is written.
type RoutePath struct {
	Kind  route.PathKind
	Value string
}

// GRPCMethod is a condition on a method. Empty parts match any.
type GRPCMethod struct {
	Service, Method string
	Regexp          bool // the parts are regular expressions
}

// RouteValue is a condition on a header or a query parameter.
type RouteValue struct {
	Name, Value string
	Regexp      bool
}

// RouteFilters are the filters of a rule or of one of its backends.
type RouteFilters struct {
	RequestHeaders, ResponseHeaders *route.HeaderChange
	Redirect                        *route.Redirect
	Rewrite                         *route.Rewrite
	CORS                            *route.CORS
	Mirrors                         []RouteMirror
	Extensions                      []string // ExtensionRefs: "group/Kind name"
	Unknown                         []string // types that we do not know
}

// RouteMirror is a filter that copies requests.
type RouteMirror struct {
	Target                 Target
	Numerator, Denominator uint32
}

// BackendRef is a target with its weight.
type BackendRef struct {
	Target  Target
	Weight  uint32
	Filters *RouteFilters // nil: none
}

// Target is what a reference to a backend names.
type Target struct {
	Kind            string // empty: a Service; else "group/Kind"
	Namespace, Name string
	Port            uint16 // 0: none is named
}

// ID is "namespace/name".
func (t Target) ID() string { return t.Namespace + "/" + t.Name }
