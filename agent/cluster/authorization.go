package cluster

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/route"
)

// AuthorizationPolicy cuts an object down to the model. The error names the field; it is
// about what the CRD lets no object have. With it comes what is in force in place of the
// policy: something that refuses all that the policy might.
func AuthorizationPolicy(p *v1alpha1.AuthorizationPolicy) (model.AuthorizationPolicy, error) {
	out := model.AuthorizationPolicy{Namespace: shared(p.Namespace), Name: p.Name, Generation: p.Generation}
	out.Policy = authz.Policy{Name: out.ID(), Action: authz.Allow, Audit: value(p.Spec.Audit, false)}
	if p.Spec.Action == v1alpha1.Deny {
		out.Policy.Action = authz.Deny
	}
	v := &validator{}
	if v.podSelector(p.Spec.PodSelector); v.err == nil {
		out.Selector = toSelector(p.Spec.PodSelector)
	}
	v.authorization(&p.Spec)
	if v.err != nil {
		if out.Policy.Action == authz.Deny {
			out.Policy.Rules = []authz.Rule{{}}
		}
		return out, v.err
	}
	for _, r := range p.Spec.Rules {
		out.Policy.Rules = append(out.Policy.Rules, toRule(p.Namespace, r))
	}
	return out, nil
}

// closedPolicy is AuthorizationPolicy for a source that has no use for the error: what
// cannot be read refuses, and the controller says so in its status.
func closedPolicy(p *v1alpha1.AuthorizationPolicy) (model.AuthorizationPolicy, error) {
	out, _ := AuthorizationPolicy(p)
	return out, nil
}

func toSelector(s *v1alpha1.PodSelector) model.Selector {
	if s == nil {
		return nil
	}
	var out model.Selector
	for _, key := range slices.Sorted(maps.Keys(s.MatchLabels)) {
		out = append(out, model.Requirement{Key: key, Operator: model.In, Values: []string{string(s.MatchLabels[key])}})
	}
	for _, e := range s.MatchExpressions {
		one := model.Requirement{Key: e.Key, Operator: model.Operator(e.Operator)}
		for _, value := range e.Values {
			one.Values = append(one.Values, string(value))
		}
		out = append(out, one)
	}
	return out
}

func toRule(namespace string, r v1alpha1.AuthorizationRule) authz.Rule {
	var out authz.Rule
	if r.Sources != nil {
		out.Sources = []authz.Source{} // of which none is no one
	}
	for _, s := range r.Sources {
		out.Sources = append(out.Sources, toSource(namespace, s))
	}
	if n := r.NetworkAttributes; n != nil {
		for _, port := range n.Ports {
			out.Ports = append(out.Ports, uint16(port))
		}
	}
	if h := r.HTTP; h != nil {
		out.HTTP = &authz.HTTP{Methods: h.Methods}
		for _, p := range h.Paths {
			out.HTTP.Paths = append(out.HTTP.Paths, toPath(p))
		}
		for _, one := range h.Headers {
			out.HTTP.Headers = append(out.HTTP.Headers, authz.Header{Name: strings.ToLower(one.Name), Value: one.Value})
		}
	}
	return out
}

func toSource(namespace string, s v1alpha1.AuthorizationSource) authz.Source {
	if a := s.ServiceAccount; a != nil {
		return authz.Source{Namespace: string(value(a.Namespace, gatewayv1.Namespace(namespace))), ServiceAccount: a.Name}
	}
	parts := spiffeID.FindStringSubmatch(*s.SPIFFE)
	return authz.Source{TrustDomain: parts[1], Namespace: parts[2], ServiceAccount: parts[3]}
}

func toPath(p v1alpha1.PathMatch) authz.Path {
	canonical, _ := route.CanonicalPath([]byte(p.Value)) // its pattern lets only those pass that have one
	if p.Type == v1alpha1.PathPrefix {
		return authz.Path{Prefix: true, Value: strings.TrimRight(string(canonical), "/")}
	}
	return authz.Path{Value: string(canonical)}
}

// Patterns of the CRD.
const accountName = `(\*|[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*)`

var (
	account    = regexp.MustCompile(`^` + accountName + `$`)
	spiffeText = regexp.MustCompile(`^spiffe://[a-z0-9._-]{1,255}/ns/[a-z0-9]([-a-z0-9]*[a-z0-9])?/sa/` + accountName + `$`)
	spiffeID   = regexp.MustCompile(`^spiffe://([^/]+)/ns/([^/]+)/sa/([^/]+)$`)
	labelValue = regexp.MustCompile(`^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$`)
	methodName = regexp.MustCompile(`^[A-Z][A-Z0-9-]*$`)
	policyPath = regexp.MustCompile(`^/(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|%[1-9a-fA-F][0-9a-fA-F]|%0[1-9a-fA-F])*$`)
)

// authorization checks what the CRD does, in manifests/base/crds, but for the selector.
func (v *validator) authorization(spec *v1alpha1.AuthorizationPolicySpec) {
	oneOf(v, "spec.action", spec.Action, []v1alpha1.AuthorizationAction{v1alpha1.Allow, v1alpha1.Deny})
	v.atMost("spec.rules", len(spec.Rules), 32)
	for i, r := range spec.Rules {
		path := fmt.Sprintf("spec.rules[%d]", i)
		v.atMost(path+".sources", len(r.Sources), 64)
		for j, s := range r.Sources {
			v.source(fmt.Sprintf("%s.sources[%d]", path, j), s)
		}
		if n := r.NetworkAttributes; n != nil {
			v.some(path+".networkAttributes.ports: number of ports", n.Ports == nil, len(n.Ports), 32)
			for j, port := range n.Ports {
				v.between(fmt.Sprintf("%s.networkAttributes.ports[%d]", path, j), int(port), 1, 65535)
			}
		}
		if r.HTTP != nil {
			v.http(path+".http", *r.HTTP)
		}
	}
}

// some checks the length of a list that may be left out, but not be empty.
func (v *validator) some(path string, absent bool, n, limit int) {
	if !absent {
		v.between(path, n, 1, limit)
	}
}

func (v *validator) podSelector(s *v1alpha1.PodSelector) {
	if s == nil {
		return
	}
	const path = "spec.podSelector"
	v.atMost(path+".matchLabels", len(s.MatchLabels), 32)
	for _, key := range slices.Sorted(maps.Keys(s.MatchLabels)) {
		v.label(path+".matchLabels."+key, s.MatchLabels[key])
	}
	v.atMost(path+".matchExpressions", len(s.MatchExpressions), 32)
	for i, e := range s.MatchExpressions {
		path := fmt.Sprintf("%s.matchExpressions[%d]", path, i)
		v.text(path+".key", e.Key, 317, nil)
		oneOf(v, path+".operator", e.Operator, []v1alpha1.PodSelectorOperator{v1alpha1.In, v1alpha1.NotIn, v1alpha1.Exists, v1alpha1.DoesNotExist})
		v.atMost(path+".values", len(e.Values), 32)
		for j, value := range e.Values {
			v.label(fmt.Sprintf("%s.values[%d]", path, j), value)
		}
		if (e.Operator == v1alpha1.In || e.Operator == v1alpha1.NotIn) != (len(e.Values) > 0) {
			v.fail(path, "values are what In and NotIn need, and no other has")
		}
	}
}

func (v *validator) label(path string, value v1alpha1.LabelValue) {
	v.short(path, string(value), 63)
	if !labelValue.MatchString(string(value)) {
		v.fail(path, "%q does not match %s", value, labelValue)
	}
}

func (v *validator) source(path string, s v1alpha1.AuthorizationSource) {
	oneOf(v, path+".type", s.Type, []v1alpha1.AuthorizationSourceType{v1alpha1.ServiceAccountType, v1alpha1.SPIFFEType})
	if (s.ServiceAccount != nil) != (s.Type == v1alpha1.ServiceAccountType) {
		v.fail(path, "serviceAccount is what type ServiceAccount needs, and no other has")
	}
	if (s.SPIFFE != nil) != (s.Type == v1alpha1.SPIFFEType) {
		v.fail(path, "spiffe is what type SPIFFE needs, and no other has")
	}
	if a := s.ServiceAccount; a != nil {
		if a.Namespace != nil {
			v.text(path+".serviceAccount.namespace", string(*a.Namespace), 63, dnsLabel)
		}
		v.text(path+".serviceAccount.name", a.Name, 253, account)
	}
	if s.SPIFFE != nil {
		v.text(path+".spiffe", *s.SPIFFE, 640, spiffeText)
	}
}

func (v *validator) http(path string, h v1alpha1.HTTPAttributes) {
	v.some(path+".methods: number of methods", h.Methods == nil, len(h.Methods), 16)
	for i, m := range h.Methods {
		v.text(fmt.Sprintf("%s.methods[%d]", path, i), m, 32, methodName)
	}
	v.some(path+".paths: number of paths", h.Paths == nil, len(h.Paths), 32)
	for i, p := range h.Paths {
		path := fmt.Sprintf("%s.paths[%d]", path, i)
		oneOf(v, path+".type", p.Type, []v1alpha1.PathMatchType{v1alpha1.ExactPath, v1alpha1.PathPrefix})
		v.text(path+".value", p.Value, 1024, policyPath)
	}
	v.some(path+".headers: number of headers", h.Headers == nil, len(h.Headers), 16)
	for i, one := range h.Headers {
		path := fmt.Sprintf("%s.headers[%d]", path, i)
		v.text(path+".name", one.Name, 256, headerName)
		v.text(path+".value", one.Value, 4096, nil)
		if strings.EqualFold(one.Name, "host") {
			v.fail(path, "host is no header field of HTTP/2")
		}
	}
}
