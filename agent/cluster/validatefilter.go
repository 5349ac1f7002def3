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

func (v *validator) httpFilters(path string, filters []gatewayv1.HTTPRouteFilter, onePrefix bool) {
	path += ".filters"
	v.atMost(path, len(filters), 16)
	var kinds []string
	for i, f := range filters {
		kinds = append(kinds, string(f.Type))
		v.httpFilter(fmt.Sprintf("%s[%d]", path, i), f, onePrefix)
	}
	v.filterOnce(path, kinds)
	if slices.Contains(kinds, "RequestRedirect") && slices.Contains(kinds, "URLRewrite") {
		v.fail(path, "RequestRedirect and URLRewrite exclude each other")
	}
}

func (v *validator) httpFilter(path string, f gatewayv1.HTTPRouteFilter, onePrefix bool) {
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
		v.rewriteTo(path, r.Hostname, r.Path, onePrefix)
	}
	if r := f.URLRewrite; r != nil {
		v.rewriteTo(path+".urlRewrite", r.Hostname, r.Path, onePrefix)
	}
	if f.CORS != nil {
		v.cors(path+".cors", *f.CORS)
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

func (v *validator) rewriteTo(path string, host *gatewayv1.PreciseHostname, p *gatewayv1.HTTPPathModifier, onePrefix bool) {
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
	if max(len(value(p.ReplaceFullPath, "")), len(value(p.ReplacePrefixMatch, ""))) > 1024 {
		v.fail(path, "is longer than 1024 bytes")
	}
	if p.ReplacePrefixMatch != nil && !onePrefix {
		v.fail(path, "ReplacePrefixMatch needs a rule with one match, of type PathPrefix")
	}
}

func (v *validator) cors(path string, f gatewayv1.HTTPCORSFilter) {
	wildcard(v, path+".allowOrigins", f.AllowOrigins, 64)
	wildcard(v, path+".allowMethods", f.AllowMethods, 9)
	wildcard(v, path+".allowHeaders", f.AllowHeaders, 64)
	v.atMost(path+".exposeHeaders", len(f.ExposeHeaders), 64)
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
