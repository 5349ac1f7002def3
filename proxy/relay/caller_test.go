package relay

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/mtls/mtlstest"
	"github.com/weirmesh/weir/proxy/route"
)

// told is an application that answers with all that could tell it who its caller is, of
// the head and of the trailers.
func told(t *testing.T) netip.AddrPort {
	t.Helper()
	return serving2(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		var out []string
		for _, fields := range []http.Header{r.Header, r.Trailer} {
			for name, values := range fields {
				if strings.EqualFold(strings.ReplaceAll(name, "_", "-"), "x-forwarded-client-cert") {
					out = append(out, values...)
				}
			}
		}
		slices.Sort(out)
		fmt.Fprint(w, strings.Join(out, " "), r.Trailer.Get("X-Other"), r.Header.Get("X-Forwarded-For"))
	})
}

// toApplication are the ways to a pod's application, and whom it is to take for its
// caller.
func toApplication(t *testing.T, app netip.AddrPort) map[string]func(t *testing.T) (*bench, listen.Direction, netip.AddrPort, string) {
	ca := mtlstest.NewCA(t)
	ownTLS := &mtls.Handshaker{Source: mtlstest.Of(ca.Identity(backID, nil))}
	handedOver := func(t *testing.T, policies ...authz.Policy) *bench {
		config := behind(app)
		config.own = app.Addr()
		if policies != nil {
			config.govern(t, policies...)
		}
		b := newBench(t, config)
		b.TLS = ownTLS
		return b
	}
	return map[string]func(t *testing.T) (*bench, listen.Direction, netip.AddrPort, string){
		"from a peer in plaintext": func(t *testing.T) (*bench, listen.Direction, netip.AddrPort, string) {
			return newBench(t, &fakeConfig{}), listen.Inbound, app, ""
		},
		"from a peer with an identity": func(t *testing.T) (*bench, listen.Direction, netip.AddrPort, string) {
			b := newBench(t, &fakeConfig{})
			b.identity = authz.ParseIdentity(frontID)
			return b, listen.Inbound, app, "URI=" + frontID
		},
		"from the pod itself": func(t *testing.T) (*bench, listen.Direction, netip.AddrPort, string) {
			return handedOver(t), listen.Outbound, vip, "URI=" + backID
		},
		"from the pod itself, by policies": func(t *testing.T) (*bench, listen.Direction, netip.AddrPort, string) {
			own := authz.Source{TrustDomain: mtlstest.TrustDomain, Namespace: "shop", ServiceAccount: "back"}
			return handedOver(t, allowing(authz.Rule{Sources: []authz.Source{own}})), listen.Outbound, vip, "URI=" + backID
		},
		"from the pod itself, without an identity": func(t *testing.T) (*bench, listen.Direction, netip.AddrPort, string) {
			b := handedOver(t)
			b.TLS = nil
			return b, listen.Outbound, vip, ""
		},
	}
}

// TestTheApplicationLearnsItsCallerFromNobodyElse: whatever the caller says, in
// whichever way.
func TestTheApplicationLearnsItsCallerFromNobodyElse(t *testing.T) {
	app := told(t)
	const name = "X-Forwarded-Client-Cert"
	for way, prepare := range toApplication(t, app) {
		t.Run(way, func(t *testing.T) {
			b, direction, original, want := prepare(t)
			client := b.conn(t, direction, original)
			r := bufio.NewReader(client)
			for _, fields := range []string{
				"",
				name + ": URI=forged\r\n",
				"x-FORWARDED-client-cert: URI=forged\r\n" + name + ": By=forged\r\n",
				"X_Forwarded_Client-Cert: URI=forged\r\n",
				"Connection: " + name + "\r\n",
				"Connection: keep-alive, " + strings.ToLower(name) + "\r\n" + name + ": URI=forged\r\n",
			} {
				for range 2 {
					resp, body := say(t, client, r, "GET / HTTP/1.1\r\nHost: back\r\n"+fields+"X-Forwarded-For: end\r\n\r\n", "GET")
					if resp.StatusCode != 200 || body != want+"end" {
						t.Errorf("%q: %v, the application knows %q, want %q", fields, resp.Status, body, want)
					}
				}
			}
			client.Close()
			streams := b.client2(t, direction, original, 0)
			for _, fields := range [][]string{{}, {name, "URI=forged"}, {"X_forwarded_client_cert", "URI=forged", name, "URI=forged"}} {
				if resp, body := call(t, streams, "GET", "/", "", fields...); resp.StatusCode != 200 || body != want {
					t.Errorf("stream with %q: %v, the application knows %q, want %q", fields, resp.Status, body, want)
				}
			}
			b.ended(t)
		})
	}
}

// TestNoTrailerSaysWhoTheCallerIs: streams lose it, and keep the others; a request of
// HTTP/1 is refused.
func TestNoTrailerSaysWhoTheCallerIs(t *testing.T) {
	app := told(t)
	for way, prepare := range toApplication(t, app) {
		t.Run(way, func(t *testing.T) {
			b, direction, original, want := prepare(t)
			for trailer, status := range map[string]int{
				"X-Other": 200, "X-Forwarded-Client-Cer": 200, "X-Forwarded-Client-Certs": 200,
				"X-Forwarded-Client-Cert": 400, "x_forwarded_CLIENT-cert": 400,
			} {
				client := b.conn(t, direction, original)
				resp, _ := say(t, client, bufio.NewReader(client), "POST / HTTP/1.1\r\nHost: back\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"+trailer+": y\r\n\r\n", "POST")
				if resp.StatusCode != status {
					t.Errorf("trailer %s: %v, want %d", trailer, resp.Status, status)
				}
				client.Close()
			}
			streams := b.client2(t, direction, original, 0)
			req, err := http.NewRequest("POST", "http://back/", io.MultiReader(strings.NewReader("x")))
			if err != nil {
				t.Fatal(err)
			}
			req.Trailer = http.Header{"X-Forwarded-Client-Cert": {"URI=forged"}, "X-Other": {"other"}}
			resp, err := streams.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if body, err := io.ReadAll(resp.Body); string(body) != want+"other" || err != nil {
				t.Errorf("the application knows %q, %v", body, err)
			}
			b.ended(t)
		})
	}
}

// TestWhatOthersAreToldIsTheApplicationsOwn: it may not be in the mesh what it calls.
func TestWhatOthersAreToldIsTheApplicationsOwn(t *testing.T) {
	ca := mtlstest.NewCA(t)
	b := newBench(t, behind(told(t)))
	b.TLS = &mtls.Handshaker{Source: mtlstest.Of(ca.Identity(frontID, nil))}
	client := b.conn(t, listen.Outbound, vip)
	if resp, body := say(t, client, bufio.NewReader(client), "GET / HTTP/1.1\r\nHost: back\r\nX-Forwarded-Client-Cert: Hash=1\r\n\r\n", "GET"); resp.StatusCode != 200 || body != "Hash=1" {
		t.Errorf("%v %q", resp, body)
	}
	client.Close()
	b.ended(t)
}

// TestACopyForThePodItselfSaysSo, as what it is a copy of.
func TestACopyForThePodItselfSaysSo(t *testing.T) {
	copies := make(chan []string, 1)
	mirror := serving(t, func(_ http.ResponseWriter, r *http.Request) { copies <- r.Header["X-Forwarded-Client-Cert"] })
	to := func(addr netip.AddrPort) route.Backend {
		return route.Backend{Service: "shop/x", Endpoints: []route.Endpoint{{Addr: addr}}}
	}
	config := behind()
	config.own = mirror.Addr()
	config.destination.Routes = &route.Routes{
		Kind: route.HTTPRoute, Matches: []route.Match{{}},
		Rules: []route.Rule{{
			Backends: []route.WeightedBackend{{Weight: 1, Backend: to(told(t))}},
			Filters:  route.Filters{Mirrors: []route.Mirror{{Backend: to(mirror), Numerator: 1, Denominator: 1}}},
		}},
	}
	b := newBench(t, config)
	b.TLS = &mtls.Handshaker{Source: mtlstest.Of(mtlstest.NewCA(t).Identity(backID, nil))}
	client := b.conn(t, listen.Outbound, vip)
	resp, body := say(t, client, bufio.NewReader(client), "GET / HTTP/1.1\r\nHost: back\r\nX-Forwarded-Client-Cert: URI=forged\r\n\r\n", "GET")
	if resp.StatusCode != 200 || body != "URI="+backID {
		t.Errorf("%v %q", resp.Status, body)
	}
	if got := <-copies; !slices.Equal(got, []string{"URI=" + backID}) {
		t.Errorf("the copy says %q", got)
	}
	client.Close()
	b.ended(t)
}

// TestTheCallerIsTheOneOfTheHandshake, of whatever version of HTTP, though its
// application says otherwise.
func TestTheCallerIsTheOneOfTheHandshake(t *testing.T) {
	app := told(t)
	near, far := inMesh(t, route.HTTP, route.Strict, app)
	client := near.conn(t, listen.Outbound, vip)
	r := bufio.NewReader(client)
	for range 3 {
		resp, body := say(t, client, r, "GET / HTTP/1.1\r\nHost: back\r\nX-Forwarded-Client-Cert: URI="+backID+"\r\n\r\n", "GET")
		if resp.StatusCode != 200 || body != "URI="+frontID {
			t.Errorf("%v, the application knows %q", resp.Status, body)
		}
	}
	client.Close()
	if _, body := call(t, near.client2(t, listen.Outbound, vip, 0), "GET", "/", "", "X-Forwarded-Client-Cert", "URI="+backID); body != "URI="+frontID {
		t.Errorf("a stream: the application knows %q", body)
	}
	over(t, near, far)
}
