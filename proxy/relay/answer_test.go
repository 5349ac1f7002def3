package relay

import (
	"bufio"
	"fmt"
	"net/http"
	"testing"

	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/route"
)

// TestARoutesAnswersAreTheSameWhoeverGivesThem: what the proxy answers in place of an
// endpoint has the header fields of the route's filters, too; but a preflight is
// answered as CORS says, and nothing else.
func TestARoutesAnswersAreTheSameWhoeverGivesThem(t *testing.T) {
	config := behind(serving2(t, func(http.ResponseWriter, *http.Request) {}))
	filters := route.Filters{
		ResponseHeaders: &route.HeaderChange{
			Set: []route.Header{{Name: "x-team", Value: "shop"}, {Name: "content-length", Value: "9"}}, Remove: []string{"server"},
		},
		CORS: &route.CORS{AllowOrigins: []string{"https://shop.example"}, AllowMethods: []string{"GET"}},
	}
	redirect := filters
	redirect.Redirect = &route.Redirect{Path: &route.PathChange{Value: "/new"}, Status: 302}
	exact := func(path string, rule int) route.Match {
		return route.Match{Rule: rule, Path: route.Path{Kind: route.PathExact, Value: path}}
	}
	config.destination.Routes = &route.Routes{
		Kind:    route.HTTPRoute,
		Matches: []route.Match{exact("/app", 0), exact("/old", 1), exact("/nobody", 2)},
		Rules: []route.Rule{
			{Filters: filters, Backends: []route.WeightedBackend{{Weight: 1, Backend: config.destination.Backend()}}},
			{Filters: redirect},
			{Filters: filters, Backends: []route.WeightedBackend{{Weight: 1, Backend: route.Backend{Service: "shop/empty"}}}},
		},
	}
	for _, c := range []struct {
		method, path string
		status       int
		team         string
		fields       []string
	}{
		{"GET", "/app", 200, "shop", nil},
		{"GET", "/old", 302, "shop", nil},
		{"GET", "/nobody", 503, "shop", nil},
		{"OPTIONS", "/app", 204, "", []string{"Access-Control-Request-Method", "GET"}},
		{"OPTIONS", "/old", 204, "", []string{"Access-Control-Request-Method", "GET"}},
	} {
		for _, version := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s %s, HTTP/%d", c.method, c.path, version), func(t *testing.T) {
				b := newBench(t, config)
				fields := append([]string{"Origin", "https://shop.example"}, c.fields...)
				var resp *http.Response
				if version == 1 {
					client := b.conn(t, listen.Outbound, vip)
					defer client.Close()
					text := c.method + " " + c.path + " HTTP/1.1\r\nHost: back\r\n"
					for i := 0; i < len(fields); i += 2 {
						text += fields[i] + ": " + fields[i+1] + "\r\n"
					}
					resp, _ = say(t, client, bufio.NewReader(client), text+"\r\n", c.method)
				} else {
					resp, _ = call(t, b.client2(t, listen.Outbound, vip, 0), c.method, c.path, "", fields...)
				}
				h := resp.Header
				if resp.StatusCode != c.status || h.Get("X-Team") != c.team || h.Get("Access-Control-Allow-Origin") != "https://shop.example" {
					t.Errorf("%v", resp)
				}
				if location := h.Get("Location"); (c.status == 302) != (location == "http://back/new") {
					t.Errorf("location %q", location)
				}
			})
		}
	}
}
