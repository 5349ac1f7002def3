package relay

import (
	"bufio"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/route"
)

// TestEachCallerOfTheApplicationIsCounted by itself, over all its connections; who
// asks too much is told when to come back.
func TestEachCallerOfTheApplicationIsCounted(t *testing.T) {
	app := serving2(t, func(http.ResponseWriter, *http.Request) {})
	b := newBench(t, &fakeConfig{inbound: &route.Policy{Name: "shop/back", RateLimit: &route.RateLimit{Requests: 2, Per: time.Minute, PerClient: true}}})
	ask := func(caller string) *http.Response {
		client := b.connOf(t, listen.Inbound, netip.MustParseAddr(caller), app)
		defer client.Close()
		resp, _ := say(t, client, bufio.NewReader(client), hello, "GET")
		return resp
	}
	for _, caller := range []string{"10.244.0.9", "10.244.0.10", "fd00::9"} {
		for i := range 4 {
			resp := ask(caller)
			if i < 2 && resp.StatusCode == 200 {
				continue
			}
			if i < 2 || resp.StatusCode != 429 || resp.Header.Get("Retry-After") != "30" || !strings.Contains(resp.Header.Get("Proxy-Status"), "by TrafficPolicy shop/back, for each caller") {
				t.Errorf("number %d of %s: %v", i, caller, resp)
			}
		}
	}
	client := b.client2(t, listen.Inbound, app, 0)
	for i, want := range []int{200, 200, 429} {
		if resp, _ := call(t, client, "GET", "/", ""); resp.StatusCode != want {
			t.Errorf("stream %d: %v", i, resp)
		}
	}
	refused := 0
	for _, r := range b.ended(t) {
		if r.Reason == "rate_limited" {
			refused++
		}
	}
	if refused != 7 {
		t.Errorf("%d records say that they are refused", refused)
	}
}

// TestCallersOfOneIdentityAreCountedTogether, whatever their addresses and whatever they
// say; who has shown none is its address.
func TestCallersOfOneIdentityAreCountedTogether(t *testing.T) {
	app := serving2(t, func(http.ResponseWriter, *http.Request) {})
	b := newBench(t, &fakeConfig{inbound: &route.Policy{Name: "shop/back", RateLimit: &route.RateLimit{Requests: 2, Per: time.Minute, PerClient: true, ByIdentity: true}}})
	for _, c := range []struct {
		identity, address string
		want              int
	}{
		{frontID, "10.244.0.9", 200},
		{frontID, "10.244.0.10", 200},
		{frontID, "10.244.0.11", 429},
		{backID, "10.244.0.9", 200},
		{"", "10.244.0.9", 200},
		{"", "10.244.0.9", 200},
		{"", "10.244.0.9", 429},
	} {
		b.identity = authz.ParseIdentity(c.identity)
		client := b.connOf(t, listen.Inbound, netip.MustParseAddr(c.address), app)
		resp, _ := say(t, client, bufio.NewReader(client), "GET / HTTP/1.1\r\nHost: back\r\nX-Forwarded-Client-Cert: URI="+backID+"\r\n\r\n", "GET")
		if resp.StatusCode != c.want {
			t.Errorf("%+v: %v", c, resp.Status)
		}
		client.Close()
	}
	b.ended(t)
}
