package controller

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"

	policyfake "github.com/weirmesh/weir/agent/api/client/fake"
	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/model"
)

// anAuthorization allows what comes to a port, in the third generation.
func anAuthorization(name string, port int32) *v1alpha1.AuthorizationPolicy {
	p := &v1alpha1.AuthorizationPolicy{}
	p.Namespace, p.Name, p.Generation = "shop", name, 3
	p.Spec.Action = v1alpha1.Allow
	p.Spec.Rules = []v1alpha1.AuthorizationRule{{NetworkAttributes: &v1alpha1.NetworkAttributes{Ports: []int32{port}}}}
	return p
}

func inWords(conditions []metav1.Condition) string {
	var out []string
	for _, c := range conditions {
		out = append(out, fmt.Sprintf("%s=%s/%s@%d", c.Type, c.Status, c.Reason, c.ObservedGeneration))
	}
	return strings.Join(out, " ")
}

func TestTheStatusOfAuthorizationSaysHowManyProxiesHaveIt(t *testing.T) {
	const name = "AuthorizationPolicy/shop/p"
	agents := func(known int64, u model.Use) *tally {
		u.Object = name
		return &tally{
			agents: []answer{{node: "n1", ready: true, said: &model.Programmed{Known: map[string]int64{name: known}}}},
			uses:   map[useKey][]model.Use{{object: name}: {u}},
		}
	}
	other := condition("Other", "True", "Other", "", 1)
	for _, tt := range []struct {
		promise string
		port    int32
		have    []metav1.Condition
		proxies *tally
		want    string
	}{
		{"before anybody was asked", 80, nil, nil, "Accepted=True/Accepted@3"},
		{"all have it", 80, nil, agents(3, model.Use{Generation: 3, Proxies: 2, Acknowledged: 2}), "Accepted=True/Accepted@3 Programmed=True/Programmed@3"},
		{"one has it not", 80, nil, agents(3, model.Use{Generation: 3, Proxies: 2, Acknowledged: 1}), "Accepted=True/Accepted@3 Programmed=False/Pending@3"},
		{"one refused it", 80, nil, agents(3, model.Use{Generation: 3, Proxies: 2, Acknowledged: 1, Refused: 1}), "Accepted=True/Accepted@3 Programmed=False/Rejected@3"},
		{"an agent does not know it", 80, nil, agents(2, model.Use{Generation: 2}), "Accepted=True/Accepted@3 Programmed=False/Pending@3"},
		{"what cannot be read refuses, and proxies have that", 0, nil, agents(3, model.Use{Generation: 3, Proxies: 2, Acknowledged: 2}), "Accepted=False/Invalid@3 Programmed=True/Programmed@3"},
		{"others' conditions stay", 80, []metav1.Condition{other}, nil, "Other=True/Other@1 Accepted=True/Accepted@3"},
	} {
		p := anAuthorization("p", tt.port)
		p.Status.Conditions = tt.have
		got, differs := authzStatus(toAuthz(p), tt.proxies, true, noon)
		if inWords(got) != tt.want || !differs {
			t.Errorf("%s: %s, differs %t", tt.promise, inWords(got), differs)
		}
		p.Status.Conditions = got
		if again, differs := authzStatus(toAuthz(p), tt.proxies, true, noon.Add(time.Hour)); differs {
			t.Errorf("%s: it is written again: %s", tt.promise, inWords(again))
		}
	}
}

func TestTheLeaderWritesTheStatusOfAuthorization(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		policies := policyfake.New(anAuthorization("good", 80), anAuthorization("bad", 0))
		for _, name := range []string{"a", "b"} {
			startReplicaOf(t, clients{fake.NewClientset(), gatewayfake.NewClientset(), policies}, name)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		list, err := policies.AuthorizationPolicies("").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, p := range list.Items {
			got[p.Name] = inWords(p.Status.Conditions)
			if c := p.Status.Conditions; p.Name == "bad" && !strings.HasPrefix(c[0].Message, "spec.rules[0].networkAttributes.ports[0]: 0 is not between 1 and 65535; until that is right") {
				t.Errorf("it says %q", c[0].Message)
			}
		}
		if diff := cmp.Diff(map[string]string{"good": "Accepted=True/Accepted@3", "bad": "Accepted=False/Invalid@3"}, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		for _, a := range policies.Actions() {
			if a.GetVerb() == "patch" && a.GetSubresource() != "status" {
				t.Error("a policy is patched, not its status")
			}
		}
	})
}

func TestTheLeaderWritesTheStatusOfPeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		strict, unknown := v1alpha1.Strict, v1alpha1.PeerMode("Off")
		peers := func(name string, mode *v1alpha1.PeerMode) *v1alpha1.PeerAuthentication {
			p := &v1alpha1.PeerAuthentication{}
			p.Namespace, p.Name, p.Generation, p.Spec.Mode = "shop", name, 3, mode
			return p
		}
		policies := policyfake.New(peers("good", &strict), peers("bad", &unknown))
		startReplicaOf(t, clients{fake.NewClientset(), gatewayfake.NewClientset(), policies}, "a")
		time.Sleep(time.Second)
		synctest.Wait()
		list, err := policies.PeerAuthentications("").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, p := range list.Items {
			got[p.Name] = inWords(p.Status.Conditions)
			const want = "spec.mode: Off is none of [Permissive Strict Disable]; until that is right, the pods that it may be about refuse plaintext"
			if c := p.Status.Conditions; p.Name == "bad" && c[0].Message != want {
				t.Errorf("it says %q", c[0].Message)
			}
		}
		if diff := cmp.Diff(map[string]string{"good": "Accepted=True/Accepted@3", "bad": "Accepted=False/Invalid@3"}, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}
