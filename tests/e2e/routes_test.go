package e2e

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gateway "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"

	policyclient "github.com/weirmesh/weir/agent/api/client"
)

// installGateway has the API server know HTTPRoutes.
func (b *testBed) installGateway(ctx context.Context) error {
	dir, err := output(exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api"))
	if err != nil {
		return err
	}
	crd := filepath.Join(strings.TrimSpace(string(dir)), "config", "crd", "standard", "gateway.networking.k8s.io_httproutes.yaml")
	if _, err := b.Kubectl(ctx, "apply", "--server-side", "-f", crd); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	// Of a CRD that has no conditions yet, kubectl says that it cannot read them.
	return poll(ctx, "the CRD of HTTPRoutes", func() error {
		_, err := b.Kubectl(ctx, "wait", "--for=condition=Established", "--timeout=30s", "-f", crd)
		return err
	})
}

// programmed changes a route and a policy of two callers, of whose proxies one stands
// still meanwhile; and has the policy be about their callers, as the called pod's proxy
// counts them, in place of them.
func programmed(t *testing.T) {
	client, err := gateway.NewForConfig(bed.config)
	must(t, err)
	policyClient, err := policyclient.New(bed.config)
	must(t, err)
	ns := newNamespace(t, captured())
	pods := backs(t, ns, 1)
	fronts := startAll(t, ns, onNode(appPod("front-0", "serve"), 0), onNode(appPod("front-1", "serve"), 1))
	for _, front := range fronts {
		waitAnswers(t, front, "http://back:8080/", pods)
	}
	routes, policies := client.GatewayV1().HTTPRoutes(ns), policyClient.TrafficPolicies(ns)
	saysOf := func(value string) *gatewayv1.HTTPRoute {
		return &gatewayv1.HTTPRoute{
			ObjectMeta: metav1.ObjectMeta{Name: "back"},
			Spec: gatewayv1.HTTPRouteSpec{
				CommonRouteSpec: gatewayv1.CommonRouteSpec{ParentRefs: []gatewayv1.ParentReference{
					{Group: new(gatewayv1.Group("")), Kind: new(gatewayv1.Kind("Service")), Name: "back"},
				}},
				Rules: []gatewayv1.HTTPRouteRule{{Filters: []gatewayv1.HTTPRouteFilter{{
					Type:                   gatewayv1.HTTPRouteFilterResponseHeaderModifier,
					ResponseHeaderModifier: &gatewayv1.HTTPHeaderFilter{Set: []gatewayv1.HTTPHeader{{Name: "x-route", Value: value}}},
				}}}},
			},
		}
	}
	ofRoute := func() ([]metav1.Condition, error) {
		r, err := routes.Get(t.Context(), "back", metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		var out []metav1.Condition
		for _, p := range r.Status.Parents {
			out = append(out, p.Conditions...)
		}
		return out, nil
	}
	ofPolicy := func() ([]metav1.Condition, error) {
		list, err := policies.List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return nil, err
		}
		var out []metav1.Condition
		for _, p := range list.Items {
			for _, a := range p.Status.Ancestors {
				out = append(out, a.Conditions...)
			}
		}
		return out, nil
	}
	become := func(conditions func() ([]metav1.Condition, error), want string) {
		t.Helper()
		eventually(t, soon, "the status", func() error {
			all, err := conditions()
			if err != nil {
				return err
			}
			var got []string
			for _, c := range all {
				if c.Type == "Programmed" {
					got = append(got, fmt.Sprintf("%s/%s@%d: %s", c.Status, c.Reason, c.ObservedGeneration, c.Message))
				}
			}
			if len(got) != 1 || got[0] != want {
				return fmt.Errorf("got %q, want %q", got, want)
			}
			return nil
		})
	}
	changePolicy := func(spec string) {
		t.Helper()
		_, err := policies.Patch(t.Context(), "back", types.MergePatchType, []byte(`{"spec":`+spec+`}`), metav1.PatchOptions{})
		must(t, err)
	}

	_, err = routes.Create(t.Context(), saysOf("one"), metav1.CreateOptions{})
	must(t, err)
	must(t, createPolicy(t, ns, trafficPolicy, "back", `{"targetRef":{"name":"back"},"retry":{"attempts":1}}`))
	become(ofRoute, "True/Programmed@1: 2 of 2 proxies")
	become(ofPolicy, "True/Programmed@1: 2 of 2 proxies")

	goOn := halt(t, proxyOf(t, fronts[1]).pid)
	changed, err := routes.Get(t.Context(), "back", metav1.GetOptions{})
	must(t, err)
	changed.Spec = saysOf("two").Spec
	_, err = routes.Update(t.Context(), changed, metav1.UpdateOptions{})
	must(t, err)
	changePolicy(`{"retry":{"attempts":2}}`)
	become(ofRoute, "False/Pending@2: 1 of 2 proxies")
	become(ofPolicy, "False/Pending@2: 1 of 2 proxies")
	must(t, goOn())
	become(ofRoute, "True/Programmed@2: 2 of 2 proxies")
	become(ofPolicy, "True/Programmed@2: 2 of 2 proxies")

	changePolicy(`{"retry":null,"rateLimit":{"count":1000,"interval":"1s","perClient":true}}`)
	become(ofPolicy, "True/Programmed@3: 1 of 1 proxies")
}
