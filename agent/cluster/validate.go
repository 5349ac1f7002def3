package cluster

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1alpha2 "sigs.k8s.io/gateway-api/apis/v1alpha2"
)

// What the CRDs of the Gateway API (v1.6.3, experimental channel) say of a route's
// values, for a directory, which no API server has looked at. Their own schemas and
// expressions would take a validator larger than the agent.

// Patterns of the CRDs.
var (
	dnsLabel      = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)
	dnsName       = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	hostname      = regexp.MustCompile(`^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	kindName      = regexp.MustCompile(`^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$`)
	headerName    = regexp.MustCompile(`^[A-Za-z0-9!#$%&'*+\-.^_` + "`" + `|~]+$`)
	pathText      = regexp.MustCompile(`^(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|[%][0-9a-fA-F]{2})+$`)
	durationText  = regexp.MustCompile(`^([0-9]{1,5}(h|m|s|ms)){1,4}$`)
	corsOrigin    = regexp.MustCompile(`(^\*$)|(^(http(s)?):\/\/(((\*\.)?([a-zA-Z0-9\-]+\.)*[a-zA-Z0-9-]+|\*)(:([0-9]{1,5}))?)$)`)
	headerValue   = regexp.MustCompile(`^[!-~]+([\t ]?[!-~]+)*$`)
	grpcService   = regexp.MustCompile(`^(?i)\.?[a-z_][a-z_0-9]*(\.[a-z_][a-z_0-9]*)*$`)
	grpcCall      = regexp.MustCompile(`^[A-Za-z_][A-Za-z_0-9]*$`)
	methods       = []string{"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}
	comparisons   = []string{"Exact", "RegularExpression"}
	redirectCodes = []int{301, 302, 303, 307, 308}
)

// validator keeps the first mistake of an object.
type validator struct{ err error }

func (v *validator) fail(path, format string, args ...any) {
	if v.err == nil {
		v.err = fmt.Errorf("%s: %s", path, fmt.Sprintf(format, args...))
	}
}

func (v *validator) atMost(path string, n, limit int) {
	if n > limit {
		v.fail(path, "%d are more than %d", n, limit)
	}
}

// short checks a text's length as the CRDs do, who do not count bytes.
func (v *validator) short(path, s string, limit int) {
	if utf8.RuneCountInString(s) > limit {
		v.fail(path, "is longer than %d characters", limit)
	}
}

// text checks a text that must be there.
func (v *validator) text(path, s string, limit int, pattern *regexp.Regexp) {
	if s == "" {
		v.fail(path, "is missing")
	}
	v.short(path, s, limit)
	if pattern != nil && !pattern.MatchString(s) {
		v.fail(path, "%q does not match %s", s, pattern)
	}
}

func (v *validator) between(path string, n, low, high int) {
	if n < low || n > high {
		v.fail(path, "%d is not between %d and %d", n, low, high)
	}
}

func oneOf[T comparable](v *validator, path string, s T, known []T) {
	if !slices.Contains(known, s) {
		v.fail(path, "%v is none of %v", s, known)
	}
}

// once fails for the second entry of a list that has an equal key before.
func once[E any, K comparable](v *validator, path string, list []E, keyOf func(E) K) {
	seen := map[K]bool{}
	for i, e := range list {
		k := keyOf(e)
		if seen[k] {
			v.fail(fmt.Sprintf("%s[%d]", path, i), "%v is there twice", k)
		}
		seen[k] = true
	}
}

func validateHTTPRoute(r *gatewayv1.HTTPRoute) error {
	v := &validator{}
	v.common(r.Spec.CommonRouteSpec)
	v.hostnames(r.Spec.Hostnames)
	if r.Spec.Rules != nil {
		v.between("spec.rules: number of rules", len(r.Spec.Rules), 1, 16)
	}
	total := 0
	for i, rule := range r.Spec.Rules {
		v.httpRule(fmt.Sprintf("spec.rules[%d]", i), rule)
		total += len(rule.Matches)
		if rule.Matches == nil { // the CRD's default has one
			total++
		}
	}
	v.atMost("spec.rules: matches", total, 128)
	v.ruleNames(len(r.Spec.Rules), func(i int) *gatewayv1.SectionName { return r.Spec.Rules[i].Name })
	return v.err
}

func validateGRPCRoute(r *gatewayv1.GRPCRoute) error {
	v := &validator{}
	v.common(r.Spec.CommonRouteSpec)
	v.hostnames(r.Spec.Hostnames)
	v.atMost("spec.rules", len(r.Spec.Rules), 16)
	total := 0
	for i, rule := range r.Spec.Rules {
		v.grpcRule(fmt.Sprintf("spec.rules[%d]", i), rule)
		total += len(rule.Matches)
	}
	v.atMost("spec.rules: matches", total, 128)
	v.ruleNames(len(r.Spec.Rules), func(i int) *gatewayv1.SectionName { return r.Spec.Rules[i].Name })
	return v.err
}

func validateTCPRoute(r *gatewayv1.TCPRoute) error {
	return validateTCPRules(r.Spec.CommonRouteSpec, r.Spec.Rules, 1)
}

func validateTCPRouteV1Alpha2(r *gatewayv1alpha2.TCPRoute) error {
	return validateTCPRules(r.Spec.CommonRouteSpec, tcpRules(r), 16)
}

func validateTCPRules(spec gatewayv1.CommonRouteSpec, rules []gatewayv1.TCPRouteRule, limit int) error {
	v := &validator{}
	v.common(spec)
	v.between("spec.rules: number of rules", len(rules), 1, limit)
	for i, rule := range rules {
		path := fmt.Sprintf("spec.rules[%d].backendRefs", i)
		v.between(path+": number of references", len(rule.BackendRefs), 1, 16)
		for j, ref := range rule.BackendRefs {
			v.backend(fmt.Sprintf("%s[%d]", path, j), ref)
		}
	}
	v.ruleNames(len(rules), func(i int) *gatewayv1.SectionName { return rules[i].Name })
	return v.err
}

func (v *validator) common(spec gatewayv1.CommonRouteSpec) {
	v.atMost("spec.parentRefs", len(spec.ParentRefs), 32)
	for i, p := range spec.ParentRefs {
		path := fmt.Sprintf("spec.parentRefs[%d]", i)
		v.reference(path, p.Group, p.Kind, p.Name, p.Namespace, p.Port)
		if p.SectionName != nil {
			v.text(path+".sectionName", string(*p.SectionName), 253, dnsName)
		}
		for _, other := range spec.ParentRefs[:i] {
			v.distinct(path, p, other)
		}
	}
	if spec.UseDefaultGateways != "" {
		oneOf(v, "spec.useDefaultGateways", string(spec.UseDefaultGateways), []string{"All", "None"})
	}
}

// distinct holds two parentRefs against each other: those to one object must set
// the same fields, to different values. For the CRD a namespace that is left out is
// another than the route's own, named.
func (v *validator) distinct(path string, a, b gatewayv1.ParentReference) {
	object := func(p gatewayv1.ParentReference) [4]string {
		return [4]string{
			string(value(p.Group, gatewayv1.GroupName)), string(value(p.Kind, "Gateway")),
			string(value(p.Namespace, "")), string(p.Name),
		}
	}
	switch {
	case object(a) != object(b):
	case (value(a.SectionName, "") == "") != (value(b.SectionName, "") == ""), (value(a.Port, 0) == 0) != (value(b.Port, 0) == 0):
		v.fail(path, "another parentRef to %s does not set the same of sectionName and port", a.Name)
	case value(a.SectionName, "") == value(b.SectionName, "") && value(a.Port, 0) == value(b.Port, 0):
		v.fail(path, "another parentRef to %s is equal", a.Name)
	}
}

func (v *validator) reference(path string, group *gatewayv1.Group, kind *gatewayv1.Kind, name gatewayv1.ObjectName, namespace *gatewayv1.Namespace, port *int32) {
	v.object(path, value(group, ""), value(kind, "Service"), name)
	if namespace != nil {
		v.text(path+".namespace", string(*namespace), 63, dnsLabel)
	}
	if port != nil {
		v.between(path+".port", int(*port), 1, 65535)
	}
}

// object checks what names an object of any kind.
func (v *validator) object(path string, group gatewayv1.Group, kind gatewayv1.Kind, name gatewayv1.ObjectName) {
	if group != "" {
		v.text(path+".group", string(group), 253, dnsName)
	}
	v.text(path+".kind", string(kind), 63, kindName)
	v.text(path+".name", string(name), 253, nil)
}

func (v *validator) hostnames(names []gatewayv1.Hostname) {
	v.atMost("spec.hostnames", len(names), 16)
	for i, h := range names {
		v.text(fmt.Sprintf("spec.hostnames[%d]", i), string(h), 253, hostname)
	}
}

func (v *validator) ruleNames(n int, name func(int) *gatewayv1.SectionName) {
	seen := map[gatewayv1.SectionName]bool{}
	for i := range n {
		p := name(i)
		if p == nil {
			continue
		}
		path := fmt.Sprintf("spec.rules[%d].name", i)
		v.text(path, string(*p), 253, dnsName)
		if seen[*p] {
			v.fail(path, "%q is another rule's, too", *p)
		}
		seen[*p] = true
	}
}

func (v *validator) httpRule(path string, r gatewayv1.HTTPRouteRule) {
	v.atMost(path+".matches", len(r.Matches), 64)
	for i, m := range r.Matches {
		v.httpMatch(fmt.Sprintf("%s.matches[%d]", path, i), m)
	}
	v.httpFilters(path, r.Filters)
	v.atMost(path+".backendRefs", len(r.BackendRefs), 16)
	for i, b := range r.BackendRefs {
		ref := fmt.Sprintf("%s.backendRefs[%d]", path, i)
		v.backend(ref, b.BackendRef)
		v.httpFilters(ref, b.Filters)
	}
	v.prefixes(path, r)
	redirects := slices.ContainsFunc(r.Filters, func(f gatewayv1.HTTPRouteFilter) bool { return f.RequestRedirect != nil })
	if redirects && len(r.BackendRefs) > 0 {
		v.fail(path, "RequestRedirect excludes backendRefs")
	}
	v.timeouts(path+".timeouts", r.Timeouts)
	v.session(path+".sessionPersistence", r.SessionPersistence)
	if retry := r.Retry; retry != nil {
		once(v, path+".retry.codes", retry.Codes, func(c gatewayv1.HTTPRouteRetryStatusCode) gatewayv1.HTTPRouteRetryStatusCode { return c })
		for i, c := range retry.Codes {
			v.between(fmt.Sprintf("%s.retry.codes[%d]", path, i), int(c), 400, 599)
		}
		if value(retry.Attempts, 1) < 1 {
			v.fail(path+".retry.attempts", "%d is less than 1", *retry.Attempts)
		}
		v.duration(path+".retry.backoff", retry.Backoff)
	}
}

func (v *validator) session(path string, s *gatewayv1.SessionPersistence) {
	if s == nil {
		return
	}
	kind := string(value(s.Type, "Cookie"))
	oneOf(v, path+".type", kind, []string{"Cookie", "Header"})
	v.short(path+".sessionName", value(s.SessionName, ""), 128)
	v.duration(path+".absoluteTimeout", s.AbsoluteTimeout)
	if s.CookieConfig == nil {
		return
	}
	if kind != "Cookie" {
		v.fail(path, "cookieConfig is what type Cookie may have, and no other")
	}
	lifetime := string(value(s.CookieConfig.LifetimeType, "Session"))
	oneOf(v, path+".cookieConfig.lifetimeType", lifetime, []string{"Permanent", "Session"})
	if lifetime == "Permanent" && s.AbsoluteTimeout == nil {
		v.fail(path, "absoluteTimeout is what lifetimeType Permanent needs")
	}
}

func (v *validator) timeouts(path string, t *gatewayv1.HTTPRouteTimeouts) {
	if t == nil {
		return
	}
	v.duration(path+".request", t.Request)
	v.duration(path+".backendRequest", t.BackendRequest)
	if v.err != nil || t.Request == nil || t.BackendRequest == nil {
		return
	}
	request, _ := duration(t.Request)
	backend, _ := duration(t.BackendRequest)
	if request != 0 && backend > request {
		v.fail(path+".backendRequest", "%s is longer than request, %s", *t.BackendRequest, *t.Request)
	}
}

func (v *validator) duration(path string, d *gatewayv1.Duration) {
	if d != nil {
		v.text(path, string(*d), 253, durationText)
	}
}

func (v *validator) httpMatch(path string, m gatewayv1.HTTPRouteMatch) {
	if p := m.Path; p != nil {
		v.path(path+".path", value(p.Type, gatewayv1.PathMatchPathPrefix), value(p.Value, "/"))
	}
	if m.Method != nil {
		oneOf(v, path+".method", string(*m.Method), methods)
	}
	v.atMost(path+".headers", len(m.Headers), 16)
	once(v, path+".headers", m.Headers, func(h gatewayv1.HTTPHeaderMatch) gatewayv1.HTTPHeaderName { return h.Name })
	for i, h := range m.Headers {
		v.comparison(fmt.Sprintf("%s.headers[%d]", path, i), string(value(h.Type, "Exact")), string(h.Name), h.Value, 4096, headerValue)
	}
	v.atMost(path+".queryParams", len(m.QueryParams), 16)
	once(v, path+".queryParams", m.QueryParams, func(q gatewayv1.HTTPQueryParamMatch) gatewayv1.HTTPHeaderName { return q.Name })
	for i, q := range m.QueryParams {
		v.comparison(fmt.Sprintf("%s.queryParams[%d]", path, i), string(value(q.Type, "Exact")), string(q.Name), q.Value, 1024, nil)
	}
}

func (v *validator) comparison(path, kind, name, text string, limit int, pattern *regexp.Regexp) {
	oneOf(v, path+".type", kind, comparisons)
	v.text(path+".name", name, 256, headerName)
	v.text(path+".value", text, limit, pattern)
}

func (v *validator) path(path string, kind gatewayv1.PathMatchType, text string) {
	oneOf(v, path+".type", string(kind), []string{"Exact", "PathPrefix", "RegularExpression"})
	path += ".value"
	v.short(path, text, 1024)
	if kind == gatewayv1.PathMatchRegularExpression {
		return
	}
	if !strings.HasPrefix(text, "/") {
		v.fail(path, `%q does not begin with "/"`, text)
	}
	for _, part := range []string{"//", "/./", "/../", "%2f", "%2F", "#"} {
		if strings.Contains(text, part) {
			v.fail(path, "%q contains %q", text, part)
		}
	}
	for _, end := range []string{"/..", "/."} {
		if strings.HasSuffix(text, end) {
			v.fail(path, "%q ends with %q", text, end)
		}
	}
	v.text(path, text, 1024, pathText)
}

func (v *validator) grpcRule(path string, r gatewayv1.GRPCRouteRule) {
	v.atMost(path+".matches", len(r.Matches), 64)
	for i, m := range r.Matches {
		v.grpcMatch(fmt.Sprintf("%s.matches[%d]", path, i), m)
	}
	v.grpcFilters(path, r.Filters)
	v.atMost(path+".backendRefs", len(r.BackendRefs), 16)
	for i, b := range r.BackendRefs {
		ref := fmt.Sprintf("%s.backendRefs[%d]", path, i)
		v.backend(ref, b.BackendRef)
		v.grpcFilters(ref, b.Filters)
	}
	v.session(path+".sessionPersistence", r.SessionPersistence)
}

func (v *validator) grpcMatch(path string, m gatewayv1.GRPCRouteMatch) {
	if g := m.Method; g != nil {
		kind := string(value(g.Type, "Exact"))
		oneOf(v, path+".method.type", kind, comparisons)
		if g.Service == nil && g.Method == nil {
			v.fail(path+".method", "neither service nor method is there")
		}
		for _, part := range []struct {
			name    string
			text    *string
			pattern *regexp.Regexp
		}{{"service", g.Service, grpcService}, {"method", g.Method, grpcCall}} {
			if kind != "Exact" {
				part.pattern = nil
			}
			if part.text != nil && (kind == "Exact" || *part.text != "") {
				v.text(path+".method."+part.name, *part.text, 1024, part.pattern)
			}
		}
	}
	v.atMost(path+".headers", len(m.Headers), 16)
	once(v, path+".headers", m.Headers, func(h gatewayv1.GRPCHeaderMatch) gatewayv1.GRPCHeaderName { return h.Name })
	for i, h := range m.Headers {
		v.comparison(fmt.Sprintf("%s.headers[%d]", path, i), string(value(h.Type, "Exact")), string(h.Name), h.Value, 4096, nil)
	}
}

func (v *validator) backend(path string, b gatewayv1.BackendRef) {
	v.target(path, b.BackendObjectReference)
	v.between(path+".weight", int(value(b.Weight, 1)), 0, maxWeight)
}

func (v *validator) target(path string, t gatewayv1.BackendObjectReference) {
	v.reference(path, t.Group, t.Kind, t.Name, t.Namespace, t.Port)
	if value(t.Group, "") == corev1.GroupName && value(t.Kind, "Service") == "Service" && t.Port == nil {
		v.fail(path+".port", "is missing: a Service is named with its port")
	}
}
