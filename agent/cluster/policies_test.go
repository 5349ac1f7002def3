package cluster

import (
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	policyfake "github.com/weirmesh/weir/agent/api/client/fake"
	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// apiPolicy is about shop/back, with a retry budget to tell it by.
func apiPolicy(name string, percent int32) *v1alpha1.TrafficPolicy {
	p := &v1alpha1.TrafficPolicy{ObjectMeta: meta("shop", name)}
	p.Spec.TargetRef.Name = "back"
	p.Spec.RetryConstraint = &v1alpha1.RetryConstraint{Budget: &v1alpha1.RetryBudget{Percent: &percent}}
	return p
}

// budget is that of the policy in force, 0 without any.
func budget(s *Store) uint32 {
	d := told(s, netip.MustParseAddrPort("10.96.0.7:80"))
	if d.Policy == nil {
		return 0
	}
	return d.Policy.Budget
}

func TestPoliciesAreFollowed(t *testing.T) {
	policies := policyfake.New(apiPolicy("b", 30))
	s, log := runPolicyAPI(t, fake.NewClientset(apiService()), newGateway(), policies)
	if got := budget(s); got != 30 {
		t.Fatalf("once the store is complete, policies are there: %d", got)
	}
	api := policies.Policies("shop")
	check(t)(api.Update(t.Context(), apiPolicy("b", 40), metav1.UpdateOptions{}))
	eventually(t, "it says something else", func() bool { return budget(s) == 40 })

	other := apiPolicy("b", 40)
	other.Spec.TargetRef.Name = "front"
	check(t)(api.Update(t.Context(), other, metav1.UpdateOptions{}))
	eventually(t, "it is about another Service", func() bool { return budget(s) == 0 })

	check(t)(api.Update(t.Context(), apiPolicy("b", 30), metav1.UpdateOptions{}))
	check(t)(api.Create(t.Context(), apiPolicy("a", 50), metav1.CreateOptions{}))
	eventually(t, "of two the one is in force whose name comes first", func() bool { return budget(s) == 50 })
	if err := api.Delete(t.Context(), "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other is left", func() bool { return budget(s) == 30 })

	check(t)(api.Update(t.Context(), apiPolicy("b", 101), metav1.UpdateOptions{}))
	eventually(t, "what a CRD should have refused is said", func() bool {
		return strings.Contains(log.String(), "spec.retryConstraint.budget.percent: 101 is not between 1 and 100")
	})
	if got := budget(s); got != 30 {
		t.Errorf("the last good one stays: %d", got)
	}
}

func TestTheCRDOfPoliciesMayComeAndGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		policies := policyfake.New(apiPolicy("b", 30))
		var served atomic.Bool
		policies.PrependReactor("list", "*", func(a k8stesting.Action) (bool, runtime.Object, error) {
			return !served.Load(), nil, apierrors.NewNotFound(a.GetResource().GroupResource(), "")
		})
		s, log := runPolicyAPI(t, fake.NewClientset(apiService()), newGateway(), policies)
		if got := budget(s); got != 0 {
			t.Errorf("without the CRD: %d", got)
		}
		served.Store(true)
		time.Sleep(2 * lastLook)
		synctest.Wait()
		if got := budget(s); got != 30 {
			t.Errorf("the CRD has come: %d", got)
		}
		check(t)(policies.Policies("shop").Create(t.Context(), apiPolicy("a", 50), metav1.CreateOptions{}))
		synctest.Wait()
		if got := budget(s); got != 50 {
			t.Errorf("it is watched: %d", got)
		}
		if log.String() != "" {
			t.Errorf("a CRD that is not there is no news:\n%s", log)
		}
	})
}

func TestPoliciesAreKeptForAnotherAgent(t *testing.T) {
	s := NewStore()
	s.tables.policies.set(must(TrafficPolicy(apiPolicy("b", 30))))
	s.tables.services.set(must(Service(apiService())))
	lastGood := LastGood{Path: t.TempDir() + "/last-good.gz", Version: "v1"}
	if err := lastGood.save(s.copy()); err != nil {
		t.Fatal(err)
	}
	after, log := NewStore(), &logBuffer{}
	lastGood.restore(after, log.logger())
	if !same(after.view.policies, s.view.policies) || budget(after) != 30 {
		t.Errorf("got %v; log %s", after.view.policies, log)
	}
	listed := NewStore()
	listed.tables.policies.replace(map[key]model.TrafficPolicy{})
	lastGood.restore(listed, log.logger())
	if got := budget(listed); got != 0 {
		t.Errorf("what the server has listed is not taken from the file: %d", got)
	}
}

// TestADestinationNamesItsPolicies: and so does what holds for callers, in the generation
// that is known; another one of the same words is another revision.
func TestADestinationNamesItsPolicies(t *testing.T) {
	s := NewStore()
	s.tables.services.set(must(Service(apiService())))
	pod := netip.MustParseAddr("10.0.0.7")
	s.tables.slices.set(model.EndpointSlice{Namespace: "shop", Name: "back-x", Service: "back",
		Ports: []model.EndpointPort{{Port: 8080, Protocol: model.TCP}}, Endpoints: []model.Endpoint{{Address: pod}}})
	address := netip.MustParseAddrPort("10.96.0.7:80")
	revision := s.Revision(address)
	for _, generation := range []int64{3, 4} {
		p := apiPolicy("b", 30)
		p.Generation = generation
		p.Spec.RateLimit = &v1alpha1.RateLimit{Count: 1, Interval: "1s", PerClient: new(true)}
		s.tables.policies.set(must(TrafficPolicy(p)))
		want := []model.Governing{{Object: "TrafficPolicy/shop/b", Generation: generation}}
		_, outbound := s.Destination(address, "test")
		_, inbound := s.Inbound([]netip.Addr{pod})
		if diff := cmp.Diff([][]model.Governing{want, want}, [][]model.Governing{outbound, inbound}); diff != "" {
			t.Errorf("to clients, and for callers (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(map[string]int64{"TrafficPolicy/shop/b": generation}, s.Known()); diff != "" {
			t.Errorf("all policies (-want +got):\n%s", diff)
		}
		now := s.Revision(address)
		if now == revision {
			t.Error("the revision is the same")
		}
		revision = now
	}
}

const policyYAML = `apiVersion: policy.weirmesh.io/v1alpha1
kind: TrafficPolicy
metadata: {namespace: shop, name: careful, creationTimestamp: "2026-03-01T13:00:00+01:00"}
spec:
  targetRef: {group: "", kind: Service, name: back}
`

func TestTheModelOfATrafficPolicy(t *testing.T) {
	for _, tt := range []struct {
		promise, spec string
		want          route.Policy
	}{
		{"nothing said is nothing changed", "", route.Policy{}},
		{"everything said", `
  loadBalancer: {type: RoundRobin, slowStart: {window: 1m30s}}
  outlierDetection: {consecutiveErrors: 3, baseEjectionTime: 10s, maxEjectionPercent: 20}
  circuitBreaker: {maxConnections: 20, maxPendingRequests: 30, maxParallelRequests: 100, maxParallelRetries: 5}
  retry: {attempts: 3, codes: [503, 504], backoff: 100ms}
  retryConstraint: {budget: {percent: 30}}
  timeouts: {request: 15s}
  rateLimit: {count: 50, interval: 1s, burst: 80}
`, route.Policy{
			Balance: route.RoundRobin, SlowStart: 90 * time.Second,
			Ejection: route.Ejection{Failures: 3, Base: 10 * time.Second, MaxPercent: 20},
			Limits:   route.Limits{Connections: 20, Pending: 30, Requests: 100, Retries: 5},
			Retry:    &route.Retry{Attempts: 3, Codes: []uint16{503, 504}, Backoff: 100 * time.Millisecond},
			Budget:   30, Timeout: 15 * time.Second,
			RateLimit: &route.RateLimit{Requests: 50, Per: time.Second, Burst: 80},
		}},
		{"each caller counted by itself", "  rateLimit: {count: 5, interval: 1s, perClient: true}\n", route.Policy{
			RateLimit: &route.RateLimit{Requests: 5, Per: time.Second, PerClient: true},
		}},
		{"each caller counted by its identity", "  rateLimit: {count: 5, interval: 1s, perClient: true, clientBy: Identity}\n", route.Policy{
			RateLimit: &route.RateLimit{Requests: 5, Per: time.Second, PerClient: true, ByIdentity: true},
		}},
		{"retries as an HTTPRoute has them by default", "  retry: {}\n", route.Policy{
			Retry: &route.Retry{Attempts: 1, Codes: []uint16{500, 502, 503, 504}, Backoff: 25 * time.Millisecond},
		}},
		{"no errors are too many: nothing is ejected", "  outlierDetection: {consecutiveErrors: 0}\n", route.Policy{Ejection: route.Ejection{Failures: -1}}},
		{"connections that are limited have others wait", "  circuitBreaker: {maxConnections: 1}\n", route.Policy{Limits: route.Limits{Connections: 1, Pending: 1024}}},
		{"unless none is to", "  circuitBreaker: {maxConnections: 1, maxPendingRequests: 0}\n", route.Policy{Limits: route.Limits{Connections: 1}}},
		{"without that limit none has to", "  circuitBreaker: {maxParallelRequests: 1}\n", route.Policy{Limits: route.Limits{Requests: 1}}},
		{"ejection that is asked for is as it is by default", "  outlierDetection: {}\n", route.Policy{}},
		{"the fewest requests, by name", "  loadBalancer: {type: LeastRequest}\n", route.Policy{Balance: route.LeastRequest}},
		{"any endpoint", "  loadBalancer: {type: Random}\n", route.Policy{Balance: route.Random}},
		{"by the client", "  loadBalancer: {type: ConsistentHash, consistentHash: {type: SourceIP}}\n", route.Policy{Balance: route.ConsistentHash, HashOn: route.HashClient}},
		{"by a header, whose name has no case", "  loadBalancer: {type: ConsistentHash, consistentHash: {type: Header, header: {name: X-User}}}\n",
			route.Policy{Balance: route.ConsistentHash, HashOn: route.HashHeader, HashName: "x-user"}},
		{"by a cookie, whose name has", "  loadBalancer: {type: ConsistentHash, consistentHash: {type: Cookie, cookie: {name: SID}}}\n",
			route.Policy{Balance: route.ConsistentHash, HashOn: route.HashCookie, HashName: "SID"}},
		{"no timeout", "  timeouts: {request: 0s}\n", route.Policy{}},
	} {
		t.Run(tt.promise, func(t *testing.T) {
			v, err := readDir(withFile(t, policyYAML+strings.TrimPrefix(tt.spec, "\n")))
			if err != nil {
				t.Fatal(err)
			}
			tt.want.Name = "shop/careful"
			want := map[key]model.TrafficPolicy{{"shop", "careful"}: {
				Namespace: "shop", Name: "careful", Service: "back", Created: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), Policy: tt.want,
			}}
			if diff := cmp.Diff(want, v.policies); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestADirectorysPoliciesAreInForce(t *testing.T) {
	dir := withFile(t, shopYAML)
	write(t, dir, "policy.yaml", policyYAML+"  retryConstraint: {budget: {percent: 30}}\n")
	s, _ := runDir(t, dir)
	if got := budget(s); got != 30 {
		t.Errorf("got %d", got)
	}
	write(t, dir, "policy.yaml", policyYAML+"  retryConstraint: {budget: {percent: 40}}\n")
	eventually(t, "it has changed", func() bool { return budget(s) == 40 })
}

func TestStrippedPoliciesKeepTheirSpec(t *testing.T) {
	sameAfter(t, apiPolicy("b", 30), func(p *v1alpha1.TrafficPolicy) { dropManagedFields(p) }, TrafficPolicy)
}
