package cluster

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// policyCRD is what an API server judges TrafficPolicies by.
const policyCRD = "../../manifests/base/crds/policy.weirmesh.io_trafficpolicies.yaml"

func policyDocument(spec string) string {
	return "apiVersion: policy.weirmesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {namespace: shop, name: p}\nspec: {" + spec + "}\n"
}

// TestPoliciesThatAnAPIServerWouldRefuse has one mistake in each policy, and beside it
// the nearest value that is none. The schema and the expressions of the CRD, as an API
// server applies them, say the same of both.
func TestPoliciesThatAnAPIServerWouldRefuse(t *testing.T) {
	balancer := func(b string) string { return "loadBalancer: {" + b + "}" }
	hash := func(h string) string { return balancer("type: ConsistentHash, consistentHash: {" + h + "}") }
	limit := func(l string) string { return "rateLimit: {" + l + "}" }
	detect := func(d string) string { return "outlierDetection: {" + d + "}" }
	long := strings.Repeat("x", 256)
	const duration = `^([0-9]{1,5}(h|m|s|ms)){1,4}$`
	const token = "^[A-Za-z0-9!#$%&'*+\\-.^_`|~]+$"
	tests := []struct{ good, bad, want string }{
		{"targetRef: {name: back}", "targetRef: {kind: Service}", "spec.targetRef.name: is missing"},
		{"targetRef: {name: back}", "retry: {}", "spec.targetRef.name: is missing"},
		{"targetRef: {name: back}", "targetRef: {name: ''}", "spec.targetRef.name: is missing"},
		{"targetRef: {name: " + long[:253] + "}", "targetRef: {name: " + long[:254] + "}", "spec.targetRef.name: is longer than 253 characters"},
		{"targetRef: {kind: Service, name: back}", "targetRef: {kind: Pod, name: back}", "spec.targetRef.kind: Pod is none of [Service]"},
		{"targetRef: {group: '', name: back}", "targetRef: {group: core, name: back}", "spec.targetRef.group: core is none of []"},
		{"targetRef: {name: back}", "targetRef: {name: back, namespace: lab}", `unknown field "spec.targetRef.namespace"`},
		{balancer("type: RoundRobin"), balancer("type: roundRobin"), "spec.loadBalancer.type: roundRobin is none of [LeastRequest RoundRobin Random ConsistentHash]"},
		{balancer("type: Random"), balancer("type: ''"), "spec.loadBalancer.type:  is none of [LeastRequest RoundRobin Random ConsistentHash]"},
		{hash("type: SourceIP"), balancer("type: ConsistentHash"), "spec.loadBalancer: consistentHash is what type ConsistentHash needs, and no other has"},
		{hash("type: SourceIP"), balancer("consistentHash: {type: SourceIP}"), "spec.loadBalancer: consistentHash is what type ConsistentHash needs, and no other has"},
		{hash("type: SourceIP"), balancer("type: Random, consistentHash: {type: SourceIP}"), "spec.loadBalancer: consistentHash is what type ConsistentHash needs, and no other has"},
		{hash("type: SourceIP"), hash(""), "spec.loadBalancer.consistentHash.type:  is none of [SourceIP Header Cookie]"},
		{hash("type: Header, header: {name: X-User}"), hash("type: Header"), "spec.loadBalancer.consistentHash: header is what type Header needs, and no other has"},
		{hash("type: Header, header: {name: X-User}"), hash("type: SourceIP, header: {name: X-User}"), "spec.loadBalancer.consistentHash: header is what type Header needs, and no other has"},
		{hash("type: Header, header: {name: " + long + "}"), hash("type: Header, header: {name: " + long + "x}"), "spec.loadBalancer.consistentHash.header.name: is longer than 256 characters"},
		{hash("type: Header, header: {name: a`b}"), hash("type: Header, header: {name: 'a:b'}"), `spec.loadBalancer.consistentHash.header.name: "a:b" does not match ` + token},
		{hash("type: Cookie, cookie: {name: SID}"), hash("type: Cookie, header: {name: SID}"), "spec.loadBalancer.consistentHash: header is what type Header needs, and no other has"},
		{hash("type: Cookie, cookie: {name: SID}"), hash("type: Header, header: {name: a}, cookie: {name: SID}"), "spec.loadBalancer.consistentHash: cookie is what type Cookie needs, and no other has"},
		{hash("type: Cookie, cookie: {name: " + long + "}"), hash("type: Cookie, cookie: {name: " + long + "x}"), "spec.loadBalancer.consistentHash.cookie.name: is longer than 256 characters"},
		{hash("type: Cookie, cookie: {name: SID}"), hash("type: Cookie, cookie: {name: 'S=D'}"), `spec.loadBalancer.consistentHash.cookie.name: "S=D" does not match ` + token},
		{hash("type: Cookie, cookie: {name: SID}"), hash("type: Cookie, cookie: {}"), "spec.loadBalancer.consistentHash.cookie.name: is missing"},
		{balancer("slowStart: {window: 1ms}"), balancer("slowStart: {window: 0s}"), "spec.loadBalancer.slowStart.window: 0s is not between 1ms and 1h0m0s"},
		{balancer("type: RoundRobin, slowStart: {window: 60m}"), balancer("type: RoundRobin, slowStart: {window: 60m1ms}"), "spec.loadBalancer.slowStart.window: 60m1ms is not between 1ms and 1h0m0s"},
		{balancer("slowStart: {window: 1s}"), balancer("slowStart: {}"), "spec.loadBalancer.slowStart.window: is missing"},
		{balancer("type: Random, slowStart: {window: 1s}"), balancer("type: ConsistentHash, consistentHash: {type: SourceIP}, slowStart: {window: 1s}"), "spec.loadBalancer: slowStart and type ConsistentHash exclude each other"},
		{detect("consecutiveErrors: 0"), detect("consecutiveErrors: -1"), "spec.outlierDetection.consecutiveErrors: -1 is not between 0 and 1000"},
		{detect("consecutiveErrors: 1000"), detect("consecutiveErrors: 1001"), "spec.outlierDetection.consecutiveErrors: 1001 is not between 0 and 1000"},
		{detect("baseEjectionTime: 1000ms"), detect("baseEjectionTime: 999ms"), "spec.outlierDetection.baseEjectionTime: 999ms is not between 1s and 1h0m0s"},
		{detect("baseEjectionTime: 1h"), detect("baseEjectionTime: 3601s"), "spec.outlierDetection.baseEjectionTime: 3601s is not between 1s and 1h0m0s"},
		{detect("maxEjectionPercent: 1"), detect("maxEjectionPercent: 0"), "spec.outlierDetection.maxEjectionPercent: 0 is not between 1 and 100"},
		{detect("maxEjectionPercent: 100"), detect("maxEjectionPercent: 101"), "spec.outlierDetection.maxEjectionPercent: 101 is not between 1 and 100"},
		{"circuitBreaker: {maxParallelRequests: 1}", "circuitBreaker: {maxParallelRequests: 0}", "spec.circuitBreaker.maxParallelRequests: 0 is not between 1 and 1000000"},
		{"circuitBreaker: {maxParallelRetries: 1000000}", "circuitBreaker: {maxParallelRetries: 1000001}", "spec.circuitBreaker.maxParallelRetries: 1000001 is not between 1 and 1000000"},
		{"circuitBreaker: {}", "circuitBreaker: {connections: 1}", `unknown field "spec.circuitBreaker.connections"`},
		{"circuitBreaker: {maxConnections: 1}", "circuitBreaker: {maxConnections: 0}", "spec.circuitBreaker.maxConnections: 0 is not between 1 and 1000000"},
		{"circuitBreaker: {maxConnections: 1000000}", "circuitBreaker: {maxConnections: 1000001}", "spec.circuitBreaker.maxConnections: 1000001 is not between 1 and 1000000"},
		{"circuitBreaker: {maxConnections: 1, maxPendingRequests: 0}", "circuitBreaker: {maxConnections: 1, maxPendingRequests: -1}", "spec.circuitBreaker.maxPendingRequests: -1 is not between 0 and 1000000"},
		{"circuitBreaker: {maxConnections: 1, maxPendingRequests: 1000000}", "circuitBreaker: {maxConnections: 1, maxPendingRequests: 1000001}", "spec.circuitBreaker.maxPendingRequests: 1000001 is not between 0 and 1000000"},
		{"circuitBreaker: {maxConnections: 1, maxPendingRequests: 1}", "circuitBreaker: {maxPendingRequests: 1}", "spec.circuitBreaker: maxPendingRequests is about what waits where maxConnections says how many connections there are"},
		{"retry: {attempts: 1}", "retry: {attempts: 0}", "spec.retry.attempts: 0 is not between 1 and 10"},
		{"retry: {attempts: 10}", "retry: {attempts: 11}", "spec.retry.attempts: 11 is not between 1 and 10"},
		{"retry: {codes: [500, 599]}", "retry: {codes: [500, 499]}", "spec.retry.codes[1]: 499 is not between 500 and 599"},
		{"retry: {codes: null}", "retry: {codes: []}", "spec.retry.codes: number of codes: 0 is not between 1 and 16"},
		{"retry: {codes: [" + strings.Repeat("500,", 15) + "500]}", "retry: {codes: [" + strings.Repeat("500,", 16) + "500]}", "spec.retry.codes: number of codes: 17 is not between 1 and 16"},
		{"retry: {backoff: 0s}", "retry: {backoff: '0'}", `spec.retry.backoff: "0" does not match ` + duration},
		{"retry: {backoff: 10s}", "retry: {backoff: 10s1ms}", "spec.retry.backoff: 10s1ms is not between 0s and 10s"},
		{"retryConstraint: {budget: {percent: 100}}", "retryConstraint: {budget: {percent: 101}}", "spec.retryConstraint.budget.percent: 101 is not between 1 and 100"},
		{"retryConstraint: {budget: {percent: 1}}", "retryConstraint: {budget: {percent: 0}}", "spec.retryConstraint.budget.percent: 0 is not between 1 and 100"},
		{"retryConstraint: {budget: {}}", "retryConstraint: {percent: 1}", `unknown field "spec.retryConstraint.percent"`},
		{"timeouts: {request: 0s}", "timeouts: {request: -1s}", `spec.timeouts.request: "-1s" does not match ` + duration},
		{"timeouts: {request: 24h}", "timeouts: {request: 24h1s}", "spec.timeouts.request: 24h1s is not between 0s and 24h0m0s"},
		{"timeouts: {request: 1h30m}", "timeouts: {request: 1.5h}", `spec.timeouts.request: "1.5h" does not match ` + duration},
		{"timeouts: {request: 1m}", "timeouts: {request: ''}", "spec.timeouts.request: is missing"},
		{limit("count: 1, interval: 1s"), limit("interval: 1s"), "spec.rateLimit.count: 0 is not between 1 and 1000000"},
		{limit("count: 1000000, interval: 1s"), limit("count: 1000001, interval: 1s"), "spec.rateLimit.count: 1000001 is not between 1 and 1000000"},
		{limit("count: 1, interval: 1ms"), limit("count: 1"), "spec.rateLimit.interval: is missing"},
		{limit("count: 1, interval: 1h"), limit("count: 1, interval: 61m"), "spec.rateLimit.interval: 61m is not between 1ms and 1h0m0s"},
		{limit("count: 1, interval: 1ms"), limit("count: 1, interval: 0ms"), "spec.rateLimit.interval: 0ms is not between 1ms and 1h0m0s"},
		{limit("count: 1, interval: 1s, burst: 1"), limit("count: 1, interval: 1s, burst: 0"), "spec.rateLimit.burst: 0 is not between 1 and 1000000"},
		{limit("count: 1, interval: 1s, perClient: true"), limit("count: 1, interval: 1s, perAddress: true"), `unknown field "spec.rateLimit.perAddress"`},
		{limit("count: 1, interval: 1s, perClient: true, clientBy: Identity"), limit("count: 1, interval: 1s, perClient: true, clientBy: Name"), "spec.rateLimit.clientBy: Name is none of [Address Identity]"},
		{limit("count: 1, interval: 1s, perClient: true, clientBy: Address"), limit("count: 1, interval: 1s, clientBy: Identity"), "spec.rateLimit: clientBy is about what perClient counts"},
		{limit("count: 1, interval: 1s, perClient: false"), limit("count: 1, interval: 1s, perClient: false, clientBy: Address"), "spec.rateLimit: clientBy is about what perClient counts"},
		{limit("count: 1, interval: 1s, burst: 1000000"), limit("count: 1, interval: 1s, burst: 1000001"), "spec.rateLimit.burst: 1000001 is not between 1 and 1000000"},
	}
	targeted := func(spec string) string {
		if !strings.Contains(spec, "targetRef") && spec != "retry: {}" {
			spec = "targetRef: {name: back}, " + spec
		}
		return policyDocument(spec)
	}
	var documents []string
	for _, tt := range tests {
		documents = append(documents, targeted(tt.good), targeted(tt.bad))
	}
	server := verdicts(t, []string{policyCRD}, documents...)
	for i, tt := range tests {
		t.Run(fmt.Sprint(i)+" "+tt.want, func(t *testing.T) {
			if _, err := readDir(withFile(t, documents[2*i])); err != nil || server[2*i] != "" {
				t.Errorf("%s is refused: by the directory %v, by the API server %q", tt.good, err, server[2*i])
			}
			_, err := readDir(withFile(t, documents[2*i+1]))
			if err == nil || server[2*i+1] == "" {
				t.Fatalf("%s is taken: by the directory %v, by the API server %q", tt.bad, err, server[2*i+1])
			}
			_, got, _ := strings.Cut(err.Error(), "TrafficPolicy")
			if diff := cmp.Diff(": "+tt.want, strings.TrimPrefix(got, " shop/p")); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}
