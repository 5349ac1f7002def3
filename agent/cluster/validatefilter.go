package cluster

import (
	"fmt"
	"slices"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// body is the part of a filter that belongs to one of its types.
type body struct {
	kind string
	set  bool
}

// filterType checks that a filter has the body of its type and no other.
func (v *validator) filterType(path, kind string, bodies []body) {
	known := make([]string, len(bodies))
	for i, b := range bodies {
		known[i] = b.kind
		switch {
		case b.set && b.kind != kind:
			v.fail(path, "has the body of type %s, and is of type %s", b.kind, kind)
		case !b.set && b.kind == kind:
			v.fail(path, "the body of type %s is missing", kind)
		}
	}
	oneOf(v, path+".type", kind, known)
}

// filterOnce refuses a second filter of a type, but of those that may be repeated.
func (v *validator) filterOnce(path string, kinds []string) {
	kinds = slices.DeleteFunc(slices.Clone(kinds), func(k string) bool {
		return slices.Contains([]string{"RequestMirror", "ExtensionRef", "ExternalAuth"}, k)
	})
	once(v, path, kinds, func(k string) string { return k })
}

func (v *validator) httpFilters(path string, filters []gatewayv1.HTTPRouteFilter) {
	path += ".filters"
	v.atMost(path, len(filters), 16)
	var kinds []string
	for i, f := range filters {
		kinds = append(kinds, string(f.Type))
		v.httpFilter(fmt.Sprintf("%s[%d]", path, i), f)
	}
	v.filterOnce(path, kinds)
	if slices.Contains(kinds, "RequestRedirect") && slices.Contains(kinds, "URLRewrite") {
		v.fail(path, "RequestRedirect and URLRewrite exclude each other")
	}
}

func (v *validator) httpFilter(path string, f gatewayv1.HTTPRouteFilter) {
	v.filterType(path, string(f.Type), []body{
		{"RequestHeaderModifier", f.RequestHeaderModifier != nil}, {"ResponseHeaderModifier", f.ResponseHeaderModifier != nil},
		{"RequestMirror", f.RequestMirror != nil}, {"RequestRedirect", f.RequestRedirect != nil}, {"URLRewrite", f.URLRewrite != nil},
		{"CORS", f.CORS != nil}, {"ExternalAuth", f.ExternalAuth != nil}, {"ExtensionRef", f.ExtensionRef != nil},
	})
	v.headerChange(path+".requestHeaderModifier", f.RequestHeaderModifier)
	v.headerChange(path+".responseHeaderModifier", f.ResponseHeaderModifier)
	v.mirror(path+".requestMirror", f.RequestMirror)
	if r := f.RequestRedirect; r != nil {
		path := path + ".requestRedirect"
		oneOf(v, path+".scheme", value(r.Scheme, "http"), []string{"http", "https"})
		oneOf(v, path+".statusCode", value(r.StatusCode, 302), redirectCodes)
		v.between(path+".port", int(value(r.Port, 1)), 1, 65535)
		v.rewriteTo(path, r.Hostname, r.Path)
	}
	if r := f.URLRewrite; r != nil {
		v.rewriteTo(path+".urlRewrite", r.Hostname, r.Path)
	}
	if f.CORS != nil {
		v.cors(path+".cors", *f.CORS)
	}
	v.externalAuth(path+".externalAuth", f.ExternalAuth)
	v.extension(path+".extensionRef", f.ExtensionRef)
}

func (v *validator) externalAuth(path string, f *gatewayv1.HTTPExternalAuthFilter) {
	if f == nil {
		return
	}
	kind := string(f.ExternalAuthProtocol)
	oneOf(v, path+".protocol", kind, []string{"HTTP", "GRPC"})
	if (f.HTTPAuthConfig != nil) != (kind == "HTTP") {
		v.fail(path, "http is what protocol HTTP needs, and no other has")
	}
	if (f.GRPCAuthConfig != nil) != (kind == "GRPC") {
		v.fail(path, "grpc is what protocol GRPC needs, and no other has")
	}
	v.target(path+".backendRef", f.BackendRef)
	if g := f.GRPCAuthConfig; g != nil {
		v.set(path+".grpc.allowedHeaders", g.AllowedRequestHeaders)
	}
	if h := f.HTTPAuthConfig; h != nil {
		v.set(path+".http.allowedHeaders", h.AllowedRequestHeaders)
		v.set(path+".http.allowedResponseHeaders", h.AllowedResponseHeaders)
		if h.Path != "" {
			v.text(path+".http.path", h.Path, 1024, pathText)
		}
	}
}

// set checks a list of headers that are there once.
func (v *validator) set(path string, list []string) {
	v.atMost(path, len(list), 64)
	once(v, path, list, func(s string) string { return s })
}

func (v *validator) extension(path string, ref *gatewayv1.LocalObjectReference) {
	if ref != nil {
		v.object(path, ref.Group, ref.Kind, ref.Name)
	}
}

func (v *validator) grpcFilters(path string, filters []gatewayv1.GRPCRouteFilter) {
	path += ".filters"
	v.atMost(path, len(filters), 16)
	var kinds []string
	for i, f := range filters {
		kinds = append(kinds, string(f.Type))
		path := fmt.Sprintf("%s[%d]", path, i)
		v.filterType(path, string(f.Type), []body{
			{"RequestHeaderModifier", f.RequestHeaderModifier != nil}, {"ResponseHeaderModifier", f.ResponseHeaderModifier != nil},
			{"RequestMirror", f.RequestMirror != nil}, {"ExtensionRef", f.ExtensionRef != nil},
		})
		v.headerChange(path+".requestHeaderModifier", f.RequestHeaderModifier)
		v.headerChange(path+".responseHeaderModifier", f.ResponseHeaderModifier)
		v.mirror(path+".requestMirror", f.RequestMirror)
		v.extension(path+".extensionRef", f.ExtensionRef)
	}
	v.filterOnce(path, kinds)
}

func (v *validator) headerChange(path string, f *gatewayv1.HTTPHeaderFilter) {
	if f == nil {
		return
	}
	for _, list := range []struct {
		name    string
		headers []gatewayv1.HTTPHeader
	}{{".set", f.Set}, {".add", f.Add}} {
		path := path + list.name
		v.atMost(path, len(list.headers), 16)
		once(v, path, list.headers, func(h gatewayv1.HTTPHeader) gatewayv1.HTTPHeaderName { return h.Name })
		for i, h := range list.headers {
			v.text(fmt.Sprintf("%s[%d].name", path, i), string(h.Name), 256, headerName)
			v.text(fmt.Sprintf("%s[%d].value", path, i), h.Value, 4096, headerValue)
		}
	}
	v.atMost(path+".remove", len(f.Remove), 16)
	once(v, path+".remove", f.Remove, func(name string) string { return name })
}

func (v *validator) mirror(path string, f *gatewayv1.HTTPRequestMirrorFilter) {
	if f == nil {
		return
	}
	v.target(path+".backendRef", f.BackendRef)
	if f.Percent != nil {
		v.between(path+".percent", int(*f.Percent), 0, 100)
	}
	if f.Percent != nil && f.Fraction != nil {
		v.fail(path, "percent and fraction exclude each other")
	}
	if share := f.Fraction; share != nil {
		denominator := int(value(share.Denominator, 100))
		if denominator < 1 {
			v.fail(path+".fraction.denominator", "%d is less than 1", denominator)
		}
		v.between(path+".fraction.numerator", int(share.Numerator), 0, denominator)
	}
}

func (v *validator) rewriteTo(path string, host *gatewayv1.PreciseHostname, p *gatewayv1.HTTPPathModifier) {
	if host != nil {
		v.text(path+".hostname", string(*host), 253, dnsName)
	}
	if p == nil {
		return
	}
	path += ".path"
	v.filterType(path, string(p.Type), []body{
		{"ReplaceFullPath", p.ReplaceFullPath != nil}, {"ReplacePrefixMatch", p.ReplacePrefixMatch != nil},
	})
	v.short(path, value(p.ReplaceFullPath, ""), 1024)
	v.short(path, value(p.ReplacePrefixMatch, ""), 1024)
}

// prefixes checks that what replaces a prefix is in a rule with one match, by a
// prefix. If two backends have what does, the CRD does not look.
func (v *validator) prefixes(path string, r gatewayv1.HTTPRouteRule) {
	if r.Matches == nil || len(r.Matches) == 1 &&
		(r.Matches[0].Path == nil || value(r.Matches[0].Path.Type, gatewayv1.PathMatchPathPrefix) == gatewayv1.PathMatchPathPrefix) {
		return
	}
	for _, of := range []func(gatewayv1.HTTPRouteFilter) (string, *gatewayv1.HTTPPathModifier){redirectPath, rewritePath} {
		places := prefixChanges(path, r.Filters, of)
		var below []string
		for i, b := range r.BackendRefs {
			below = append(below, prefixChanges(fmt.Sprintf("%s.backendRefs[%d]", path, i), b.Filters, of)...)
		}
		if len(below) == 1 {
			places = append(places, below[0])
		}
		for _, place := range places {
			v.fail(place, "ReplacePrefixMatch needs a rule with one match, of type PathPrefix")
		}
	}
}

func redirectPath(f gatewayv1.HTTPRouteFilter) (string, *gatewayv1.HTTPPathModifier) {
	if f.RequestRedirect == nil {
		return "", nil
	}
	return "requestRedirect", f.RequestRedirect.Path
}

func rewritePath(f gatewayv1.HTTPRouteFilter) (string, *gatewayv1.HTTPPathModifier) {
	if f.URLRewrite == nil {
		return "", nil
	}
	return "urlRewrite", f.URLRewrite.Path
}

// prefixChanges are the paths of what replaces a prefix.
func prefixChanges(
	path string, filters []gatewayv1.HTTPRouteFilter, of func(gatewayv1.HTTPRouteFilter) (string, *gatewayv1.HTTPPathModifier),
) []string {
	var out []string
	for i, f := range filters {
		if body, change := of(f); change != nil && change.ReplacePrefixMatch != nil {
			out = append(out, fmt.Sprintf("%s.filters[%d].%s.path", path, i, body))
		}
	}
	return out
}

func (v *validator) cors(path string, f gatewayv1.HTTPCORSFilter) {
	wildcard(v, path+".allowOrigins", f.AllowOrigins, 64)
	wildcard(v, path+".allowMethods", f.AllowMethods, 9)
	wildcard(v, path+".allowHeaders", f.AllowHeaders, 64)
	v.atMost(path+".exposeHeaders", len(f.ExposeHeaders), 64)
	once(v, path+".exposeHeaders", f.ExposeHeaders, func(h gatewayv1.HTTPHeaderName) gatewayv1.HTTPHeaderName { return h })
	for i, o := range f.AllowOrigins {
		v.text(fmt.Sprintf("%s.allowOrigins[%d]", path, i), string(o), 253, corsOrigin)
	}
	for i, m := range f.AllowMethods {
		oneOf(v, fmt.Sprintf("%s.allowMethods[%d]", path, i), string(m), append([]string{"*"}, methods...))
	}
	for _, list := range []struct {
		name    string
		headers []gatewayv1.HTTPHeaderName
	}{{".allowHeaders", f.AllowHeaders}, {".exposeHeaders", f.ExposeHeaders}} {
		for i, h := range list.headers {
			v.text(fmt.Sprintf("%s%s[%d]", path, list.name, i), string(h), 256, headerName)
		}
	}
	if f.MaxAge < 0 {
		v.fail(path+".maxAge", "%d is less than 1", f.MaxAge)
	}
}

// wildcard checks a list whose "*" stands alone.
func wildcard[T ~string](v *validator, path string, list []T, limit int) {
	v.atMost(path, len(list), limit)
	once(v, path, list, func(t T) T { return t })
	if len(list) > 1 && slices.Contains(list, "*") {
		v.fail(path, `"*" stands alone`)
	}
}
