package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"

	policyfake "github.com/weirmesh/weir/agent/api/client/fake"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/push"
	"github.com/weirmesh/weir/proxy/route"
)

const canary = "HTTPRoute/shop/canary"

// sees is an agent that knows the route in a generation, and some of whose proxies
// use it.
func sees(generation int64, proxies, acknowledged, refused int) *model.Programmed {
	out := &model.Programmed{Known: map[string]int64{canary: generation}}
	if proxies > 0 {
		out.Uses = []model.Use{{
			Object: canary, Parent: "shop/back", Generation: generation, Proxies: proxies, Acknowledged: acknowledged, Refused: refused,
		}}
	}
	return out
}

func TestProgrammedIsWhatAllAgentsSay(t *testing.T) {
	for _, tt := range []struct {
		promise string
		agents  []answer
		want    string
	}{
		{"all proxies of all nodes have it", []answer{{"n1", true, sees(3, 5, 5, 0)}, {"n2", true, sees(3, 9, 9, 0)}},
			"True/Programmed: 14 of 14 proxies"},
		{"nobody has asked for the Service", []answer{{"n1", true, sees(3, 0, 0, 0)}},
			"True/Programmed: 0 of 0 proxies"},
		{"some have yet to acknowledge", []answer{{"n1", true, sees(3, 5, 3, 0)}, {"n2", true, sees(3, 9, 9, 0)}},
			"False/Pending: 12 of 14 proxies"},
		{"what was acknowledged is older", []answer{{"n1", true, sees(3, 5, 5, 0)}, {"n2", true, sees(2, 9, 9, 0)}},
			"False/Pending: 5 of 14 proxies; agents that do not know this generation yet: n2"},
		{"an agent that does not know it may have proxies that it governs", []answer{{"n1", true, sees(3, 5, 5, 0)}, {"n2", true, &model.Programmed{}}},
			"False/Pending: 5 of 5 proxies; agents that do not know this generation yet: n2"},
		{"a proxy has refused it", []answer{{"n1", true, sees(3, 5, 3, 2)}, {"n2", true, sees(2, 9, 9, 0)}},
			"False/Rejected: 3 of 14 proxies; 2 refused it and keep what they had: their agents' logs say why; agents that do not know this generation yet: n2"},
		{"an agent that is ready does not answer", []answer{{"n1", true, sees(3, 5, 5, 0)}, {"n2", true, nil}},
			"Unknown/AgentsUnreachable: 5 of 5 proxies; agents that are ready and do not answer on the port of their metrics: n2"},
		{"an agent that is starting, or whose node is away, is left out", []answer{{"n1", true, sees(3, 5, 5, 0)}, {"n2", false, nil}},
			"True/Programmed: 5 of 5 proxies; not counted, as the agent is not ready: n2"},
		{"no agent is ready", []answer{{"n2", false, nil}},
			"Unknown/AgentsUnreachable: 0 of 0 proxies; not counted, as the agent is not ready: n2"},
		{"there is none", nil, "Unknown/AgentsUnreachable: 0 of 0 proxies; there is no agent"},
		{"of many nodes some are named", []answer{{"n1", false, nil}, {"n2", false, nil}, {"n3", false, nil}, {"n4", false, nil}, {"n5", false, nil}, {"n6", false, nil}, {"n7", true, sees(3, 1, 1, 0)}},
			"True/Programmed: 1 of 1 proxies; not counted, as the agent is not ready: n1, n2, n3, n4, n5 and 1 more"},
	} {
		t.Run(tt.promise, func(t *testing.T) {
			c := &census{rounds: 1, answers: map[string]answer{}}
			for _, a := range tt.agents {
				c.answers[a.node] = a
			}
			a := c.tally().programmed(canary, "shop/back", 3)
			if diff := cmp.Diff(tt.want, fmt.Sprintf("%s/%s: %s", a.status, a.reason, a.message)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// fleet are agents, by their address.
type fleet struct {
	mu    sync.Mutex
	says  map[string]*model.Programmed // nil: it does not answer
	asked int
}

func (f *fleet) ask(_ context.Context, ip string) (model.Programmed, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	if f.says[ip] == nil {
		return model.Programmed{}, errors.New("connection refused")
	}
	return *f.says[ip], nil
}

// say has an agent say something from now on, and returns how often all were asked
// since the last time.
func (f *fleet) say(ip string, what *model.Programmed) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.says[ip] = what
	asked := f.asked
	f.asked = 0
	return asked
}

func agentAt(node, ip string) *corev1.Pod {
	p := aPod("agent-"+node, node, 0, 0)
	p.Status.PodIP = ip
	return p
}

// programmedOf is the condition in the route's one entry.
func programmedOf(t *testing.T, routes *gatewayfake.Clientset) string {
	t.Helper()
	synctest.Wait()
	r, err := routes.GatewayV1().HTTPRoutes("shop").Get(t.Context(), "canary", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Status.Parents) == 0 {
		return ""
	}
	return programmedIn(r.Status.Parents[0].Conditions)
}

func programmedIn(conditions []metav1.Condition) string {
	c := meta.FindStatusCondition(conditions, conditionProgrammed)
	if c == nil {
		return ""
	}
	return fmt.Sprintf("%s/%s@%d: %s", c.Status, c.Reason, c.ObservedGeneration, c.Message)
}

func patches(client interface{ Actions() []k8stesting.Action }) int {
	n := 0
	for _, a := range client.Actions() {
		if a.GetVerb() == "patch" {
			n++
		}
	}
	return n
}

func TestTheLeaderAsksAgents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		routes := gatewayfake.NewClientset(anHTTPRoute("canary", "back"))
		starting := agentAt("n3", "10.0.0.3")
		starting.Status.ContainerStatuses[0].Ready = false
		client := fake.NewClientset(aService("back"), agentAt("n1", "10.0.0.1"), agentAt("n2", "10.0.0.2"), starting)
		agents := &fleet{says: map[string]*model.Programmed{"10.0.0.1": sees(3, 5, 5, 0), "10.0.0.2": sees(2, 9, 9, 0)}}
		replicas := []replica{
			startReplicaThatAsks(t, clients{client, routes, policyfake.New()}, "a", agents.ask),
			startReplicaThatAsks(t, clients{client, routes, policyfake.New()}, "b", agents.ask),
		}
		is := func(want string) {
			t.Helper()
			if got := programmedOf(t, routes); got != want {
				t.Errorf("Programmed is %s\nwant %s", got, want)
			}
		}
		const notCounted = "; not counted, as the agent is not ready: n3"
		time.Sleep(time.Second)
		is("False/Pending@3: 5 of 14 proxies; agents that do not know this generation yet: n2" + notCounted)
		if asked := agents.say("10.0.0.2", sees(3, 9, 9, 0)); asked != 2 {
			t.Errorf("%d questions, not one to each that is ready, by the leader", asked)
		}
		time.Sleep(2 * soon)
		is("True/Programmed@3: 14 of 14 proxies" + notCounted)

		// All is well: agents are asked seldom, and nothing is written.
		time.Sleep(seldom)
		agents.say("10.0.0.1", sees(3, 5, 5, 0))
		written := patches(routes)
		time.Sleep(10 * seldom)
		if asked := agents.say("10.0.0.1", sees(3, 6, 6, 0)); asked > 2*11 {
			t.Errorf("%d questions in five minutes", asked)
		}
		if n := patches(routes) - written; n > 0 {
			t.Errorf("%d patches that change nothing", n)
		}
		time.Sleep(2 * seldom)
		is("True/Programmed@3: 15 of 15 proxies" + notCounted)

		agents.say("10.0.0.2", nil)
		time.Sleep(10 * seldom)
		is("Unknown/AgentsUnreachable@3: 6 of 6 proxies; agents that are ready and do not answer on the port of their metrics: n2" + notCounted)
		changed := anHTTPRoute("canary", "nobody")
		changed.Generation = 4
		check(t)(routes.GatewayV1().HTTPRoutes("shop").Update(t.Context(), changed, metav1.UpdateOptions{}))
		time.Sleep(time.Second)
		is("False/NotAccepted@4: see the condition Accepted")
		var log string
		for _, r := range replicas {
			r.stop()
			log += r.log.String()
		}
		if n := strings.Count(log, "agent does not say what its proxies have"); n != 1 {
			t.Errorf("logged %d times:\n%s", n, log)
		}
	})
}

// TestEachParentsConditionHasTheCountOfItsPort: two ports of one Service, one of them
// by its name, and the Service itself.
func TestEachParentsConditionHasTheCountOfItsPort(t *testing.T) {
	r := anHTTPRoute("canary", "back", "back", "back")
	r.Spec.ParentRefs[0].Port = new(gatewayv1.PortNumber(80))
	r.Spec.ParentRefs[1].SectionName = new(gatewayv1.SectionName("admin"))
	said := model.Programmed{Known: map[string]int64{canary: 3}}
	for parent, counts := range map[string][2]int{"shop/back:80": {5, 5}, "shop/back:admin": {7, 9}, "shop/back": {10, 12}} {
		said.Uses = append(said.Uses, model.Use{Object: canary, Parent: parent, Generation: 3, Acknowledged: counts[0], Proxies: counts[1]})
	}
	w := newRouteWatches()
	if err := errors.Join(w.services.Add(aService("back")), w.routes[route.HTTPRoute].Add(r)); err != nil {
		t.Fatal(err)
	}
	view := w.view()
	c := &census{rounds: 1, answers: map[string]answer{"n1": {"n1", true, &said}}}
	parents, _ := parentStatus(view.routes[0], view.verdicts(view.routes[0]), c.tally(), true, noon)
	var got []string
	for _, p := range parents {
		got = append(got, programmedIn(p.Conditions))
	}
	want := []string{"True/Programmed@3: 5 of 5 proxies", "False/Pending@3: 7 of 9 proxies", "False/Pending@3: 10 of 12 proxies"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// TestAPolicySaysHowManyProxiesHaveIt: as a route does, and it is asked for as soon.
func TestAPolicySaysHowManyProxiesHaveIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		policies := policyfake.New(aPolicy("careful", "back", 1), aPolicy("young", "back", 2))
		client := fake.NewClientset(aService("back"), agentAt("n1", "10.0.0.1"), agentAt("n2", "10.0.0.2"))
		say := func(generation int64, proxies, acknowledged int) *model.Programmed {
			const name = "TrafficPolicy/shop/careful"
			return &model.Programmed{
				Known: map[string]int64{name: generation, "TrafficPolicy/shop/young": 3},
				Uses:  []model.Use{{Object: name, Generation: generation, Proxies: proxies, Acknowledged: acknowledged}},
			}
		}
		agents := &fleet{says: map[string]*model.Programmed{"10.0.0.1": say(3, 5, 5), "10.0.0.2": say(3, 9, 7)}}
		startReplicaThatAsks(t, clients{client, gatewayfake.NewClientset(), policies}, "a", agents.ask)
		is := func(name, want string) {
			t.Helper()
			synctest.Wait()
			p, err := policies.Policies("shop").Get(t.Context(), name, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if got := programmedIn(p.Status.Ancestors[0].Conditions); got != want {
				t.Errorf("Programmed is %s\nwant %s", got, want)
			}
		}
		time.Sleep(time.Second)
		is("careful", "False/Pending@3: 12 of 14 proxies")
		is("young", "False/NotAccepted@3: see the condition Accepted")
		agents.say("10.0.0.2", say(3, 9, 9))
		time.Sleep(2 * soon)
		is("careful", "True/Programmed@3: 14 of 14 proxies")

		// All is well: agents are asked seldom, whatever is said of what is not in force.
		time.Sleep(seldom)
		agents.say("10.0.0.1", say(3, 5, 5))
		time.Sleep(10 * seldom)
		if asked := agents.say("10.0.0.1", say(3, 5, 5)); asked > 2*11 {
			t.Errorf("%d questions in five minutes", asked)
		}
	})
}

// TestCountsThatMoveAreWrittenNowAndThen: of routes and of policies, as pods come and go
// all the time, and every agent hears of every status.
func TestCountsThatMoveAreWrittenNowAndThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		routes, policies, known := gatewayfake.NewClientset(), policyfake.New(), map[string]int64{}
		const many = 5 * countsEach
		services := []runtime.Object{agentAt("n1", "10.0.0.1")}
		for i := range many {
			name := fmt.Sprintf("r%d", i)
			services = append(services, aService(name))
			check(t)(routes.GatewayV1().HTTPRoutes("shop").Create(t.Context(), anHTTPRoute(name, name), metav1.CreateOptions{}))
			check(t)(policies.Policies("shop").Create(t.Context(), aPolicy(name, name, 1), metav1.CreateOptions{}))
			known["HTTPRoute/shop/"+name], known["TrafficPolicy/shop/"+name] = 3, 3
		}
		with := func(proxies int) *model.Programmed {
			out := &model.Programmed{Known: known}
			for name := range known {
				u := model.Use{Object: name, Generation: 3, Proxies: proxies, Acknowledged: proxies}
				if service, isRoute := strings.CutPrefix(name, "HTTPRoute/"); isRoute {
					u.Parent = service
				}
				out.Uses = append(out.Uses, u)
			}
			return out
		}
		agents := &fleet{says: map[string]*model.Programmed{"10.0.0.1": with(1)}}
		startReplicaThatAsks(t, clients{fake.NewClientset(services...), routes, policies}, "a", agents.ask)
		time.Sleep(seldom + seldom/2)
		ofRoutes, ofPolicies := patches(routes), patches(policies)
		agents.say("10.0.0.1", with(2))
		for round := 1; round <= many/countsEach; round++ {
			time.Sleep(seldom)
			synctest.Wait()
			if r, p := patches(routes)-ofRoutes, patches(policies)-ofPolicies; r != round*countsEach || p != round*countsEach {
				t.Errorf("%d statuses of routes and %d of policies written in %d rounds", r, p, round)
			}
		}
	})
}

func TestAgentsAreAskedOnTheirPort(t *testing.T) {
	var answer string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != push.ProgrammedPath {
			http.NotFound(w, r)
			return
		}
		fmt.Fprint(w, answer)
	}))
	defer server.Close()
	host, port, err := net.SplitHostPort(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	want := *sees(3, 2, 1, 1)
	content, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	answer = string(content)
	got, err := AskOn(number)(t.Context(), host)
	if err != nil || !cmp.Equal(want, got) {
		t.Errorf("%+v, %v", got, err)
	}
	answer = strings.Repeat(" ", maxAnswer) + answer
	if _, err := AskOn(number)(t.Context(), host); err == nil {
		t.Error("an answer without end is read")
	}
}
