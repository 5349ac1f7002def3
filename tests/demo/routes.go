package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	"github.com/weirmesh/weir/agent/telemetry"
)

// routeFile is a route of the Gateway API for calls to back: whoever asks for version
// 2 gets it, of the rest one in ten; what fails is tried again.
var routeFile = map[string]any{
	"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
	"metadata": map[string]string{"namespace": namespace, "name": "back"},
	"spec": map[string]any{
		"parentRefs": []any{map[string]any{"group": "", "kind": "Service", "name": back.Name, "port": back.Port}},
		"rules": []any{
			map[string]any{
				"matches":     []any{map[string]any{"headers": []any{map[string]string{"name": versionField, "value": "2"}}}},
				"backendRefs": []any{map[string]any{"name": backV2.Name, "port": backV2.Port}},
			},
			map[string]any{
				"backendRefs": []any{
					map[string]any{"name": back.Name, "port": back.Port, "weight": 90},
					map[string]any{"name": backV2.Name, "port": backV2.Port, "weight": 10},
				},
				"retry": map[string]any{"attempts": 2, "codes": []int{http.StatusServiceUnavailable}, "backoff": "1ms"},
			},
		},
	},
}

const (
	// routeTimeout is how long a route may take from its file to the proxies.
	routeTimeout = 2 * time.Second
	// askedFor are requests for version 2, split those that are split: that none
	// of them goes one of the ways is 1 in 37,000.
	askedFor, split = 5, 100
	// ejecting are enough requests to have a replica set aside that fails five times.
	ejecting, afterwards = 40, 20
)

// routes puts the route in place, and shows that front's proxy obeys it; then has a
// replica of back fail, and shows that no request does.
func (s *stage) routes(ctx context.Context, ingress netip.AddrPort, out *printer) error {
	if err := s.node.Write("route.yaml", routeFile); err != nil {
		return err
	}
	began := time.Now()
	for {
		calls, err := s.callsToBack(ctx, ingress, 1, "2")
		if err != nil {
			return fmt.Errorf("with the route: %w", err)
		}
		if calls[0].UpstreamPod == namespace+"/back-v2" {
			break
		}
		if time.Since(began) > routeTimeout {
			return fmt.Errorf("a call for version 2 went to %s, %s after the route was written", calls[0].UpstreamPod, routeTimeout)
		}
	}
	out.title("An HTTPRoute for calls to back: version 2 for who asks for it, else 90 to 10")
	if err := s.asked(ctx, ingress, out); err != nil {
		return err
	}
	return s.failing(ctx, ingress, out)
}

// asked shows where requests go, with and without the header field.
func (s *stage) asked(ctx context.Context, ingress netip.AddrPort, out *printer) error {
	for _, part := range []struct {
		label, version string
		n              int
		want           func(picks map[string]int) bool
	}{
		{"asked for", "2", askedFor, func(p map[string]int) bool { return p[namespace+"/back-v2"] == askedFor }},
		{"split", "", split, func(p map[string]int) bool { return len(p) == 3 }},
	} {
		calls, err := s.callsToBack(ctx, ingress, part.n, part.version)
		if err != nil {
			return err
		}
		picks := picked(calls)
		if !part.want(picks) {
			return fmt.Errorf("%d requests with version %q went to %v", part.n, part.version, picks)
		}
		out.fact(part.label, "%d requests by %s: %s", part.n, calls[0].Route, counted(picks))
	}
	out.line("")
	return nil
}

// failing has a replica answer 503 to everything.
func (s *stage) failing(ctx context.Context, ingress netip.AddrPort, out *printer) error {
	broken := s.pods["back-2"]
	local := map[bool]string{false: "127.0.0.1", true: "::1"}[s.v6] // past any proxy
	if a := s.getFrom(ctx, broken, netip.AddrPortFrom(netip.MustParseAddr(local), appPort), failPath); a.status != http.StatusServiceUnavailable {
		return fmt.Errorf("%s is to fail: %s", broken.ID(), a)
	}
	out.title("A replica of back fails: " + broken.ID() + " answers 503 from now on")
	calls, err := s.callsToBack(ctx, ingress, ejecting, "")
	if err != nil {
		return err
	}
	again := 0
	for _, c := range calls {
		if c.Attempts > 1 {
			again++
		}
	}
	if again == 0 {
		return errors.New("no call was tried again")
	}
	out.fact("retried", "all of %d requests answered: front's proxy tried %d of them again, elsewhere", ejecting, again)
	if calls, err = s.callsToBack(ctx, ingress, afterwards, ""); err != nil {
		return err
	}
	for _, c := range calls {
		if c.Attempts > 1 || c.UpstreamPod == broken.ID() {
			return fmt.Errorf("a call still went to %s first", broken.ID())
		}
	}
	out.fact("ejected", "it is set aside: of %d more requests none went there", afterwards)
	out.line("")
	return nil
}

// callsToBack sends requests, and returns the records of front's calls to back.
func (s *stage) callsToBack(ctx context.Context, ingress netip.AddrPort, n int, version string) ([]telemetry.Record, error) {
	seen := len(s.records.all())
	for i := range n {
		if r := request(ctx, ingress, version); r.err != nil {
			return nil, fmt.Errorf("request %d of %d: %w", i+1, n, r.err)
		}
	}
	deadline := time.Now().Add(recordTimeout)
	for {
		all := s.records.all()
		var calls []telemetry.Record
		for _, r := range all[seen:] {
			if r.Service == back.Namespace+"/"+back.Name && r.Direction == outbound && r.HTTP != nil {
				calls = append(calls, r)
			}
		}
		switch {
		case len(calls) >= n:
			return calls, nil
		case !s.records.waitMore(ctx, len(all), deadline):
			return nil, fmt.Errorf("of %d requests only %d have a record of front's call to back", n, len(calls))
		}
	}
}

// picked counts calls by the pod that they went to.
func picked(calls []telemetry.Record) map[string]int {
	picks := map[string]int{}
	for _, c := range calls {
		picks[c.UpstreamPod]++
	}
	return picks
}
