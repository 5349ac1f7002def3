package reason

import (
	"regexp"
	"testing"
)

// TestTable holds the enum against the table of the documentation.
func TestTable(t *testing.T) {
	want := map[Reason]struct {
		name        string
		status      int
		proxyStatus string
	}{
		NoEndpoints:        {"no_endpoints", 503, "destination_unavailable"},
		ConnectRefused:     {"connect_refused", 503, "connection_refused"},
		ConnectTimeout:     {"connect_timeout", 503, "connection_timeout"},
		ConnectFailed:      {"connect_failed", 503, "destination_ip_unroutable"},
		UpstreamClosed:     {"upstream_closed", 503, "connection_terminated"},
		ClientGone:         {"client_gone", 0, ""},
		Overload:           {"overload", 503, "connection_limit_reached"},
		ConfigUnavailable:  {"config_unavailable", 503, "proxy_internal_error"},
		DestinationUnknown: {"destination_unknown", 503, "destination_unavailable"},
		Loop:               {"loop", 503, "proxy_loop_detected"},
		NotRedirected:      {"not_redirected", 0, ""},
		Shutdown:           {"shutdown", 503, "connection_terminated"},
		RouteNotFound:      {"route_not_found", 404, "destination_not_found"},
		BackendInvalid:     {"backend_invalid", 500, "proxy_configuration_error"},
		RequestTimeout:     {"request_timeout", 504, "http_response_timeout"},
		CircuitOpen:        {"circuit_open", 503, "connection_limit_reached"},
		RateLimited:        {"rate_limited", 429, "http_request_denied"},
		BadRequest:         {"bad_request", 400, "http_request_error"},
		BadResponse:        {"bad_response", 502, "http_protocol_error"},
		PolicyDenied:       {"policy_denied", 403, "http_request_denied"},
		PlaintextRefused:   {"plaintext_refused", 0, ""},
		PeerIdentity:       {"peer_identity", 503, "tls_certificate_error"},
		CertMissing:        {"cert_missing", 503, "tls_certificate_error"},
		CertUntrusted:      {"cert_untrusted", 503, "tls_certificate_error"},
		CertExpired:        {"cert_expired", 503, "tls_certificate_error"},
		CertNotYetValid:    {"cert_not_yet_valid", 503, "tls_certificate_error"},
		CertMalformed:      {"cert_malformed", 503, "tls_certificate_error"},
		TrustDomain:        {"trust_domain", 503, "tls_certificate_error"},
		TLSVersion:         {"tls_version", 503, "tls_protocol_error"},
		TLSProtocol:        {"tls_protocol", 503, "tls_protocol_error"},
		TLSRefused:         {"tls_refused", 503, "tls_alert_received"},
		TLSFailed:          {"tls_failed", 503, "tls_protocol_error"},
		CertUnavailable:    {"cert_unavailable", 503, "proxy_internal_error"},
	}
	if len(table)-1 != len(want) {
		t.Errorf("%d reasons and None, the table has %d", len(want), len(table))
	}
	word := regexp.MustCompile(`^[a-z]+(_[a-z]+)*$`)
	for r := None + 1; int(r) < len(table); r++ {
		w := want[r]
		if r.String() != w.name || r.Status() != w.status || r.ProxyStatus() != w.proxyStatus {
			t.Errorf("%d is %q, %d, %q; want %v", r, r, r.Status(), r.ProxyStatus(), w)
		}
		if !word.MatchString(r.String()) || r.Words() == "" {
			t.Errorf("%q (%s) is no word for a label", r, r.Words())
		}
	}
	if None.String() != "" {
		t.Error("None has a word")
	}
}
