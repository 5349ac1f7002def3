package cluster

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

// verdicts are what an API server would say of documents, by CRDs: for each what is
// wrong with it, or nothing.
func verdicts(t *testing.T, crds []string, documents ...string) []string {
	t.Helper()
	args := []string{"run", "."}
	for _, crd := range crds {
		if !filepath.IsAbs(crd) {
			crd = filepath.Join("../../agent/cluster", crd)
		}
		args = append(args, crd)
	}
	var stderr strings.Builder
	cmd := exec.Command("go", args...)
	cmd.Dir, cmd.Stdin, cmd.Stderr = "../../tests/crds", strings.NewReader(strings.Join(documents, "\n---\n")), &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	lines := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	if len(lines) != len(documents) {
		t.Fatalf("%d verdicts on %d documents:\n%s", len(lines), len(documents), out)
	}
	return lines
}

// gatewayCRDs are the files of the CRDs of routes, of a channel.
func gatewayCRDs(t *testing.T, channel string) []string {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api").Output()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, kind := range []string{"httproutes", "grpcroutes", "tcproutes"} {
		file := "gateway.networking.k8s.io_" + kind + ".yaml"
		out = append(out, filepath.Join(strings.TrimSpace(string(dir)), "config/crd", channel, file))
	}
	return out
}

// directoryVerdicts are what a directory says of documents, each on its own.
func directoryVerdicts(t *testing.T, documents []string) []error {
	t.Helper()
	m, err := newManifests()
	if err != nil {
		t.Fatal(err)
	}
	out := make([]error, len(documents))
	for i, document := range documents {
		clear(m.where)
		out[i] = m.file("a.yaml", []byte(document))
	}
	return out
}

// judgedAlike holds the verdicts of a directory on documents and on mutants of them
// against those of an API server. No limit of the schemas named is left unbroken.
func judgedAlike(t *testing.T, crds, documents []string, named ...string) {
	t.Helper()
	schemas := crdSchemas(t, crds)
	all := append(mutants(t, schemas, documents), documents...)
	server, directory := verdicts(t, crds, all...), directoryVerdicts(t, all)
	for i, document := range all {
		if (server[i] == "") != (directory[i] == nil) {
			t.Errorf("%.2000s\nAPI server: %.300q\ndirectory: %v", document, server[i], directory[i])
		}
		if i >= len(all)-len(documents) && server[i] != "" {
			t.Errorf("%s\nis refused: %s", document, server[i])
		}
	}
	broken := brokenLimits(t, all, server)
	for _, id := range named {
		for _, limit := range schemas[id].limits() {
			if !broken[id].has(limit) {
				t.Errorf("%s: nothing breaks %q", id, limit)
			}
		}
	}
	t.Logf("%d documents", len(all))
}

// breaches are what an API server says of a field.
type breaches map[string][]breach

// breach is one of the things that it says of a document, or all.
type breach struct {
	said string
	all  bool
}

// companions are limits that are not broken without another: an expression does not
// like it either, or does not find the field that it is about, or there are two of one key.
var companions = regexp.MustCompile(`Required value|\.(type|protocol|operator): Unsupported value|allowMethods: Too many|^spec\.ports: Too many|must not contain '#'|type must be one of`)

// has is about a path and what is said of it: "spec.rules: Too many". What is said
// with something else may have been refused for that.
func (b breaches) has(limit string) bool {
	path, words, _ := strings.Cut(limit, ": ")
	return slices.ContainsFunc(b[path], func(one breach) bool {
		return strings.Contains(one.said, words) && (one.all || companions.MatchString(limit))
	})
}

var indices = regexp.MustCompile(`\[\d+\]`)

// brokenLimits sorts verdicts by apiVersion and kind, and by field.
func brokenLimits(t *testing.T, documents, verdicts []string) map[string]breaches {
	t.Helper()
	out := map[string]breaches{}
	for i, verdict := range verdicts {
		if verdict == "" {
			continue
		}
		var object struct{ APIVersion, Kind string }
		if json.Unmarshal([]byte(documents[i]), &object) != nil { // a mutant is JSON, which is read sooner
			if err := yaml.Unmarshal([]byte(documents[i]), &object); err != nil {
				t.Fatal(err)
			}
		}
		id := object.APIVersion + " " + object.Kind
		if out[id] == nil {
			out[id] = breaches{}
		}
		said := strings.Split(verdict, "; ")
		for _, one := range said {
			path, words, _ := strings.Cut(one, ": ")
			path = indices.ReplaceAllString(path, "[]")
			out[id][path] = append(out[id][path], breach{words, len(said) == 1})
		}
	}
	return out
}

// TestRoutesAreJudgedAsAnAPIServerDoes: routes that have every field, and each of their
// fields in all states that the CRDs say something of.
func TestRoutesAreJudgedAsAnAPIServerDoes(t *testing.T) {
	var documents []string
	add := func(kind, spec string) { documents = append(documents, routeExample{kind: kind}.document(spec)) }
	for _, body := range bodies {
		for _, kind := range body.kinds {
			spec := ruleFilter + "type: " + body.filter + ", " + body.text + "}]}]"
			add(kind, spec)
			add(kind, inBackend(spec))
		}
	}
	for _, filter := range []string{
		"type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /a}}",
		"type: RequestRedirect, requestRedirect: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /a}}",
		"type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {" + fullBackend + "}, grpc: {allowedHeaders: [a]}}",
	} {
		add("HTTPRoute", ruleFilter+filter+"}]}]")
		add("HTTPRoute", backendFilter+filter+"}]}]}]")
	}
	for _, kind := range []string{"HTTPRoute", "GRPCRoute"} {
		filter := "type: RequestMirror, requestMirror: {backendRef: {" + fullBackend + "}, fraction: {numerator: 0, denominator: 10}}"
		add(kind, ruleFilter+filter+"}]}]")
		add(kind, backendFilter+filter+"}]}]}]")
	}
	const parent = "{group: '', kind: Service, name: back, namespace: lab, "
	const common = "parentRefs: [" + parent + "port: 80, sectionName: a}, " + parent + "port: 81, sectionName: b}], useDefaultGateways: All, "
	const backends = "backendRefs: [{" + fullBackend + ", weight: 5}]"
	const session = "sessionPersistence: {sessionName: a, type: Cookie, absoluteTimeout: 1s, cookieConfig: {lifetimeType: Permanent}}, "
	// First with little, where one mistake brings no other.
	for _, kind := range []string{"HTTPRoute", "GRPCRoute", "TCPRoute", "v1alpha2 TCPRoute"} {
		add(kind, "parentRefs: ["+parent+"sectionName: a}], rules: [{"+backends+"}]")
	}
	for _, kind := range []string{"HTTPRoute", "GRPCRoute"} {
		add(kind, "rules: [{sessionPersistence: {type: Header}}]")
	}
	add("HTTPRoute", common+"hostnames: ['*.example.com'], rules: [{name: a}, {name: b, "+session+
		"timeouts: {request: 9s, backendRequest: 1s}, retry: {attempts: 1, codes: [500], backoff: 1s}, "+
		"matches: [{method: GET, path: {type: Exact, value: /a}, headers: [{name: a, type: Exact, value: b}], "+
		"queryParams: [{name: a, type: Exact, value: b}]}], "+backends+"}]")
	add("HTTPRoute", "rules: [{matches: [{path: {type: RegularExpression, value: /a}}]}]")
	for _, method := range []string{"Exact", "RegularExpression"} {
		add("GRPCRoute", common+"hostnames: ['*.example.com'], rules: [{name: a}, {name: b, "+session+
			"matches: [{method: {type: "+method+", service: a, method: b}, headers: [{name: a, type: Exact, value: b}]}], "+backends+"}]")
	}
	add("TCPRoute", common+"rules: [{name: a, "+backends+"}]")
	add("v1alpha2 TCPRoute", common+"rules: [{name: a, "+backends+"}, {name: b, "+backends+"}]")

	const group = "gateway.networking.k8s.io/"
	judgedAlike(t, gatewayCRDs(t, "experimental"), documents, group+"v1 HTTPRoute", group+"v1 GRPCRoute", group+"v1 TCPRoute", group+"v1alpha2 TCPRoute")
}

// TestPoliciesAreJudgedAsAnAPIServerDoes: the same of TrafficPolicies.
func TestPoliciesAreJudgedAsAnAPIServerDoes(t *testing.T) {
	const rest = "outlierDetection: {consecutiveErrors: 5, baseEjectionTime: 1m, maxEjectionPercent: 10}, " +
		"circuitBreaker: {maxConnections: 1, maxPendingRequests: 1, maxParallelRequests: 1, maxParallelRetries: 1}, " +
		"retry: {attempts: 1, codes: [500], backoff: 1s}, retryConstraint: {budget: {percent: 20}}, timeouts: {request: 1s}, " +
		"rateLimit: {count: 1, interval: 1s, burst: 1, perClient: true, clientBy: Identity}"
	var documents []string
	for _, balancer := range []string{
		"type: LeastRequest, slowStart: {window: 1s}", "type: ConsistentHash, consistentHash: {type: SourceIP}",
		"type: ConsistentHash, consistentHash: {type: Header, header: {name: a}}",
		"type: ConsistentHash, consistentHash: {type: Cookie, cookie: {name: a}}",
	} {
		documents = append(documents, policyDocument("targetRef: {group: '', kind: Service, name: back}, loadBalancer: {"+balancer+"}, "+rest))
	}
	judgedAlike(t, []string{policyCRD}, documents, "policy.weirmesh.io/v1alpha1 TrafficPolicy")
}

// TestAnHTTPRouteIsTheSameInBothVersions: what is tested of v1 holds for v1beta1.
func TestAnHTTPRouteIsTheSameInBothVersions(t *testing.T) {
	schemas := crdSchemas(t, gatewayCRDs(t, "experimental"))
	of := func(version string) []string {
		s := schemas["gateway.networking.k8s.io/"+version+" HTTPRoute"]
		return append(s.limits(), s.expressions()...)
	}
	if diff := cmp.Diff(of("v1"), of("v1beta1")); diff != "" {
		t.Errorf("-v1 +v1beta1:\n%s", diff)
	}
}

// TestTheStandardChannelKnowsLess: where the CRDs of the standard channel judge an
// example otherwise than those of the experimental one, by which a directory goes, it
// is about what the standard channel does not have.
func TestTheStandardChannelKnowsLess(t *testing.T) {
	less := regexp.MustCompile(`unknown field "spec\.(rules\[\d+\]\.(retry|sessionPersistence)|useDefaultGateways|` +
		`rules\[\d+\]\.(backendRefs\[\d+\]\.)?filters\[\d+\]\.externalAuth)"|Unsupported value: "ExternalAuth"|` +
		`no CRD has gateway\.networking\.k8s\.io/v1alpha2 TCPRoute|` +
		`sectionName must be unique when parentRefs includes`) // whatever their ports are
	more := regexp.MustCompile(`Rule name must be unique within the route|value in body should match '\^\[!-~\]`)
	var documents []string
	for _, e := range routeExamples() {
		documents = append(documents, e.document(e.good), e.document(e.bad))
	}
	standard := verdicts(t, gatewayCRDs(t, "standard"), documents...)
	experimental := verdicts(t, gatewayCRDs(t, "experimental"), documents...)
	for i, document := range documents {
		switch {
		case standard[i] != "" && experimental[i] == "" && !less.MatchString(standard[i]):
			t.Errorf("%s\nstandard: %s", document, standard[i])
		case standard[i] == "" && experimental[i] != "" && !more.MatchString(experimental[i]):
			t.Errorf("%s\nexperimental: %s", document, experimental[i])
		}
	}
}
