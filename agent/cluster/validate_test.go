package cluster

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// routeExample has one mistake in a spec, and beside it the nearest value that is none.
type routeExample struct {
	kind            string // or v1alpha2 and v1beta1 with it
	good, bad, want string
}

func (e routeExample) document(spec string) string {
	version, kind, older := strings.Cut(e.kind, " ")
	if !older {
		version, kind = "v1", e.kind
	}
	return fmt.Sprintf("apiVersion: gateway.networking.k8s.io/%s\nkind: %s\nmetadata: {namespace: shop, name: r}\nspec: {%s}\n", version, kind, spec)
}

// routeExamples break each expression of the CRDs, and the limits that one is likely
// to meet. What is wrong in a filter is wrong in a backend's, too.
func routeExamples() []routeExample {
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
	external := func(a string) string {
		return "type: ExternalAuth, externalAuth: {backendRef: {name: a, port: 1}, " + a + "}"
	}
	replace := func(typeAndBody string) string {
		return "filters: [{type: " + typeAndBody + ": {path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}]"
	}
	below := func(n int, typeAndBody string) string {
		one := "{name: a, port: 1, " + replace(typeAndBody) + "},"
		return "backendRefs: [" + strings.TrimSuffix(strings.Repeat(one, n), ",") + "]"
	}
	prefix := func(kind, rest string) string {
		return "rules: [{matches: [{path: {type: " + kind + ", value: /a}}], " + rest + "}]"
	}
	full := "{matches: [" + strings.Repeat("{}, ", 63) + "{}]}"
	const http, grpc, tcp = "HTTPRoute", "GRPCRoute", "TCPRoute"
	out := []routeExample{
		{http, "parentRefs: [{" + service + "}]", `parentRefs: [{kind: Service, group: ""}]`, "spec.parentRefs[0].name: is missing"},
		{http, "parentRefs: [{" + service + ", port: 80}]", "parentRefs: [{" + service + ", port: 0}]", "spec.parentRefs[0].port: 0 is not between 1 and 65535"},
		{http, "parentRefs: [{" + service + ", namespace: a-b}]", "parentRefs: [{" + service + ", namespace: a.b}]", `spec.parentRefs[0].namespace: "a.b" does not match ^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`},
		{http, "parentRefs: [{" + service + ", port: 80}, {" + service + ", port: 90}]", "parentRefs: [{" + service + ", port: 80}, {" + service + "}]", "spec.parentRefs[1]: another parentRef to back does not set the same of sectionName and port"},
		{http, "parentRefs: [{" + service + "}, {" + service + ", namespace: shop}]", "parentRefs: [{" + service + ", namespace: lab}, {" + service + ", namespace: lab}]", "spec.parentRefs[1]: another parentRef to back is equal"},
		{http, "hostnames: ['*.example.com']", "hostnames: ['a.*.com']", `spec.hostnames[0]: "a.*.com" does not match ^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`},
		{http, rules(16, ""), rules(17, ""), "spec.rules: number of rules: 17 is not between 1 and 16"},
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
		{http, "hostnames: []", "rules: []", "spec.rules: number of rules: 0 is not between 1 and 16"},
		{http, "rules: [{}]", "rules: [{}, null]", "spec.rules[1]: is null"},
		// Without matches a rule has the default one, with an empty list it has none.
		{http, "rules: [" + full + ", " + full + ", {matches: []}]", "rules: [" + full + ", " + full + ", {}]", "spec.rules: matches: 129 are more than 128"},
		{http, "useDefaultGateways: None", "useDefaultGateways: ''", "spec.useDefaultGateways: is empty"},
		{http, match("path: {value: /a/b}"), match("path: {value: /a/./b}"), `spec.rules[0].matches[0].path.value: "/a/./b" contains "/./"`},
		{http, match("path: {value: /a/..b}"), match("path: {value: /a/../b}"), `spec.rules[0].matches[0].path.value: "/a/../b" contains "/../"`},
		{http, match("path: {value: /a.}"), match("path: {value: /a/.}"), `spec.rules[0].matches[0].path.value: "/a/." ends with "/."`},
		{http, match("path: {value: /%2E}"), match("path: {value: /%2F}"), `spec.rules[0].matches[0].path.value: "/%2F" contains "%2F"`},
		{http, match("path: {type: RegularExpression, value: '/a#b'}"), match("path: {value: '/a#b'}"), `spec.rules[0].matches[0].path.value: "/a#b" contains "#"`},
		{http, match("headers: [{name: a, value: b c}]"), match("headers: [{name: a, value: 'b  c'}]"), `spec.rules[0].matches[0].headers[0].value: "b  c" does not match ^[!-~]+([\t ]?[!-~]+)*$`},
		{http, match("queryParams: [{name: a, value: " + strings.Repeat("é", 1024) + "}]"), match("queryParams: [{name: a, value: " + strings.Repeat("é", 1025) + "}]"), "spec.rules[0].matches[0].queryParams[0].value: is longer than 1024 characters"},
		{http, "rules: [{retry: {codes: [500, 501]}}]", "rules: [{retry: {codes: [500, 500]}}]", "spec.rules[0].retry.codes[1]: 500 is there twice"},
		{http, filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, fraction: {numerator: 0}}"), filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, fraction: {}}"), "spec.rules[0].filters[0].requestMirror.fraction.numerator: is missing"},
		{http, filter("type: CORS, cors: {maxAge: 1}"), filter("type: CORS, cors: {maxAge: 0}"), "spec.rules[0].filters[0].cors.maxAge: 0 is less than 1"},
		{http, filter("type: CORS, cors: {allowOrigins: ['*']}"), filter("type: CORS, cors: {allowOrigins: ['*', 'http://a']}"), `spec.rules[0].filters[0].cors.allowOrigins: "*" stands alone`},
		{http, filter("type: CORS, cors: {allowHeaders: ['*']}"), filter("type: CORS, cors: {allowHeaders: ['*', a]}"), `spec.rules[0].filters[0].cors.allowHeaders: "*" stands alone`},
		{http, filter("type: CORS, cors: {exposeHeaders: [a, A]}"), filter("type: CORS, cors: {exposeHeaders: [a, a]}"), "spec.rules[0].filters[0].cors.exposeHeaders[1]: a is there twice"},
		{http, filter(external("protocol: GRPC, grpc: {}")), filter(external("protocol: GRPC")), "spec.rules[0].filters[0].externalAuth: grpc is what protocol GRPC needs, and no other has"},
		{http, filter(external("protocol: HTTP, http: {}")), filter(external("protocol: HTTP")), "spec.rules[0].filters[0].externalAuth: http is what protocol HTTP needs, and no other has"},
		{http, filter(external("protocol: HTTP, http: {}")), filter(external("protocol: HTTP, http: {}, grpc: {}")), "spec.rules[0].filters[0].externalAuth: grpc is what protocol GRPC needs, and no other has"},
		{http, filter(external("protocol: GRPC, grpc: {}")), filter(external("protocol: GRPC, grpc: {}, http: {}")), "spec.rules[0].filters[0].externalAuth: http is what protocol HTTP needs, and no other has"},
		{http, filter(external("protocol: HTTP, http: {path: /a}")), filter(external("protocol: HTTP, http: {path: ''}")), "spec.rules[0].filters[0].externalAuth.http.path: is empty"},
		{http, filter(external("protocol: GRPC, grpc: {}")), filter(strings.Replace(external("protocol: GRPC, grpc: {}"), ", port: 1", "", 1)), "spec.rules[0].filters[0].externalAuth.backendRef.port: is missing: a Service is named with its port"},
		{http, prefix("PathPrefix", replace("URLRewrite, urlRewrite")), prefix("Exact", replace("URLRewrite, urlRewrite")), "spec.rules[0].filters[0].urlRewrite.path: ReplacePrefixMatch needs a rule with one match, of type PathPrefix"},
		{http, prefix("PathPrefix", replace("RequestRedirect, requestRedirect")), prefix("Exact", replace("RequestRedirect, requestRedirect")), "spec.rules[0].filters[0].requestRedirect.path: ReplacePrefixMatch needs a rule with one match, of type PathPrefix"},
		{http, "rules: [{" + replace("URLRewrite, urlRewrite") + "}]", "rules: [{matches: [], " + replace("URLRewrite, urlRewrite") + "}]", "spec.rules[0].filters[0].urlRewrite.path: ReplacePrefixMatch needs a rule with one match, of type PathPrefix"},
		// Two backends that replace a prefix are one too many for the expression to see.
		{http, prefix("Exact", below(2, "URLRewrite, urlRewrite")), prefix("Exact", below(1, "URLRewrite, urlRewrite")), "spec.rules[0].backendRefs[0].filters[0].urlRewrite.path: ReplacePrefixMatch needs a rule with one match, of type PathPrefix"},
		{http, prefix("Exact", below(2, "RequestRedirect, requestRedirect")), prefix("Exact", below(1, "RequestRedirect, requestRedirect")), "spec.rules[0].backendRefs[0].filters[0].requestRedirect.path: ReplacePrefixMatch needs a rule with one match, of type PathPrefix"},
		{grpc, match("method: {service: a, method: b}"), match("method: {service: a, method: b.c}"), `spec.rules[0].matches[0].method.method: "b.c" does not match ^[A-Za-z_][A-Za-z_0-9]*$`},
		{grpc, match("method: {service: '', method: b, type: RegularExpression}"), match("method: {service: '', method: b}"), "spec.rules[0].matches[0].method.service: is missing"},
		{grpc, "rules: []", "rules: null, hostnames: [null]", "spec.hostnames[0]: is null"},
		{grpc, rules(16, "matches: [{},{},{},{},{},{},{},{}]"), rules(16, "matches: [{},{},{},{},{},{},{},{},{}]"), "spec.rules: matches: 144 are more than 128"},
		{grpc, "rules: [{name: a}, {name: b}]", "rules: [{name: a}, {name: a}]", `spec.rules[1].name: "a" is another rule's, too`},
		{grpc, backend("name: a, port: 1"), backend("name: a"), "spec.rules[0].backendRefs[0].port: is missing: a Service is named with its port"},
		{tcp, backend("name: a, port: 1"), backend("name: a"), "spec.rules[0].backendRefs[0].port: is missing: a Service is named with its port"},
		{"v1alpha2 TCPRoute", backend("name: a, port: 1"), backend("name: a"), "spec.rules[0].backendRefs[0].port: is missing: a Service is named with its port"},
		{"v1alpha2 TCPRoute", rules(2, "backendRefs: [{name: a, port: 1}]"), rules(2, "name: a, backendRefs: [{name: a, port: 1}]"), `spec.rules[1].name: "a" is another rule's, too`},
		{"v1beta1 HTTPRoute", backend("name: a, port: 1"), backend("name: a"), "spec.rules[0].backendRefs[0].port: is missing: a Service is named with its port"},
	}
	for _, kind := range []string{http, grpc, tcp, "v1alpha2 TCPRoute"} {
		// A TCPRoute is nothing without a rule.
		parents := func(a, b string) string {
			return "parentRefs: [{" + service + a + "}, {" + service + b + "}], " + backend("name: a, port: 1")
		}
		out = append(out,
			routeExample{kind, parents(", sectionName: a", ", sectionName: b"), parents(", sectionName: a", ""), "spec.parentRefs[1]: another parentRef to back does not set the same of sectionName and port"},
			routeExample{kind, parents(", sectionName: a, port: 1", ", sectionName: a, port: 2"), parents(", sectionName: a, port: 1", ", sectionName: a, port: 1"), "spec.parentRefs[1]: another parentRef to back is equal"},
		)
	}
	for _, kind := range []string{http, grpc} {
		session := func(s string) string { return "rules: [{sessionPersistence: {" + s + "}}]" }
		out = append(out,
			routeExample{kind, session("cookieConfig: {lifetimeType: Permanent}, absoluteTimeout: 1s"), session("cookieConfig: {lifetimeType: Permanent}"), "spec.rules[0].sessionPersistence: absoluteTimeout is what lifetimeType Permanent needs"},
			routeExample{kind, session("type: Cookie, cookieConfig: {}"), session("type: Header, cookieConfig: {}"), "spec.rules[0].sessionPersistence: cookieConfig is what type Cookie may have, and no other"},
			routeExample{kind, session("type: Header"), session("type: header"), "spec.rules[0].sessionPersistence.type: header is none of [Cookie Header]"},
			routeExample{kind, filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}}"), filter("type: RequestMirror, requestMirror: {backendRef: {name: a}}"), "spec.rules[0].filters[0].requestMirror.backendRef.port: is missing: a Service is named with its port"},
			routeExample{kind, filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, fraction: {numerator: 100}}"), filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, fraction: {numerator: 101}}"), "spec.rules[0].filters[0].requestMirror.fraction.numerator: 101 is not between 0 and 100"},
			routeExample{kind, filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, fraction: {numerator: 1}}"), filter("type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, percent: 1, fraction: {numerator: 1}}"), "spec.rules[0].filters[0].requestMirror: percent and fraction exclude each other"},
			routeExample{kind, filter("type: ExtensionRef, extensionRef: {group: '', kind: B, name: c}"), filter("type: ExtensionRef, extensionRef: {kind: B, name: c}"), "spec.rules[0].filters[0].extensionRef.group: is missing"},
		)
	}
	out = append(out, filterExamples(filter)...)
	for _, e := range slices.Clone(out) {
		if inFilter(e.good) && inFilter(e.bad) {
			out = append(out, routeExample{
				e.kind, inBackend(e.good), inBackend(e.bad), strings.ReplaceAll(e.want, "spec.rules[0].filters", "spec.rules[0].backendRefs[0].filters"),
			})
		}
	}
	return out
}

// filterExamples are of what holds for filters of every type, and for the two types of
// a changed path; filter is the spec of a route that has one.
func filterExamples(filter func(string) string) []routeExample {
	const http = "HTTPRoute"
	var out []routeExample
	for _, body := range []string{"requestRedirect", "urlRewrite"} {
		kind := map[string]string{"requestRedirect": "RequestRedirect", "urlRewrite": "URLRewrite"}[body]
		path := func(p string) string { return filter("type: " + kind + ", " + body + ": {path: {" + p + "}}") }
		at := "spec.rules[0].filters[0]." + body + ".path: "
		whole, part := "type: ReplaceFullPath, replaceFullPath: /a", "type: ReplacePrefixMatch, replacePrefixMatch: /a"
		out = append(out,
			routeExample{http, path(whole), path("type: ReplaceFullPath"), at + "the body of type ReplaceFullPath is missing"},
			routeExample{http, path(whole), path(whole + ", replacePrefixMatch: /a"), at + "has the body of type ReplacePrefixMatch, and is of type ReplaceFullPath"},
			routeExample{http, path(part), path("type: ReplacePrefixMatch"), at + "the body of type ReplacePrefixMatch is missing"},
			routeExample{http, path(part), path(part + ", replaceFullPath: /a"), at + "has the body of type ReplaceFullPath, and is of type ReplacePrefixMatch"},
		)
	}
	for _, body := range bodies {
		for _, kind := range body.kinds {
			good := filter("type: " + body.filter + ", " + body.text)
			other := bodies[0]
			if body.filter == other.filter {
				other = bodies[1]
			}
			out = append(out,
				routeExample{kind, good, filter("type: " + body.filter), "spec.rules[0].filters[0]: the body of type " + body.filter + " is missing"},
				routeExample{kind, good, filter("type: " + other.filter + ", " + other.text + ", " + body.text), "spec.rules[0].filters[0]: has the body of type " + body.filter + ", and is of type " + other.filter},
			)
			if twice := filter("type: " + body.filter + ", " + body.text + "}, {type: " + body.filter + ", " + body.text); body.once {
				out = append(out, routeExample{kind, good, twice, "spec.rules[0].filters[1]: " + body.filter + " is there twice"})
			} else {
				out = append(out, routeExample{kind, twice, filter("type: None"), "spec.rules[0].filters[0].type: None is none of " + filterTypes(kind)})
			}
		}
	}
	return out
}

// bodies are what filters have beside their type, those that both kinds of route have
// first.
var bodies = []struct {
	filter, text string
	once         bool
	kinds        []string
}{
	{"RequestHeaderModifier", "requestHeaderModifier: {set: [{name: a, value: b}], add: [{name: c, value: d}], remove: [e]}", true, []string{"HTTPRoute", "GRPCRoute"}},
	{"ResponseHeaderModifier", "responseHeaderModifier: {set: [{name: a, value: b}], add: [{name: c, value: d}], remove: [e]}", true, []string{"HTTPRoute", "GRPCRoute"}},
	{"RequestMirror", "requestMirror: {backendRef: {" + fullBackend + "}, percent: 50}", false, []string{"HTTPRoute", "GRPCRoute"}},
	{"ExtensionRef", "extensionRef: {group: a, kind: B, name: c}", false, []string{"HTTPRoute", "GRPCRoute"}},
	{"RequestRedirect", "requestRedirect: {scheme: https, hostname: a.b, port: 1, statusCode: 301, path: {type: ReplaceFullPath, replaceFullPath: /a}}", true, []string{"HTTPRoute"}},
	{"URLRewrite", "urlRewrite: {hostname: a.b, path: {type: ReplacePrefixMatch, replacePrefixMatch: /a}}", true, []string{"HTTPRoute"}},
	{"CORS", "cors: {allowOrigins: ['http://a'], allowMethods: [GET, POST], allowHeaders: [a], exposeHeaders: [b], maxAge: 5, allowCredentials: true}", true, []string{"HTTPRoute"}},
	{"ExternalAuth", "externalAuth: {protocol: HTTP, backendRef: {" + fullBackend + "}, http: {path: /a, allowedHeaders: [a], allowedResponseHeaders: [b]}}", false, []string{"HTTPRoute"}},
}

// fullBackend has every field.
const fullBackend = "name: a, port: 1, namespace: lab, group: '', kind: Service"

func filterTypes(kind string) string {
	if kind == "GRPCRoute" {
		return "[RequestHeaderModifier ResponseHeaderModifier RequestMirror ExtensionRef]"
	}
	return "[RequestHeaderModifier ResponseHeaderModifier RequestMirror RequestRedirect URLRewrite CORS ExternalAuth ExtensionRef]"
}

const ruleFilter, backendFilter = "rules: [{filters: [{", "rules: [{backendRefs: [{name: a, port: 1, filters: [{"

// inFilter reports whether a spec is of one rule with nothing but filters.
func inFilter(spec string) bool {
	return strings.HasPrefix(spec, ruleFilter) && strings.HasSuffix(spec, "}]}]") && !strings.Contains(spec, "backendRefs")
}

// inBackend has such a rule's filters in a backend.
func inBackend(spec string) string {
	return strings.Replace(spec, ruleFilter, backendFilter, 1) + "}]"
}

// TestRoutesThatAnAPIServerWouldRefuse: what a CRD's schema and expressions refuse, a
// directory refuses, and says why. What they take it takes.
func TestRoutesThatAnAPIServerWouldRefuse(t *testing.T) {
	examples := routeExamples()
	var documents []string
	for _, e := range examples {
		documents = append(documents, e.document(e.good), e.document(e.bad))
	}
	crds := gatewayCRDs(t, "experimental")
	server := verdicts(t, crds, documents...)
	for i, e := range examples {
		t.Run(fmt.Sprint(i)+" "+e.want, func(t *testing.T) {
			if _, err := readDir(withFile(t, documents[2*i])); err != nil || server[2*i] != "" {
				t.Errorf("%s is refused: by the directory %v, by the API server %q", e.good, err, server[2*i])
			}
			_, err := readDir(withFile(t, documents[2*i+1]))
			if err == nil || server[2*i+1] == "" {
				t.Fatalf("%s is taken: by the directory %v, by the API server %q", e.bad, err, server[2*i+1])
			}
			_, kind, older := strings.Cut(e.kind, " ")
			if !older {
				kind = e.kind
			}
			got := err.Error()[strings.LastIndex(err.Error(), kind):]
			got = strings.TrimPrefix(strings.TrimPrefix(got, kind), " shop/r")
			if diff := cmp.Diff(": "+e.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
	broken := brokenLimits(t, documents, server)
	for id, schema := range crdSchemas(t, crds) {
		for _, rule := range schema.expressions() {
			if !strings.HasSuffix(id, "v1beta1 HTTPRoute") && !broken[id].has(rule) {
				t.Errorf("%s: no example breaks %q", id, rule)
			}
		}
	}
}

// TestAManifestOfAnotherKindIsRefused: of a kind that an API server has and that means
// nothing here.
func TestAManifestOfAnotherKindIsRefused(t *testing.T) {
	dir := withFile(t, "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: a}\n")
	err := RunDir(t.Context(), NewStore(), dir, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "Gateway: not a kind for a manifest") {
		t.Error(err)
	}
}
