// Package authz decides who may call a pod: it holds a request, or a connection that
// carries no HTTP, against the AuthorizationPolicies that govern the pod. Pure: it knows
// neither connections nor certificates, and reads no byte from anywhere.
//
// Policies are compiled once (Compile) and evaluated for every request (Set.Evaluate).
// The words are those of GEP-3779, where it has them; DENY, HTTP and audit are Weir's.
//
// DENY goes before ALLOW. A pod that an ALLOW policy governs refuses what none allows;
// one that none governs allows what none denies. A policy with audit refuses nothing,
// allows nothing, and says what it would have refused.
//
// A rule that has sources is met by nobody without an identity, and that is so for DENY
// as well: by the text, a peer in plaintext matches no source. To deny somebody is no
// protection from callers in plaintext; to allow somebody is, and so is
// PeerAuthentication. Elsewhere what is not known counts against the caller: where there
// is no HTTP, an ALLOW rule that asks something of it is not met, and a DENY rule is; of a
// header field that a request repeats, ALLOW wants every value to be the rule's, and DENY
// one.
package authz

import (
	"strings"
)

// Identity is a workload's SPIFFE ID, by its parts:
// spiffe://<trust domain>/ns/<namespace>/sa/<service account>. The zero value is of
// nobody who is known: a peer in plaintext.
type Identity struct {
	TrustDomain, Namespace, ServiceAccount string
}

// Known reports whether it is somebody's.
func (i Identity) Known() bool { return i != Identity{} }

// String is the SPIFFE ID, or "" of nobody.
func (i Identity) String() string {
	if !i.Known() {
		return ""
	}
	return "spiffe://" + i.TrustDomain + "/ns/" + i.Namespace + "/sa/" + i.ServiceAccount
}

// ParseIdentity is the inverse of String. What is no workload's ID is nobody's.
func ParseIdentity(id string) Identity {
	rest, ok := strings.CutPrefix(id, "spiffe://")
	domain, rest, _ := strings.Cut(rest, "/")
	rest, inNamespace := strings.CutPrefix(rest, "ns/")
	namespace, account, isAccount := strings.Cut(rest, "/sa/")
	if !ok || !inNamespace || !isAccount || domain == "" || !isSegment(namespace) || !isSegment(account) {
		return Identity{}
	}
	return Identity{TrustDomain: domain, Namespace: namespace, ServiceAccount: account}
}

func isSegment(s string) bool { return s != "" && !strings.Contains(s, "/") }

// NoPolicy is in place of a policy's name where none allowed a request.
const NoPolicy = "no policy allowed it"

// Action is what a policy does with what its rules are met by.
type Action uint8

// The actions.
const (
	Allow Action = iota + 1
	Deny
)

// Policy is one that governs the pod.
type Policy struct {
	Name   string // "namespace/name"
	Action Action
	Audit  bool   // it says what it would refuse, and refuses nothing
	Rules  []Rule // one must be met; none: nothing meets the policy
}

// Rule is a set of conditions, all of which must be met.
type Rule struct {
	Sources []Source // one must be met; nil: anyone is; empty: no one is
	Ports   []uint16 // of the application; none: any
	HTTP    *HTTP    // nil: anything, HTTP or not
}

// Source is whom a rule is about.
type Source struct {
	TrustDomain    string // empty: the pod's own
	Namespace      string
	ServiceAccount string // "*": all of the namespace
}

// AllAccounts is a Source's ServiceAccount: all of its namespace.
const AllAccounts = "*"

// HTTP are conditions on a request of HTTP, all of which must be met.
type HTTP struct {
	Methods []string // one must be met; none: any
	Paths   []Path   // one must be met; none: any
	Headers []Header // all must be met
}

// Path is a condition on the path in its canonical form (route.CanonicalPath), which
// Value is in, too.
type Path struct {
	Prefix bool // by whole path elements; Value has no trailing slash, that of "/" is ""
	Value  string
}

// Header is a condition on a header field, exactly.
type Header struct{ Name, Value string } // Name in lower case

// Request is what conditions of HTTP look at: the same values that routes are matched
// by (route.Request), and all fields.
type Request interface {
	Method() []byte
	Path() []byte // in its canonical form, without the query; empty: CONNECT has none

	Len() int                   // how many header fields there are
	Is(i int, name string) bool // whether that lower-case name is that of field i
	Value(i int) []byte
}

// Decision is what has come of a request.
type Decision struct {
	Allowed bool
	// Policy is the name of the policy that decided, or NoPolicy; "" if it is allowed for
	// want of an ALLOW policy.
	Policy string
	// Audited are the names of the policies with audit that would have refused it: DENY
	// ones that came before the decision, and NoPolicy.
	Audited []string
}
