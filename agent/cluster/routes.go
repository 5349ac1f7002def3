package cluster

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1alpha2 "sigs.k8s.io/gateway-api/apis/v1alpha2"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// What an API server fills in and checks is filled in here too, and not checked:
// an enumeration's value that is not known is kept as such, since a newer CRD may
// have it.

// Defaults of what the Gateway API leaves open (HTTPRouteRetry).
const (
	retryAttempts = 1
	retryBackoff  = 25 * time.Millisecond
)

// retryCodes are the answers that are tried again if the route names none.
var retryCodes = []uint16{500, 502, 503, 504}

// corsMaxAge is in seconds.
const corsMaxAge = 5

// IsServiceParent reports whether a parentRef is to a Service: no others are in a
// model.Route's Parents.
func IsServiceParent(p gatewayv1.ParentReference) bool {
	return value(p.Group, gatewayv1.GroupName) == corev1.GroupName && value(p.Kind, "Gateway") == "Service"
}

// HTTPRoute cuts an object down to the model. The error names the field.
func HTTPRoute(r *gatewayv1.HTTPRoute) (model.Route, error) {
	out := newRoute(route.HTTPRoute, r, r.Spec.CommonRouteSpec)
	for i, rule := range r.Spec.Rules {
		converted, err := httpRule(r.Namespace, rule)
		if err != nil {
			return model.Route{}, fmt.Errorf("spec.rules[%d].%w", i, err)
		}
		out.Rules = append(out.Rules, converted)
	}
	if len(r.Spec.Rules) == 0 { // the CRD's default
		out.Rules = []model.RouteRule{{}}
	}
	return out, nil
}

// GRPCRoute cuts an object down to the model. The error names the field.
func GRPCRoute(r *gatewayv1.GRPCRoute) (model.Route, error) {
	out := newRoute(route.GRPCRoute, r, r.Spec.CommonRouteSpec)
	for i, rule := range r.Spec.Rules {
		converted, err := grpcRule(r.Namespace, rule)
		if err != nil {
			return model.Route{}, fmt.Errorf("spec.rules[%d].%w", i, err)
		}
		out.Rules = append(out.Rules, converted)
	}
	return out, nil
}

// TCPRoute cuts an object down to the model. The error names the field.
func TCPRoute(r *gatewayv1.TCPRoute) (model.Route, error) {
	return tcpRoute(r, r.Spec.CommonRouteSpec, r.Spec.Rules)
}

// TCPRouteV1Alpha2 is TCPRoute for the version that CRDs before v1.6 have.
func TCPRouteV1Alpha2(r *gatewayv1alpha2.TCPRoute) (model.Route, error) {
	return tcpRoute(r, r.Spec.CommonRouteSpec, tcpRules(r))
}

func tcpRules(r *gatewayv1alpha2.TCPRoute) []gatewayv1.TCPRouteRule {
	out := make([]gatewayv1.TCPRouteRule, len(r.Spec.Rules))
	for i, rule := range r.Spec.Rules {
		out[i] = gatewayv1.TCPRouteRule(rule)
	}
	return out
}

func tcpRoute(o Object, spec gatewayv1.CommonRouteSpec, rules []gatewayv1.TCPRouteRule) (model.Route, error) {
	out := newRoute(route.TCPRoute, o, spec)
	for i, rule := range rules {
		converted := model.RouteRule{Name: string(value(rule.Name, ""))}
		for j, ref := range rule.BackendRefs {
			backend, err := backendRef(o.GetNamespace(), ref, nil)
			if err != nil {
				return model.Route{}, fmt.Errorf("spec.rules[%d].backendRefs[%d].%w", i, j, err)
			}
			converted.Backends = append(converted.Backends, backend)
		}
		out.Rules = append(out.Rules, converted)
	}
	return out, nil
}

// newRoute is a route without its rules.
func newRoute(k route.Kind, o Object, spec gatewayv1.CommonRouteSpec) model.Route {
	out := model.Route{
		Kind: k, Namespace: shared(o.GetNamespace()), Name: o.GetName(), Created: o.GetCreationTimestamp().UTC(), Generation: o.GetGeneration(),
	}
	for _, p := range spec.ParentRefs {
		if IsServiceParent(p) {
			out.Parents = append(out.Parents, model.ParentRef{
				Namespace: shared(string(value(p.Namespace, gatewayv1.Namespace(o.GetNamespace())))),
				Name:      shared(string(p.Name)), Section: string(value(p.SectionName, "")), Port: uint16(value(p.Port, 0)),
			})
		}
	}
	return out
}

func httpRule(namespace string, r gatewayv1.HTTPRouteRule) (model.RouteRule, error) {
	out := model.RouteRule{Name: string(value(r.Name, "")), SessionPersistence: r.SessionPersistence != nil}
	for _, m := range r.Matches {
		out.Matches = append(out.Matches, httpMatch(m))
	}
	var err error
	if out.Filters, err = httpFilters(namespace, r.Filters); err != nil {
		return out, err
	}
	for i, ref := range r.BackendRefs {
		filters, err := httpFilters(namespace, ref.Filters)
		if err != nil {
			return out, fmt.Errorf("backendRefs[%d].%w", i, err)
		}
		backend, err := backendRef(namespace, ref.BackendRef, filters)
		if err != nil {
			return out, fmt.Errorf("backendRefs[%d].%w", i, err)
		}
		out.Backends = append(out.Backends, backend)
	}
	if t := r.Timeouts; t != nil {
		if t.Request != nil {
			request, err := duration(t.Request)
			if err != nil {
				return out, fmt.Errorf("timeouts.request: %w", err)
			}
			out.Timeout = &request
		}
		if out.BackendTimeout, err = duration(t.BackendRequest); err != nil {
			return out, fmt.Errorf("timeouts.backendRequest: %w", err)
		}
	}
	out.Retry, err = retry(r.Retry)
	return out, err
}

func retry(r *gatewayv1.HTTPRouteRetry) (*route.Retry, error) {
	if r == nil {
		return nil, nil
	}
	out := &route.Retry{Attempts: value(r.Attempts, retryAttempts), Codes: retryCodes, Backoff: retryBackoff}
	if len(r.Codes) > 0 {
		out.Codes = make([]uint16, len(r.Codes))
		for i, c := range r.Codes {
			out.Codes[i] = uint16(c)
		}
	}
	if r.Backoff == nil {
		return out, nil
	}
	var err error
	if out.Backoff, err = duration(r.Backoff); err != nil {
		return nil, fmt.Errorf("retry.backoff: %w", err)
	}
	return out, nil
}

// duration reads GEP-2257's subset of what Go reads. Nil is 0.
func duration(d *gatewayv1.Duration) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	return time.ParseDuration(string(*d))
}

func httpMatch(m gatewayv1.HTTPRouteMatch) model.RouteMatch {
	out := model.RouteMatch{Method: string(value(m.Method, ""))}
	if p := m.Path; p != nil {
		out.Path.Value = value(p.Value, "/")
		switch kind := value(p.Type, gatewayv1.PathMatchPathPrefix); kind {
		case gatewayv1.PathMatchExact:
			out.Path.Kind = route.PathExact
		case gatewayv1.PathMatchPathPrefix:
			out.Path.Kind = route.PathPrefix
		case gatewayv1.PathMatchRegularExpression:
			out.Path.Kind = route.PathRegexp
		default:
			out.Unknown = "path.type " + string(kind)
		}
	} else {
		out.Path = model.RoutePath{Kind: route.PathPrefix, Value: "/"}
	}
	for _, h := range m.Headers {
		out.Headers = append(out.Headers, routeValue(&out, "headers", string(h.Name), h.Value, string(value(h.Type, ""))))
	}
	for _, q := range m.QueryParams {
		out.Query = append(out.Query, routeValue(&out, "queryParams", string(q.Name), q.Value, string(value(q.Type, ""))))
	}
	return out
}

// routeValue is a condition of a match; all types have the same names.
func routeValue(of *model.RouteMatch, field, name, value, kind string) model.RouteValue {
	regexp, known := exactOrRegexp(kind)
	if !known {
		of.Unknown = field + ".type " + kind
	}
	return model.RouteValue{Name: name, Value: value, Regexp: regexp}
}

// exactOrRegexp reads the type of a comparison: whether it is by a regular
// expression, and whether it is known at all.
func exactOrRegexp(kind string) (bool, bool) {
	regexp := kind == string(gatewayv1.HeaderMatchRegularExpression)
	return regexp, regexp || kind == "" || kind == string(gatewayv1.HeaderMatchExact)
}

func grpcRule(namespace string, r gatewayv1.GRPCRouteRule) (model.RouteRule, error) {
	out := model.RouteRule{Name: string(value(r.Name, "")), SessionPersistence: r.SessionPersistence != nil}
	for _, m := range r.Matches {
		out.Matches = append(out.Matches, grpcMatch(m))
	}
	var err error
	if out.Filters, err = grpcFilters(namespace, r.Filters); err != nil {
		return out, err
	}
	for i, ref := range r.BackendRefs {
		filters, err := grpcFilters(namespace, ref.Filters)
		if err != nil {
			return out, fmt.Errorf("backendRefs[%d].%w", i, err)
		}
		backend, err := backendRef(namespace, ref.BackendRef, filters)
		if err != nil {
			return out, fmt.Errorf("backendRefs[%d].%w", i, err)
		}
		out.Backends = append(out.Backends, backend)
	}
	return out, nil
}

func grpcMatch(m gatewayv1.GRPCRouteMatch) model.RouteMatch {
	var out model.RouteMatch
	if g := m.Method; g != nil {
		kind := string(value(g.Type, ""))
		regexp, known := exactOrRegexp(kind)
		if !known {
			out.Unknown = "method.type " + kind
		}
		out.GRPC = &model.GRPCMethod{Service: value(g.Service, ""), Method: value(g.Method, ""), Regexp: regexp}
	}
	for _, h := range m.Headers {
		out.Headers = append(out.Headers, routeValue(&out, "headers", string(h.Name), h.Value, string(value(h.Type, ""))))
	}
	return out
}

func backendRef(namespace string, ref gatewayv1.BackendRef, filters *model.RouteFilters) (model.BackendRef, error) {
	target, err := toTarget(namespace, ref.BackendObjectReference)
	if err != nil {
		return model.BackendRef{}, err
	}
	weight := value(ref.Weight, 1)
	if weight < 0 || weight > maxWeight {
		return model.BackendRef{}, fmt.Errorf("weight: %d is not between 0 and %d", weight, maxWeight)
	}
	return model.BackendRef{Target: target, Weight: uint32(weight), Filters: filters}, nil
}

// maxWeight is the greatest weight of a backend.
const maxWeight = 1_000_000

func toTarget(namespace string, ref gatewayv1.BackendObjectReference) (model.Target, error) {
	out := model.Target{
		Namespace: shared(string(value(ref.Namespace, gatewayv1.Namespace(namespace)))),
		Name:      shared(string(ref.Name)),
	}
	if group, kind := value(ref.Group, ""), value(ref.Kind, "Service"); group != corev1.GroupName || kind != "Service" {
		out.Kind = strings.TrimPrefix(string(group)+"/"+string(kind), "/")
	}
	if ref.Port != nil {
		var err error
		if out.Port, err = toPort(*ref.Port); err != nil {
			return out, fmt.Errorf("port: %w", err)
		}
	}
	return out, nil
}

func httpFilters(namespace string, in []gatewayv1.HTTPRouteFilter) (*model.RouteFilters, error) {
	if len(in) == 0 {
		return nil, nil
	}
	out := &model.RouteFilters{}
	for i, f := range in {
		var err error
		switch {
		case f.Type == gatewayv1.HTTPRouteFilterRequestRedirect && f.RequestRedirect != nil:
			out.Redirect, err = redirect(*f.RequestRedirect)
		case f.Type == gatewayv1.HTTPRouteFilterURLRewrite && f.URLRewrite != nil:
			out.Rewrite = &route.Rewrite{Hostname: string(value(f.URLRewrite.Hostname, "")), Path: pathChange(f.URLRewrite.Path)}
		case f.Type == gatewayv1.HTTPRouteFilterCORS && f.CORS != nil:
			out.CORS = cors(*f.CORS)
		default:
			err = commonFilter(out, namespace, string(f.Type), f.RequestHeaderModifier, f.ResponseHeaderModifier, f.RequestMirror, f.ExtensionRef)
		}
		if err != nil {
			return nil, fmt.Errorf("filters[%d].%w", i, err)
		}
	}
	return out, nil
}

func grpcFilters(namespace string, in []gatewayv1.GRPCRouteFilter) (*model.RouteFilters, error) {
	if len(in) == 0 {
		return nil, nil
	}
	out := &model.RouteFilters{}
	for i, f := range in {
		if err := commonFilter(out, namespace, string(f.Type), f.RequestHeaderModifier, f.ResponseHeaderModifier, f.RequestMirror, f.ExtensionRef); err != nil {
			return nil, fmt.Errorf("filters[%d].%w", i, err)
		}
	}
	return out, nil
}

// commonFilter reads a filter that routes of both kinds have.
func commonFilter(
	out *model.RouteFilters, namespace, kind string, request, response *gatewayv1.HTTPHeaderFilter,
	mirror *gatewayv1.HTTPRequestMirrorFilter, extension *gatewayv1.LocalObjectReference,
) error {
	switch {
	case kind == string(gatewayv1.HTTPRouteFilterRequestHeaderModifier) && request != nil:
		out.RequestHeaders = headerChange(*request)
	case kind == string(gatewayv1.HTTPRouteFilterResponseHeaderModifier) && response != nil:
		out.ResponseHeaders = headerChange(*response)
	case kind == string(gatewayv1.HTTPRouteFilterRequestMirror) && mirror != nil:
		m, err := toMirror(namespace, *mirror)
		if err != nil {
			return fmt.Errorf("requestMirror.%w", err)
		}
		out.Mirrors = append(out.Mirrors, m)
	case kind == string(gatewayv1.HTTPRouteFilterExtensionRef) && extension != nil:
		out.Extensions = append(out.Extensions, fmt.Sprintf("%s/%s %s", extension.Group, extension.Kind, extension.Name))
	default:
		out.Unknown = append(out.Unknown, kind)
	}
	return nil
}

func headerChange(f gatewayv1.HTTPHeaderFilter) *route.HeaderChange {
	headers := func(in []gatewayv1.HTTPHeader) []route.Header {
		var out []route.Header
		for _, h := range in {
			out = append(out, route.Header{Name: strings.ToLower(string(h.Name)), Value: h.Value})
		}
		return out
	}
	out := &route.HeaderChange{Set: headers(f.Set), Add: headers(f.Add)}
	for _, name := range f.Remove {
		out.Remove = append(out.Remove, strings.ToLower(name))
	}
	return out
}

func redirect(f gatewayv1.HTTPRequestRedirectFilter) (*route.Redirect, error) {
	out := &route.Redirect{
		Scheme: value(f.Scheme, ""), Hostname: string(value(f.Hostname, "")), Path: pathChange(f.Path), Status: value(f.StatusCode, 302),
	}
	if f.Port != nil {
		var err error
		if out.Port, err = toPort(*f.Port); err != nil {
			return nil, fmt.Errorf("requestRedirect.port: %w", err)
		}
	}
	return out, nil
}

func pathChange(p *gatewayv1.HTTPPathModifier) *route.PathChange {
	switch {
	case p == nil:
		return nil
	case p.Type == gatewayv1.PrefixMatchHTTPPathModifier:
		return &route.PathChange{Prefix: true, Value: value(p.ReplacePrefixMatch, "")}
	}
	return &route.PathChange{Value: value(p.ReplaceFullPath, "")}
}

func toMirror(namespace string, f gatewayv1.HTTPRequestMirrorFilter) (model.RouteMirror, error) {
	target, err := toTarget(namespace, f.BackendRef)
	if err != nil {
		return model.RouteMirror{}, fmt.Errorf("backendRef.%w", err)
	}
	out := model.RouteMirror{Target: target, Numerator: 1, Denominator: 1}
	if f.Percent != nil {
		out.Numerator, out.Denominator = uint32(*f.Percent), 100
	} else if f.Fraction != nil {
		out.Numerator, out.Denominator = uint32(f.Fraction.Numerator), uint32(value(f.Fraction.Denominator, 100))
	}
	if out.Denominator == 0 || out.Numerator > out.Denominator {
		return out, fmt.Errorf("fraction: %d in %d is no share", out.Numerator, out.Denominator)
	}
	return out, nil
}

func cors(f gatewayv1.HTTPCORSFilter) *route.CORS {
	return &route.CORS{
		AllowOrigins: texts(f.AllowOrigins), AllowMethods: texts(f.AllowMethods), AllowHeaders: texts(f.AllowHeaders),
		ExposeHeaders: texts(f.ExposeHeaders), AllowCredentials: value(f.AllowCredentials, false), MaxAge: cmp.Or(f.MaxAge, corsMaxAge),
	}
}

func texts[T ~string](in []T) []string {
	var out []string
	for _, t := range in {
		out = append(out, string(t))
	}
	return out
}
