// Package reason is the one list of why a connection or request failed. The same
// word stands in access logs, metrics, documentation and (for HTTP) the
// Proxy-Status header, RFC 9209.
package reason

// Reason is why a connection did not do what its client wanted.
type Reason uint8

// The reasons.
const (
	None               Reason = iota // all went well
	NoEndpoints                      // no ready pod behind the Service
	ConnectRefused                   // the pod is there, its port closed
	ConnectTimeout                   // no answer
	ConnectFailed                    // any other failure of connecting: no route
	UpstreamClosed                   // the upstream reset the connection
	ClientGone                       // the client reset it, or vanished
	Overload                         // the proxy shed it: too many connections, no descriptor, no local port
	ConfigUnavailable                // no agent has told this proxy what pod it is for
	DestinationUnknown               // an address of the mesh, and no agent says what it is
	Loop                             // the proxy's own connection came back to it
	NotRedirected                    // somebody dialled the proxy's port itself
	Shutdown                         // the proxy ended before the connection did
	RouteNotFound                    // routes exist for this Service, none matches
	BackendInvalid                   // the route names a backend that does not exist
	RequestTimeout                   // the route's limit passed
	CircuitOpen                      // a limit of the Service's TrafficPolicy
	RateLimited                      // that limit
	BadRequest                       // a rule of HTTP was broken
	BadResponse                      // the application broke one
	PolicyDenied                     // an AuthorizationPolicy refused it, or none allowed it
	PlaintextRefused                 // mTLS is demanded, and the caller came without
	PeerIdentity                     // the peer is another than the one that was picked
	CertMissing                      // the caller has no certificate
	CertUntrusted                    // a certificate of a CA that is not the mesh's
	CertExpired                      // a certificate, or one that it hangs on, has expired
	CertNotYetValid                  // or is for later
	CertMalformed                    // a certificate that is none of a workload's
	TrustDomain                      // the peer is of another trust domain
	TLSVersion                       // the peer speaks nothing as new as TLS 1.3
	TLSProtocol                      // the peer does not speak the protocol between proxies
	TLSRefused                       // the peer refused, mostly this proxy's certificate
	TLSFailed                        // any other failure of the handshake
	CertUnavailable                  // this proxy has no certificate yet
)

// table is in the order of the constants.
var table = [...]struct {
	name        string
	status      int
	proxyStatus string
	words       string
}{
	{"", 200, "", "all went well"},
	{"no_endpoints", 503, "destination_unavailable", "no ready pod behind it"},
	{"connect_refused", 503, "connection_refused", "pod is there, port closed"},
	{"connect_timeout", 503, "connection_timeout", "pod is there, no answer"},
	{"connect_failed", 503, "destination_ip_unroutable", "no way to that address"},
	{"upstream_closed", 503, "connection_terminated", "the application hung up before it answered"},
	{"client_gone", 0, "", "the caller left"},
	{"overload", 503, "connection_limit_reached", "the proxy shed this request"},
	{"config_unavailable", 503, "proxy_internal_error", "the agent has not configured this proxy yet"},
	{"destination_unknown", 503, "destination_unavailable", "an address of the mesh that the agent, away now, has to explain"},
	{"loop", 503, "proxy_loop_detected", "the proxy's own connection came back to it: the bypass rule is broken"},
	{"not_redirected", 0, "", "the proxy's port was dialled directly"},
	{"shutdown", 503, "connection_terminated", "the proxy's drain limit passed"},
	{"route_not_found", 404, "destination_not_found", "routes exist for this Service, none matches"},
	{"backend_invalid", 500, "proxy_configuration_error", "the route names a backend that does not exist"},
	{"request_timeout", 504, "http_response_timeout", "the route's limit passed"},
	{"circuit_open", 503, "connection_limit_reached", "a limit of the Service's TrafficPolicy"},
	{"rate_limited", 429, "http_request_denied", "more requests than the Service's TrafficPolicy allows"},
	{"bad_request", 400, "http_request_error", "a rule of HTTP was broken"},
	{"bad_response", 502, "http_protocol_error", "the application's answer breaks a rule of HTTP"},
	{"policy_denied", 403, "http_request_denied", "refused by authorization"},
	{"plaintext_refused", 0, "", "mTLS is demanded here, and the caller came without"},
	{"peer_identity", 503, "tls_certificate_error", "the peer is not the pod that was picked"},
	{"cert_missing", 503, "tls_certificate_error", "the peer has no certificate"},
	{"cert_untrusted", 503, "tls_certificate_error", "the peer's certificate is of a CA that this mesh does not trust"},
	{"cert_expired", 503, "tls_certificate_error", "a certificate has expired"},
	{"cert_not_yet_valid", 503, "tls_certificate_error", "a certificate is not valid yet: somebody's clock is wrong"},
	{"cert_malformed", 503, "tls_certificate_error", "the peer's certificate is not one of a workload's"},
	{"trust_domain", 503, "tls_certificate_error", "the peer is of another trust domain"},
	{"tls_version", 503, "tls_protocol_error", "the peer speaks no TLS as new as 1.3"},
	{"tls_protocol", 503, "tls_protocol_error", "the peer speaks TLS, but not as the mesh's proxies do"},
	{"tls_refused", 503, "tls_alert_received", "the peer refused this proxy's certificate"},
	{"tls_failed", 503, "tls_protocol_error", "no TLS came about with the peer"},
	{"cert_unavailable", 503, "proxy_internal_error", "this proxy has no certificate yet"},
}

// String is the word in logs and metrics, "" for None.
func (r Reason) String() string { return table[r].name }

// Status is the HTTP answer; 0: there is none, the connection ends in a reset.
// A connection that is not HTTP is always reset.
func (r Reason) Status() int { return table[r].status }

// GRPC is the status of a call of gRPC that failed so
// (grpc.github.io/grpc/core/md_doc_statuscodes.html).
func (r Reason) GRPC() int {
	switch r {
	case RouteNotFound:
		return 12 // UNIMPLEMENTED
	case RequestTimeout:
		return 4 // DEADLINE_EXCEEDED
	case RateLimited:
		return 8 // RESOURCE_EXHAUSTED
	case BadRequest, BadResponse:
		return 13 // INTERNAL
	case PolicyDenied:
		return 7 // PERMISSION_DENIED
	}
	return 14 // UNAVAILABLE
}

// ProxyStatus is the error of the Proxy-Status header (RFC 9209, section 2.3), ""
// where no answer is given.
func (r Reason) ProxyStatus() string { return table[r].proxyStatus }

// Words says it to a person.
func (r Reason) Words() string { return table[r].words }

// Error is a failure with its reason.
type Error struct {
	Reason Reason
	Err    error // the detail
}

func (e *Error) Error() string {
	if e.Err == nil {
		return e.Reason.String()
	}
	return e.Reason.String() + ": " + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }
