package proxypb

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/proxy/route"
)

func whole(t *testing.T, expression string) *route.Regexp {
	t.Helper()
	r, err := route.CompileWhole(expression)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestADestinationIsReadAsItWasWritten(t *testing.T) {
	endpoints := []route.Endpoint{{Addr: netip.MustParseAddrPort("10.0.0.7:8080"), Pod: "shop/back-1", Workload: "shop/back", Identity: "spiffe://cluster.local/ns/shop/sa/back"}}
	policy := &route.Policy{
		Name: "shop/back", Balance: route.ConsistentHash, HashOn: route.HashCookie, HashName: "session",
		SlowStart: time.Second, Affinity: time.Hour, Ejection: route.Ejection{Failures: -1, Base: time.Minute, MaxPercent: 20},
		Limits: route.Limits{Connections: 1, Pending: 2, Requests: 3, Retries: 4},
		Retry:  &route.Retry{Attempts: 2, Codes: []uint16{503}, Backoff: time.Millisecond},
		Budget: 30, Timeout: time.Minute,
		RateLimit: &route.RateLimit{Requests: 5, Per: time.Second, Burst: 6, PerClient: true, ByIdentity: true},
	}
	filters := route.Filters{
		RequestHeaders:  &route.HeaderChange{Set: []route.Header{{Name: "a", Value: "b"}}, Add: []route.Header{{Name: "c", Value: "d"}}, Remove: []string{"e"}},
		ResponseHeaders: &route.HeaderChange{Remove: []string{"f"}},
		Redirect:        &route.Redirect{Scheme: "https", Hostname: "h", Path: &route.PathChange{Prefix: true, Value: "/p"}, Port: 8443, Status: 308},
		Rewrite:         &route.Rewrite{Hostname: "w", Path: &route.PathChange{Value: "/q"}},
		Mirrors:         []route.Mirror{{Backend: route.Backend{Service: "shop/mirror"}, Numerator: 1, Denominator: 3}},
		CORS: &route.CORS{
			AllowOrigins: []string{"*"}, AllowMethods: []string{"GET"}, AllowHeaders: []string{"x"}, ExposeHeaders: []string{"y"},
			AllowCredentials: true, MaxAge: 7,
		},
		Invalid: true,
	}
	want := route.Destination{
		Service: "shop/back", Endpoints: endpoints, Protocol: route.HTTP2, Policy: policy, Identity: "spiffe://cluster.local/ns/shop/sa/pod",
		Routes: &route.Routes{
			Kind: route.HTTPRoute,
			Matches: []route.Match{
				{Rule: 1, Path: route.Path{Kind: route.PathPrefix, Value: "/v2"}, Method: "GET",
					Headers: []route.Value{{Name: "version", Value: "2"}}, Query: []route.Value{{Name: "q", Regexp: whole(t, "a|b")}}},
				{Path: route.Path{Kind: route.PathRegexp, Regexp: whole(t, "/.*x")}},
				{GRPC: &route.Method{Service: "s", Method: "m"}},
				{GRPC: &route.Method{MethodRegexp: whole(t, "m+")}},
			},
			Rules: []route.Rule{
				{Route: "HTTPRoute/shop/back", Name: "first", Filters: filters, Timeout: new(2 * time.Nanosecond), BackendTimeout: 1, Retry: policy.Retry},
				{Route: "HTTPRoute/shop/back", Name: "without a timeout", Timeout: new(time.Duration(0))},
				{Backends: []route.WeightedBackend{
					{Weight: 9, Backend: route.Backend{Service: "shop/v1", Endpoints: endpoints, Protocol: route.HTTP, Policy: policy}},
					{Weight: 1, Backend: route.Backend{Service: "shop/v2", Invalid: true}, Filters: filters},
				}},
			},
		},
	}
	wire, err := proto.Marshal(FromDestination(want))
	if err != nil {
		t.Fatal(err)
	}
	var read Destination
	if err := proto.Unmarshal(wire, &read); err != nil {
		t.Fatal(err)
	}
	got, err := read.ToDestination()
	if err != nil {
		t.Fatal(err)
	}
	same := cmp.Comparer(func(a, b *route.Regexp) bool { return a == b || a != nil && b != nil && a.String() == b.String() })
	if diff := cmp.Diff(want, got, same, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("(-written, +read):\n%s", diff)
	}
}

func TestADestinationThatCannotBeIsRefused(t *testing.T) {
	for want, d := range map[string]*Destination{
		"cannot be dialled":        {Service: "a/b", Endpoints: []*Endpoint{{Address: "10.0.0.1:0"}}},
		"without a Service":        {Endpoints: []*Endpoint{{Address: "10.0.0.1:1"}}},
		"a match of rule 0, of 0":  {Service: "a/b", Routes: &Routes{Kind: Routes_HTTP_ROUTE, Matches: []*Match{{}}}},
		"routes of kind 0":         {Service: "a/b", Routes: &Routes{}},
		"missing closing":          {Service: "a/b", Routes: &Routes{Kind: Routes_HTTP_ROUTE, Rules: []*Rule{{}}, Matches: []*Match{{Path: &Path{Kind: Path_REGEXP, Value: "("}}}}},
		"at most 1024":             {Service: "a/b", Routes: &Routes{Kind: Routes_HTTP_ROUTE, Rules: []*Rule{{}}, Matches: []*Match{{Headers: []*Value{{Regexp: true, Value: strings.Repeat("a", 2000)}}}}}},
		"0 rules of a TCPRoute":    {Service: "a/b", Routes: &Routes{Kind: Routes_TCP_ROUTE}},
		"is no SPIFFE ID":          {Service: "a/b", Endpoints: []*Endpoint{{Address: "10.0.0.1:1", Identity: "ns/a/sa/b"}}},
		"\"b\" is no SPIFFE ID":    {Identity: "b"},
		"protocol 9":               {Service: "a/b", Protocol: 9},
		"share of 1 in 0":          {Service: "a/b", Routes: &Routes{Kind: Routes_HTTP_ROUTE, Rules: []*Rule{{Filters: &Filters{Mirrors: []*Mirror{{Numerator: 1}}}}}}},
		"redirect with status 200": {Service: "a/b", Routes: &Routes{Kind: Routes_HTTP_ROUTE, Rules: []*Rule{{Filters: &Filters{Redirect: &Redirect{Status: 200}}}}}},
		"a time of -1 ns":          {Service: "a/b", Policy: &Policy{Timeout: -1}},
		"a rate limit of 0 in 0s":  {Service: "a/b", Policy: &Policy{RateLimit: &RateLimit{}}},
		"65536 is more than 65535": {Service: "a/b", Routes: &Routes{Kind: Routes_HTTP_ROUTE, Rules: []*Rule{{Filters: &Filters{Redirect: &Redirect{Status: 302, Port: 65536}}}}}},
	} {
		if _, err := d.ToDestination(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: error %v, want %q", d, err, want)
		}
	}
}
