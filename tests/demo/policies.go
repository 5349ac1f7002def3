package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/weirmesh/weir/agent/telemetry"
)

// policyFile says who may call whom, from the start on: the ingress calls front, front
// calls back, and back hears nobody who does not show who he is. The ingress, which the
// world calls, has no policy.
var policyFile = []any{
	mayCall("ingress", "front"),
	mayCall("front", "back"),
	map[string]any{
		"apiVersion": "policy.weirmesh.io/v1alpha1", "kind": "PeerAuthentication",
		"metadata": map[string]string{"namespace": namespace, "name": "back"},
		"spec":     map[string]any{"podSelector": selects("back"), "mode": "Strict"},
	},
}

// mayCall lets one service account call the pods of an app, and nobody else.
func mayCall(account, app string) any {
	source := map[string]any{"type": "ServiceAccount", "serviceAccount": map[string]string{"name": account}}
	return map[string]any{
		"apiVersion": "policy.weirmesh.io/v1alpha1", "kind": "AuthorizationPolicy",
		"metadata": map[string]string{"namespace": namespace, "name": app},
		"spec": map[string]any{
			"podSelector": selects(app), "action": "ALLOW",
			"rules": []any{map[string]any{"sources": []any{source}}},
		},
	}
}

func selects(app string) any {
	return map[string]any{"matchLabels": map[string]string{"app": app}}
}

// identity is the SPIFFE ID of a pod, "namespace/name", of this demo.
func identity(podID string) string {
	return "spiffe://cluster.local/ns/" + namespace + "/sa/" + appOf(strings.TrimPrefix(podID, namespace+"/"))
}

const (
	policyDenied     = "policy_denied"
	plaintextRefused = "plaintext_refused"
)

// policies shows who is allowed to call back, and who is not.
func (s *stage) policies(ctx context.Context, ingress netip.AddrPort, out *printer) error {
	out.title("Who may call back: AuthorizationPolicy demo/back allows front; PeerAuthentication demo/back is Strict")
	for _, show := range []func(context.Context, netip.AddrPort, *printer) error{s.allowed, s.denied, s.plain} {
		if err := show(ctx, ingress, out); err != nil {
			return err
		}
	}
	out.line("")
	return nil
}

// allowed has front call back.
func (s *stage) allowed(ctx context.Context, ingress netip.AddrPort, out *printer) error {
	began := time.Now()
	if r := request(ctx, ingress, ""); r.err != nil {
		return fmt.Errorf("front calls back: %w", r.err)
	}
	r, err := s.decision(ctx, began, identity("front"))
	if err != nil {
		return fmt.Errorf("front calls back: %w", err)
	}
	if r.HTTP == nil || r.Status != http.StatusOK || r.Policy != namespace+"/back" {
		return fmt.Errorf("front calls back: by policy %q: %s %s", r.Policy, r.Reason, r.Detail)
	}
	out.fact("front", "calls the Service %s: %d", namespace+"/back", r.Status)
	out.fact("", "%s: allowed by %s", r.PeerIdentity, r.Policy)
	return nil
}

// denied has the ingress call back itself.
func (s *stage) denied(ctx context.Context, _ netip.AddrPort, out *printer) error {
	began := time.Now()
	a := s.getFrom(ctx, s.pods["ingress"], s.address(back), "/")
	if a.err != nil || a.status != http.StatusForbidden || !strings.Contains(a.proxyStatus, policyDenied) {
		return fmt.Errorf("the ingress calls back, which it may not: %s", a)
	}
	r, err := s.decision(ctx, began, identity("ingress"))
	if err != nil {
		return fmt.Errorf("the ingress calls back: %w", err)
	}
	if r.Reason != policyDenied || !strings.Contains(a.proxyStatus, r.Policy) {
		return fmt.Errorf("the ingress calls back, which it may not: the record says %q by policy %q, the answer %s", r.Reason, r.Policy, a.proxyStatus)
	}
	out.fact("ingress", "calls the Service %s: %d, Proxy-Status: %s", namespace+"/back", a.status, a.proxyStatus)
	out.fact("", "%s: %s, %s", r.PeerIdentity, r.Reason, r.Policy)
	return nil
}

// plain has somebody without a proxy call back.
func (s *stage) plain(ctx context.Context, _ netip.AddrPort, out *printer) error {
	began := time.Now()
	a := get(ctx, netip.AddrPortFrom(s.pods["back-1"].Address(s.v6), appPort), "/", "")
	if !errors.Is(a.err, syscall.ECONNRESET) {
		return fmt.Errorf("a caller in plaintext is to be reset: %s", a)
	}
	r, err := s.decision(ctx, began, "")
	if err != nil {
		return fmt.Errorf("a caller in plaintext: %w", err)
	}
	if r.Reason != plaintextRefused {
		return fmt.Errorf("a caller in plaintext: the record says %q: %s", r.Reason, r.Detail)
	}
	out.fact("nobody", "calls %s in plaintext, without a proxy: reset", r.Server)
	out.fact("", "%s: %s, %s", r.Client, r.Reason, r.Detail)
	return nil
}

// decision is the record of a back pod's proxy of what a caller sent since then.
func (s *stage) decision(ctx context.Context, since time.Time, caller string) (telemetry.Record, error) {
	deadline := time.Now().Add(recordTimeout)
	for {
		all := s.records.all()
		for _, r := range all {
			if r.Direction == inbound && appOf(r.Pod) == namespace+"/back" && r.PeerIdentity == caller && !r.Timestamp.Before(since) {
				return r, nil
			}
		}
		if !s.records.waitMore(ctx, len(all), deadline) {
			return telemetry.Record{}, fmt.Errorf("%w of back's proxies of a caller %q", errNoRecord, caller)
		}
	}
}
