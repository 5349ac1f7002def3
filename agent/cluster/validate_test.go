package cluster

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestRoutesThatAnAPIServerWouldRefuse has one mistake in each route, and beside it
// the nearest value that is none: those rules of the CRDs that a typed decoder does
// not enforce by itself.
func TestRoutesThatAnAPIServerWouldRefuse(t *testing.T) {
	service := `group: "", kind: Service, name: back`
	names := func(n int) string {
		var out []string
		for i := range n {
			out = append(out, fmt.Sprintf("{name: h%d, value: v}", i))
		}
		return strings.Join(out, ", ")
	}
	rules := func(n int, matches string) string {
		return "rules: [" + strings.TrimSuffix(strings.Repeat("{"+matches+"},", n), ",") + "]"
	}
	match := func(m string) string { return "rules: [{matches: [{" + m + "}]}]" }
	filter := func(f string) string { return "rules: [{filters: [{" + f + "}]}]" }
	backend := func(b string) string { return "rules: [{backendRefs: [{" + b + "}]}]" }
	const http, grpc, tcp = "HTTPRoute", "GRPCRoute", "TCPRoute"
	tests := []struct {
		kind, good, bad, want string
	}{
		{http, "parentRefs: [{" + service + "}]", `parentRefs: [{kind: Service, group: ""}]`, "spec.parentRefs[0].name: is missing"},
		{http, "parentRefs: [{" + service + ", port: 80}]", "parentRefs: [{" + service + ", port: 0}]", "spec.parentRefs[0].port: 0 is not between 1 and 65535"},
		{http, "parentRefs: [{" + service + ", namespace: a-b}]", "parentRefs: [{" + service + ", namespace: a.b}]", `spec.parentRefs[0].namespace: "a.b" does not match ^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`},
		{http, "parentRefs: [{" + service + ", port: 80}, {" + service + ", port: 90}]", "parentRefs: [{" + service + ", port: 80}, {" + service + "}]", "spec.parentRefs[1]: another parentRef to back does not set the same of sectionName and port"},
		{http, "parentRefs: [{" + service + "}, {" + service + ", namespace: lab}]", "parentRefs: [{" + service + "}, {" + service + ", namespace: shop}]", "spec.parentRefs[1]: another parentRef to back is equal"},
		{http, "hostnames: ['*.example.com']", "hostnames: ['a.*.com']", `spec.hostnames[0]: "a.*.com" does not match ^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`},
		{http, rules(16, ""), rules(17, ""), "spec.rules: 17 are more than 16"},
		{http, rules(16, "matches: [{},{},{},{},{},{},{},{}]"), rules(16, "matches: [{},{},{},{},{},{},{},{},{}]"), "spec.rules: matches: 144 are more than 128"},
		{http, "rules: [{name: a}, {name: b}]", "rules: [{name: a}, {name: a}]", `spec.rules[1].name: "a" is another rule's, too`},
		{http, match("path: {value: /a}"), match("path: {value: a}"), `spec.rules[0].matches[0].path.value: "a" does not begin with "/"`},
		{http, match("path: {type: RegularExpression, value: a//b}"), match("path: {value: /a//b}"), `spec.rules[0].matches[0].path.value: "/a//b" contains "//"`},
		{http, match("path: {type: Exact, value: /a/.b}"), match("path: {type: Exact, value: /a/..}"), `spec.rules[0].matches[0].path.value: "/a/.." ends with "/.."`},
		{http, match("path: {value: /%2e}"), match("path: {value: /%2f}"), `spec.rules[0].matches[0].path.value: "/%2f" contains "%2f"`},
		{http, match("path: {value: /~a}"), match("path: {value: '/a b'}"), `spec.rules[0].matches[0].path.value: "/a b" does not match ^(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|[%][0-9a-fA-F]{2})+$`},
		{http, match("path: {type: Exact}"), match("path: {type: exact}"), "spec.rules[0].matches[0].path.type: exact is none of [Exact PathPrefix RegularExpression]"},
		{http, match("method: GET"), match("method: get"), "spec.rules[0].matches[0].method: get is none of [GET HEAD POST PUT DELETE CONNECT OPTIONS TRACE PATCH]"},
		{http, match("headers: [" + names(16) + "]"), match("headers: [" + names(17) + "]"), "spec.rules[0].matches[0].headers: 17 are more than 16"},
		{http, match("headers: [{name: a, value: b}, {name: A, value: b}]"), match("headers: [{name: a, value: b}, {name: a, value: c}]"), "spec.rules[0].matches[0].headers[1]: a is there twice"},
		{http, match("headers: [{name: a, value: b}]"), match("headers: [{name: ':a', value: b}]"), "spec.rules[0].matches[0].headers[0].name: \":a\" does not match ^[A-Za-z0-9!#$%&'*+\\-.^_`|~]+$"},
		{http, match("queryParams: [{name: a, value: b}]"), match("queryParams: [{name: a}]"), "spec.rules[0].matches[0].queryParams[0].value: is missing"},
		{http, match("queryParams: [{name: a, value: b, type: Exact}]"), match("queryParams: [{name: a, value: b, type: Prefix}]"), "spec.rules[0].matches[0].queryParams[0].type: Prefix is none of [Exact RegularExpression]"},
		{http, filter("type: URLRewrite, urlRewrite: {hostname: a.b}"), filter("type: URLRewrite"), "spec.rules[0].filters[0]: the body of type URLRewrite is missing"},
		{http, filter("type: CORS, cors: {}"), filter("type: CORS, cors: {}, urlRewrite: {}"), "spec.rules[0].filters[0]: has the body of type URLRewrite, and is of type CORS"},
		{http, filter("type: ExtensionRef, extensionRef: {group: a, kind: B, name: c}"), filter("type: Extension, extensionRef: {group: a, kind: B, name: c}"), "spec.rules[0].filters[0]: has the body of type ExtensionRef, and is of type Extension"},
		{http, filter("type: CORS, cors: {}"), filter("type: CORS, cors: {}}, {type: CORS, cors: {}"), "spec.rules[0].filters[1]: CORS is there twice"},
		{http, filter("type: RequestRedirect, requestRedirect: {}"), filter("type: RequestRedirect, requestRedirect: {}}, {type: URLRewrite, urlRewrite: {}"), "spec.rules[0].filters: RequestRedirect and URLRewrite exclude each other"},
		{http, filter("type: RequestRedirect, requestRedirect: {statusCode: 308}"), filter("type: RequestRedirect, requestRedirect: {statusCode: 304}"), "spec.rules[0].filters[0].requestRedirect.statusCode: 304 is none of [301 302 303 307 308]"},
		{http, filter("type: RequestRedirect, requestRedirect: {scheme: https}"), filter("type: RequestRedirect, requestRedirect: {scheme: ftp}"), "spec.rules[0].filters[0].requestRedirect.scheme: ftp is none of [http https]"},
		{http, filter("type: RequestRedirect, requestRedirect: {port: 1}"), filter("type: RequestRedirect, requestRedirect: {port: 65536}"), "spec.rules[0].filters[0].requestRedirect.port: 65536 is not between 1 and 65535"},
		{http, filter("type: URLRewrite, urlRewrite: {hostname: a.b}"), filter("type: URLRewrite, urlRewrite: {hostname: '*.b'}"), `spec.rules[0].filters[0].urlRewrite.hostname: "*.b" does not match ^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`},
		{http, filter("type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /a}}"), filter("type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replacePrefixMatch: /a}}"), "spec.rules[0].filters[0].urlRewrite.path: the body of type ReplaceFullPath is missing"},
		{http, "rules: [{matches: [{path: {value: /a}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]}]",
			"rules: [{matches: [{path: {type: Exact, value: /a}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]}]", "spec.rules[0].filters[0].urlRewrite.path: ReplacePrefixMatch needs a rule with one match, of type PathPrefix"},
		{http, filter("type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: b}], add: [{name: a, value: b}]}"), filter("type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: b}, {name: a, value: c}]}"), "spec.rules[0].filters[0].requestHeaderModifier.set[1]: a is there twice"},
		{http, filter("type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: b c}]}"), filter(`type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: "b\nc"}]}`), `spec.rules[0].filters[0].requestHeaderModifier.set[0].value: "b\nc" does not match ^[!-~]+([\t ]?[!-~]+)*$`},
		{http, filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, percent: 100}"), filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, percent: 101}"), "spec.rules[0].filters[0].requestMirror.percent: 101 is not between 0 and 100"},
		{http, filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, fraction: {numerator: 3, denominator: 3}}"), filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, fraction: {numerator: 4, denominator: 3}}"), "spec.rules[0].filters[0].requestMirror.fraction.numerator: 4 is not between 0 and 3"},
		{http, filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, percent: 1}"), filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, percent: 1, fraction: {numerator: 1}}"), "spec.rules[0].filters[0].requestMirror: percent and fraction exclude each other"},
		{http, filter("type: CORS, cors: {allowOrigins: ['https://*.a.b:80']}"), filter("type: CORS, cors: {allowOrigins: ['a.b']}"), `spec.rules[0].filters[0].cors.allowOrigins[0]: "a.b" does not match (^\*$)|(^(http(s)?):\/\/(((\*\.)?([a-zA-Z0-9\-]+\.)*[a-zA-Z0-9-]+|\*)(:([0-9]{1,5}))?)$)`},
		{http, filter("type: CORS, cors: {allowMethods: ['*']}"), filter("type: CORS, cors: {allowMethods: ['*', GET]}"), `spec.rules[0].filters[0].cors.allowMethods: "*" stands alone`},
		{http, filter("type: CORS, cors: {maxAge: 1}"), filter("type: CORS, cors: {maxAge: -1}"), "spec.rules[0].filters[0].cors.maxAge: -1 is less than 1"},
		{http, backend("name: a, port: 1"), backend("name: a"), "spec.rules[0].backendRefs[0].port: is missing: a Service is named with its port"},
		{http, backend("group: b.c, kind: D, name: a"), backend("group: b_c, kind: D, name: a"), `spec.rules[0].backendRefs[0].group: "b_c" does not match ^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`},
		{http, backend("name: a, port: 1, weight: 1000000"), backend("name: a, port: 1, weight: 1000001"), "spec.rules[0].backendRefs[0].weight: 1000001 is not between 0 and 1000000"},
		{http, "rules: [{filters: [{type: RequestRedirect, requestRedirect: {}}]}]", "rules: [{filters: [{type: RequestRedirect, requestRedirect: {}}], backendRefs: [{name: a, port: 1}]}]", "spec.rules[0]: RequestRedirect excludes backendRefs"},
		{http, "rules: [{timeouts: {request: 1h30m}}]", "rules: [{timeouts: {request: 1.5h}}]", `spec.rules[0].timeouts.request: "1.5h" does not match ^([0-9]{1,5}(h|m|s|ms)){1,4}$`},
		{http, "rules: [{timeouts: {request: 0s, backendRequest: 2s}}]", "rules: [{timeouts: {request: 1s, backendRequest: 2s}}]", "spec.rules[0].timeouts.backendRequest: 2s is longer than request, 1s"},
		{http, "rules: [{retry: {attempts: 1}}]", "rules: [{retry: {attempts: 0}}]", "spec.rules[0].retry.attempts: 0 is less than 1"},
		{http, "rules: [{retry: {codes: [429]}}]", "rules: [{retry: {codes: [200]}}]", "spec.rules[0].retry.codes[0]: 200 is not between 400 and 599"},
		{grpc, match("method: {service: a.b}"), match("method: {}"), "spec.rules[0].matches[0].method: neither service nor method is there"},
		{grpc, match("method: {service: a.b}"), match("method: {service: a/b}"), `spec.rules[0].matches[0].method.service: "a/b" does not match ^(?i)\.?[a-z_][a-z_0-9]*(\.[a-z_][a-z_0-9]*)*$`},
		{grpc, match("method: {method: Get, type: RegularExpression}"), match("method: {method: Get, type: Glob}"), "spec.rules[0].matches[0].method.type: Glob is none of [Exact RegularExpression]"},
		{grpc, match("headers: [{name: a, value: b}]"), match("headers: [{name: a}]"), "spec.rules[0].matches[0].headers[0].value: is missing"},
		{grpc, filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}}"), filter("type: CORS"), "spec.rules[0].filters[0].type: CORS is none of [RequestHeaderModifier ResponseHeaderModifier RequestMirror ExtensionRef]"},
		{grpc, backend("name: a, port: 1"), backend("name: a, port: 0"), "spec.rules[0].backendRefs[0].port: 0 is not between 1 and 65535"},
		{tcp, backend("name: a, port: 1"), "rules: []", "spec.rules: number of rules: 0 is not between 1 and 1"},
		{tcp, backend("name: a, port: 1"), "rules: [{}]", "spec.rules[0].backendRefs: number of references: 0 is not between 1 and 16"},
		{http, "rules: [{name: a}]", "rules: [{nam: a}]", `unknown field "spec.rules[0].nam"`},
	}
	read := func(kind, spec string) error {
		dir := withFile(t, "apiVersion: gateway.networking.k8s.io/v1\nkind: "+kind+"\nmetadata: {namespace: shop, name: r}\nspec: {"+spec+"}\n")
		_, err := readDir(dir)
		return err
	}
	for _, tt := range tests {
		t.Run(tt.want, func(t *testing.T) {
			if err := read(tt.kind, tt.good); err != nil {
				t.Errorf("%s is refused: %v", tt.good, err)
			}
			err := read(tt.kind, tt.bad)
			if err == nil {
				t.Fatalf("%s is taken", tt.bad)
			}
			got := err.Error()[strings.LastIndex(err.Error(), tt.kind):]
			got = strings.TrimPrefix(strings.TrimPrefix(got, tt.kind), " shop/r")
			if diff := cmp.Diff(": "+tt.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
	if err := RunDir(t.Context(), NewStore(), withFile(t, "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: a}\n"), slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "Gateway: not a kind for a manifest") {
		t.Errorf("a kind that means nothing here: %v", err)
	}
}
