package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/telemetry"
	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/tests/pod"
)

// whole is the trace of a request that went well.
func whole() trace {
	start := time.Unix(1000, 0)
	at := func(millis int) time.Time { return start.Add(time.Duration(millis) * time.Millisecond) }
	in := func(podID, client, server, caller, policy string, from, total int) telemetry.Record {
		return telemetry.Record{
			PeerIdentity: caller, Policy: policy,
			Timestamp: at(from), Direction: inbound, Pod: podID, Client: client, Server: server,
			Upstream: server, UpstreamLocal: "10.0.0.9:9", Sent: 1, Received: 1, TimeTotal: float64(total) / 1000,
		}
	}
	out := func(podID, service, chosen, local, upstream string, from, total int) telemetry.Record {
		return telemetry.Record{
			PeerIdentity: identity(chosen),
			Timestamp:    at(from), Direction: outbound, Pod: podID, Client: "10.0.0.9:8", Server: "10.96.0.1:80", Service: service,
			Upstream: upstream, UpstreamLocal: local, UpstreamPod: chosen, Sent: 1, Received: 1, TimeTotal: float64(total) / 1000,
		}
	}
	t := trace{
		request: answered{local: netip.MustParseAddrPort("10.0.0.1:1000"), status: 200, saw: map[string]string{
			"ingress": "", "front": "URI=" + identity("demo/ingress"), "back-2": "URI=" + identity("demo/front"),
		}},
		ingress:   netip.MustParseAddrPort("10.0.0.2:80"),
		before:    map[string]pod.Rules{},
		after:     map[string]pod.Rules{},
		endpoints: map[string]int{"demo/front": 1, "demo/back": 2},
		// In the order in which connections end.
		records: []telemetry.Record{
			in("demo/back-2", "10.0.0.3:3000", "10.0.0.5:8080", identity("demo/front"), "demo/back", 6, 2),
			out("demo/front", "demo/back", "demo/back-2", "10.0.0.3:3000", "10.0.0.5:8080", 5, 4),
			in("demo/front", "10.0.0.2:2000", "10.0.0.3:8080", identity("demo/ingress"), "demo/front", 3, 8),
			out("demo/ingress", "demo/front", "demo/front", "10.0.0.2:2000", "10.0.0.3:8080", 2, 10),
			in("demo/ingress", "10.0.0.1:1000", "10.0.0.2:80", "", "", 1, 12),
		},
	}
	rules := capture.Rules(capture.Spec{OutboundPort: 15001, InboundPort: 15006, Bypass: capture.Bypass{Path: "weir", ID: 1, Level: 1}}).String()
	for _, name := range podNames {
		zero, one := map[string]capture.Counter{}, map[string]capture.Counter{}
		for _, c := range counters {
			zero[c], one[c] = capture.Counter{Packets: 4}, capture.Counter{Packets: 5}
		}
		t.before[namespace+"/"+name] = pod.Rules{Backend: "nftables", Rules: rules, Counters: zero}
		t.after[namespace+"/"+name] = pod.Rules{Backend: "nftables", Rules: rules, Counters: one}
	}
	return t
}

func TestAWholeLifeHasSevenSteps(t *testing.T) {
	steps := life(whole())
	for _, s := range steps {
		if s.err != nil {
			t.Errorf("step %d: %v", s.number, s.err)
		}
	}
	if len(steps) != 7 {
		t.Errorf("%d steps", len(steps))
	}
}

func TestALifeEndsAtTheStepThatFailed(t *testing.T) {
	without := func(i int) func(*trace) {
		return func(t *trace) { t.records = append(t.records[:i:i], t.records[i+1:]...) }
	}
	uncounted := func(podID, counter string) func(*trace) {
		return func(t *trace) { t.after[podID].Counters[counter] = t.before[podID].Counters[counter] }
	}
	for _, test := range []struct {
		promise  string
		change   func(*trace)
		step     int
		want     string
		noRecord bool
	}{
		{"no record of the user's connection", without(4), 1, "no record of demo/ingress's proxy of a connection from 10.0.0.1:1000", true},
		{"no record of the call to front", without(3), 2, "no record of demo/ingress's proxy of a call to demo/front", true},
		{"no record at front", without(2), 3, "no record of demo/front's proxy of a connection from 10.0.0.2:2000", true},
		{"no record of the call to back", without(1), 5, "no record of demo/front's proxy of a call to demo/back", true},
		{"no record at back", without(0), 6, "no record of demo/back-2's proxy of a connection from 10.0.0.3:3000", true},
		{"ingress takes nothing in", uncounted("demo/ingress", capture.InTurned), 1, "still 4", false},
		{"front's call is not turned aside", uncounted("demo/front", capture.OutTurned), 5, "still 4", false},
		{"front's proxy's call is not let by", uncounted("demo/front", capture.OutOwn), 6, "still 4", false},
		{"the chosen replica takes nothing in", uncounted("demo/back-2", capture.InTurned), 6, "still 4", false},
		{"a rule is gone", func(t *trace) {
			r := t.after["demo/front"]
			r.Rules = strings.ReplaceAll(r.Rules, capture.InTurned, "other")
			t.after["demo/front"] = r
		}, 3, "demo/front has no rule that steps the counter in_turned", false},
		{"a connection came for another destination", func(t *trace) { t.records[2].Server = "10.0.0.7:1" }, 3, "it was to 10.0.0.3:8080", false},
		{"a call to back that another request made", func(t *trace) { t.records[1].Timestamp = time.Unix(2000, 0) }, 5, "no record", true},
		{"no endpoint was chosen", func(t *trace) {
			t.records[1].UpstreamPod, t.records[1].Reason, t.records[1].Detail = "", "no_endpoints", "no ready pod"
		}, 5, "the proxy chose no endpoint: no_endpoints: no ready pod", false},
		{"front came in plaintext", func(t *trace) { t.records[0].PeerIdentity = "" }, 6, `the caller has shown the identity ""; it is spiffe://cluster.local/ns/demo/sa/front`, false},
		{"somebody answered for back", func(t *trace) { t.records[1].PeerIdentity = identity("demo/front") }, 6, "the callee has shown the identity \"spiffe://cluster.local/ns/demo/sa/front\"", false},
		{"the ingress may not call front", func(t *trace) {
			t.records[2].Reason, t.records[2].Detail = policyDenied, "no policy allowed it"
		}, 3, "policy_denied: no policy allowed it", false},
		{"no policy decided", func(t *trace) { t.records[0].Policy = "" }, 6, "names no AuthorizationPolicy", false},
		{"front was not told who calls", func(t *trace) { delete(t.request.saw, "front") }, 4, `saw X-Forwarded-Client-Cert: ""`, false},
		{"the application refused", func(t *trace) { t.records[0].Reason, t.records[0].Detail = "connect_refused", "closed" }, 7, "connect_refused: closed", false},
		{"front's application got nothing", func(t *trace) { t.records[2].Sent = 0 }, 4, "passed 0 bytes on", false},
		{"the user got an error", func(t *trace) { t.request.err = errors.New("502") }, 7, "502", false},
	} {
		t.Run(test.promise, func(t *testing.T) {
			tr := whole()
			test.change(&tr)
			steps := life(tr)
			last := steps[len(steps)-1]
			if last.number != test.step || last.err == nil || !strings.Contains(last.err.Error(), test.want) {
				t.Errorf("ends at step %d: %v; want step %d: %s", last.number, last.err, test.step, test.want)
			}
			if errors.Is(last.err, errNoRecord) != test.noRecord {
				t.Errorf("%v: is it a missing record? want %t", last.err, test.noRecord)
			}
		})
	}
}

func TestRecordsComeInPieces(t *testing.T) {
	r := newRecords()
	line := `{"weir.pod":"demo/front","client.address":"10.0.0.1:1"}` + "\n"
	for _, piece := range []string{line[:10], line[10:] + line + line[:5], line[5:]} {
		if _, err := fmt.Fprint(r, piece); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(r.all()); n != 3 {
		t.Errorf("%d records", n)
	}
}
