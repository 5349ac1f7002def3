package proxypb

import (
	"math"

	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/proxy/authz"
)

// FromAuthorization renders the policies that govern a pod for the wire; nil if there is
// none. The trust domain is the pod's own.
func FromAuthorization(trustDomain string, policies []authz.Policy) *Authorization {
	if len(policies) == 0 {
		return nil
	}
	return &Authorization{TrustDomain: trustDomain, Policies: each(policies, fromAuthzPolicy)}
}

func fromAuthzPolicy(p authz.Policy) *AuthorizationPolicy {
	return &AuthorizationPolicy{
		Name: p.Name, Action: AuthorizationPolicy_Action(p.Action), Audit: p.Audit, Rules: each(p.Rules, fromAuthzRule),
	}
}

func fromAuthzRule(r authz.Rule) *AuthorizationRule {
	out := &AuthorizationRule{Ports: each(r.Ports, func(p uint16) uint32 { return uint32(p) })}
	if r.Sources != nil {
		out.Sources = &Sources{Sources: each(r.Sources, func(s authz.Source) *Source {
			return &Source{TrustDomain: s.TrustDomain, Namespace: s.Namespace, ServiceAccount: s.ServiceAccount}
		})}
	}
	if h := r.HTTP; h != nil {
		out.Http = &RequestConditions{
			Methods: h.Methods,
			Paths:   each(h.Paths, func(p authz.Path) *PathCondition { return &PathCondition{Prefix: p.Prefix, Value: p.Value} }),
			Headers: each(h.Headers, func(h authz.Header) *Header { return &Header{Name: h.Name, Value: h.Value} }),
		}
	}
	return out
}

// ToSet reads the policies from the wire, and compiles them. An error names what cannot
// be; that is also whatever this program does not know, since a condition that is not
// looked at would let more callers in.
func (x *Authorization) ToSet() (*authz.Set, error) {
	policies, err := x.toPolicies()
	if err != nil {
		return nil, err
	}
	return authz.Compile(x.GetTrustDomain(), policies)
}

func (x *Authorization) toPolicies() ([]authz.Policy, error) {
	r := reader{}
	r.known("authorization", x)
	policies := each(x.GetPolicies(), r.authzPolicy)
	return policies, r.err
}

// known refuses fields of a newer agent.
func (r *reader) known(what string, m proto.Message) {
	if len(m.ProtoReflect().GetUnknown()) > 0 {
		r.fail("%s: it has fields that this proxy does not know", what)
	}
}

func (r *reader) authzPolicy(x *AuthorizationPolicy) authz.Policy {
	what := "policy " + x.GetName()
	r.known(what, x)
	if x.GetAction() != AuthorizationPolicy_ALLOW && x.GetAction() != AuthorizationPolicy_DENY {
		r.fail("%s: action %d", what, x.GetAction())
	}
	return authz.Policy{
		Name: x.GetName(), Action: authz.Action(x.GetAction()), Audit: x.GetAudit(),
		Rules: each(x.GetRules(), func(one *AuthorizationRule) authz.Rule { return r.authzRule(what, one) }),
	}
}

func (r *reader) authzRule(what string, x *AuthorizationRule) authz.Rule {
	r.known(what, x)
	out := authz.Rule{Ports: each(x.GetPorts(), func(p uint32) uint16 { return uint16(r.upTo(p, math.MaxUint16)) })}
	if s := x.GetSources(); s != nil {
		r.known(what, s)
		out.Sources = append([]authz.Source{}, each(s.GetSources(), func(s *Source) authz.Source {
			r.known(what, s)
			return authz.Source{TrustDomain: s.GetTrustDomain(), Namespace: s.GetNamespace(), ServiceAccount: s.GetServiceAccount()}
		})...)
	}
	if h := x.GetHttp(); h != nil {
		r.known(what, h)
		out.HTTP = &authz.HTTP{
			Methods: h.GetMethods(),
			Paths: each(h.GetPaths(), func(p *PathCondition) authz.Path {
				r.known(what, p)
				return authz.Path{Prefix: p.GetPrefix(), Value: p.GetValue()}
			}),
			Headers: each(h.GetHeaders(), func(h *Header) authz.Header {
				r.known(what, h)
				return authz.Header{Name: h.GetName(), Value: h.GetValue()}
			}),
		}
	}
	return out
}
