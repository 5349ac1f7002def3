package e2e

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gateway "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"
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
	_, err = b.Kubectl(ctx, "wait", "--for=condition=Established", "--timeout=30s", "-f", crd)
	return err
}

// routeProgrammed changes a route of two callers, of whose proxies one stands still
// meanwhile.
func routeProgrammed(t *testing.T) {
	client, err := gateway.NewForConfig(bed.config)
	must(t, err)
	ns := newNamespace(t, captured())
	pods := backs(t, ns, 1)
	fronts := startAll(t, ns, onNode(appPod("front-0", "serve"), 0), onNode(appPod("front-1", "serve"), 1))
	for _, front := range fronts {
		waitAnswers(t, front, "http://back:8080/", pods)
	}
	routes := client.GatewayV1().HTTPRoutes(ns)
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
	become := func(want string) {
		t.Helper()
		eventually(t, soon, "the route's status", func() error {
			r, err := routes.Get(t.Context(), "back", metav1.GetOptions{})
			if err != nil {
				return err
			}
			var got []string
			for _, p := range r.Status.Parents {
				for _, c := range p.Conditions {
					if c.Type == "Programmed" {
						got = append(got, fmt.Sprintf("%s/%s@%d: %s", c.Status, c.Reason, c.ObservedGeneration, c.Message))
					}
				}
			}
			if len(got) != 1 || got[0] != want {
				return fmt.Errorf("got %q, want %q", got, want)
			}
			return nil
		})
	}

	_, err = routes.Create(t.Context(), saysOf("one"), metav1.CreateOptions{})
	must(t, err)
	become("True/Programmed@1: 2 of 2 proxies")

	still := proxyOf(t, fronts[1])
	must(t, unix.Kill(still.pid, unix.SIGSTOP))
	defer func() { _ = unix.Kill(still.pid, unix.SIGCONT) }() // it may have ended
	changed, err := routes.Get(t.Context(), "back", metav1.GetOptions{})
	must(t, err)
	changed.Spec = saysOf("two").Spec
	_, err = routes.Update(t.Context(), changed, metav1.UpdateOptions{})
	must(t, err)
	become("False/Pending@2: 1 of 2 proxies")
	must(t, unix.Kill(still.pid, unix.SIGCONT))
	become("True/Programmed@2: 2 of 2 proxies")
}
