package relay

import (
	"bufio"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/mtls/mtlstest"
	"github.com/weirmesh/weir/proxy/route"
)

func answering(t *testing.T) netip.AddrPort {
	return serving2(t, func(http.ResponseWriter, *http.Request) {})
}

// callers call a Service once, on a connection of their own, and report whether they were
// served by its application, which app is.
var callers = []struct {
	name     string
	protocol route.Protocol
	app      func(t *testing.T) netip.AddrPort
	call     func(t *testing.T, b *bench) bool
}{
	{"HTTP/1", route.HTTP, answering, func(t *testing.T, b *bench) bool {
		client := b.conn(t, listen.Outbound, vip)
		defer client.Close()
		resp, _ := say(t, client, bufio.NewReader(client), hello, "GET")
		return resp.StatusCode == 200
	}},
	{"HTTP/2", route.HTTP2, answering, func(t *testing.T, b *bench) bool {
		client := b.client2(t, listen.Outbound, vip, 0)
		resp, _ := call(t, client, "GET", "/", "")
		client.CloseIdleConnections()
		return resp.StatusCode == 200
	}},
	{"TCP", route.Opaque, func(t *testing.T) netip.AddrPort { return echoing(t) }, func(t *testing.T, b *bench) bool {
		client := b.conn(t, listen.Outbound, vip)
		defer client.Close()
		_, _ = io.WriteString(client, "hello")
		_ = client.CloseWrite()
		got, err := io.ReadAll(client)
		return err == nil && string(got) == "hello"
	}},
}

// failures are how many attempts were counted, by their reason, of the Service's
// endpoints.
func failures(t *testing.T, metrics *proxypb.Metrics) map[string]uint64 {
	t.Helper()
	out := map[string]uint64{}
	for _, x := range metrics.GetFailures() {
		if p := x.GetPeers(); p.GetDirection() != proxypb.Direction_OUTBOUND || p.GetService() != "shop/back" || p.GetOther() {
			t.Errorf("counted of %v", p)
		}
		out[x.GetReason()] += x.GetCount()
	}
	return out
}

// mistrusting is an identity which believes nobody that our CA has signed for.
func mistrusting(t *testing.T, ca *mtlstest.CA) *mtls.Identity {
	t.Helper()
	id := ca.Identity(backID, nil)
	id.Roots = mtlstest.NewCA(t).Identity(backID, nil).Roots
	return id
}

// TestAnAttemptThatFailsIsCountedThoughAnotherOneServes: nothing else tells the caller's
// side of it.
func TestAnAttemptThatFailsIsCountedThoughAnotherOneServes(t *testing.T) {
	ca := mtlstest.NewCA(t)
	for _, c := range callers {
		app := c.app(t)
		for why, id := range map[string]*mtls.Identity{
			"peer_identity": ca.Identity(frontID, nil),
			"tls_refused":   mistrusting(t, ca),
		} {
			if c.protocol == route.Opaque && why == "tls_refused" {
				continue // it is told once the bytes are on their way
			}
			t.Run(c.name+" "+why, func(t *testing.T) {
				bad, good := newFar(t, id, route.Strict, app), newFar(t, ca.Identity(backID, nil), route.Strict, app)
				b := newNear(t, ca.Identity(frontID, nil), c.protocol, bad.addr, good.addr)
				meter := b.metered()
				for n := 0; bad.accepted.Load() == 0; n++ {
					if n == 100 {
						t.Fatal("nobody chose the endpoint that fails")
					}
					if !c.call(t, b) {
						t.Error("a request failed")
					}
				}
				for _, r := range b.ended(t) {
					if r.Reason != "" || r.Error != "" {
						t.Errorf("record %v", r)
					}
				}
				if diff := cmp.Diff(map[string]uint64{why: 1}, failures(t, meter.Last())); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
}

// TestWhereAllAttemptsFailTheRecordSaysWhyEachDid, and all are counted.
func TestWhereAllAttemptsFailTheRecordSaysWhyEachDid(t *testing.T) {
	ca := mtlstest.NewCA(t)
	for _, c := range callers {
		app := c.app(t)
		for other, id := range map[string]*mtls.Identity{
			"cert_untrusted": mtlstest.NewCA(t).Identity(backID, nil),
			"tls_refused":    mistrusting(t, ca),
		} {
			if c.protocol == route.Opaque && other == "tls_refused" {
				continue
			}
			t.Run(c.name+" "+other, func(t *testing.T) {
				one, two := newFar(t, ca.Identity(frontID, nil), route.Strict, app), newFar(t, id, route.Strict, app)
				b := newNear(t, ca.Identity(frontID, nil), c.protocol, one.addr, two.addr)
				meter := b.metered()
				if c.call(t, b) {
					t.Error("the request was served")
				}
				records := b.ended(t)
				if len(records) != 1 {
					t.Fatalf("records %v", records)
				}
				last, first := records[0].Reason, "peer_identity"
				if last == first {
					first = other
				} else if last != other {
					t.Errorf("the reason is %q", last)
				}
				if text := records[0].Error; !strings.Contains(text, "; before that, at 127.0.0.1:") ||
					!strings.Contains(text, ": "+first+": ") || strings.Contains(text, ": "+last+": ") {
					t.Errorf("%q, not a word of %s", text, first)
				}
				if diff := cmp.Diff(map[string]uint64{"peer_identity": 1, other: 1}, failures(t, meter.Last())); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
}

// TestAConnectionThatItsEndpointRefusesIsCounted: what is not HTTP is tried nowhere else.
func TestAConnectionThatItsEndpointRefusesIsCounted(t *testing.T) {
	ca := mtlstest.NewCA(t)
	far := newFar(t, mistrusting(t, ca), route.Strict, echoing(t))
	b := newNear(t, ca.Identity(frontID, nil), route.Opaque, far.addr)
	meter := b.metered()
	client := b.conn(t, listen.Outbound, vip) // it waits for its server to speak
	if _, err := client.Read(make([]byte, 1)); err == nil {
		t.Error("something was read")
	}
	if records := b.ended(t); len(records) != 1 || records[0].Reason != "tls_refused" || strings.Contains(records[0].Error, "before that") {
		t.Errorf("records %v", records)
	}
	if diff := cmp.Diff(map[string]uint64{"tls_refused": 1}, failures(t, meter.Last())); diff != "" {
		t.Error(diff)
	}
}

// TestWhatIsThisProxysOwnFaultIsNoEndpoints.
func TestWhatIsThisProxysOwnFaultIsNoEndpoints(t *testing.T) {
	ca := mtlstest.NewCA(t)
	for _, c := range callers {
		app := c.app(t)
		far := newFar(t, ca.Identity(backID, nil), route.Strict, app)
		b := newNear(t, ca.Identity(frontID, expired), c.protocol, far.addr)
		meter := b.metered()
		if c.call(t, b) {
			t.Errorf("%s: it was served", c.name)
		}
		if records := b.ended(t); len(records) != 1 || records[0].Reason != "cert_expired" {
			t.Errorf("%s: records %v", c.name, records)
		}
		if got := meter.Last().GetFailures(); len(got) > 0 {
			t.Errorf("%s: counted %v", c.name, got)
		}
	}
}
