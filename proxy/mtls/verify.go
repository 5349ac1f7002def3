package mtls

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weirmesh/weir/proxy/reason"
)

// verifier looks at one peer.
type verifier struct {
	own      *Identity
	usage    x509.ExtKeyUsage // that the peer's certificate is to have
	expected string           // SPIFFE ID; empty: whoever it is

	protocols []string // one of which is to be spoken
	protocol  string   // which that is

	offered *tls.ClientHelloInfo // of a server
	peer    string               // SPIFFE ID
	until   time.Time            // the end of the peer's certificate, or of the own
	failed  *reason.Error

	verified int64 // when that was, in Unix seconds
}

// hello notes what the client offers, so that it can be said what it lacks.
func (v *verifier) hello(info *tls.ClientHelloInfo) (*tls.Config, error) {
	v.offered = info
	return nil, nil
}

// verify is tls.Config.VerifyConnection.
func (v *verifier) verify(state tls.ConnectionState) error {
	if v.failed = v.examine(state); v.failed != nil {
		return v.failed
	}
	return nil
}

func (v *verifier) examine(state tls.ConnectionState) *reason.Error {
	switch {
	case !slices.Contains(v.protocols, state.NegotiatedProtocol):
		return &reason.Error{Reason: reason.TLSProtocol, Err: errNoProtocol}
	case len(state.PeerCertificates) == 0:
		return &reason.Error{Reason: reason.CertMissing}
	}
	now, leaf := time.Now(), state.PeerCertificates[0]
	if failed := v.chain(state.PeerCertificates, now); failed != nil {
		return failed
	}
	id, err := idOf(leaf)
	switch {
	case err != nil:
		return &reason.Error{Reason: reason.CertMalformed, Err: err}
	case id.TrustDomain().Name() != v.own.TrustDomain:
		return &reason.Error{Reason: reason.TrustDomain, Err: fmt.Errorf("%s, not %s", id, v.own.TrustDomain)}
	case v.expected != "" && id.String() != v.expected:
		return &reason.Error{Reason: reason.PeerIdentity, Err: fmt.Errorf("%s, not %s", id, v.expected)}
	}
	v.peer, v.verified, v.until, v.protocol = id.String(), now.Unix(), leaf.NotAfter, state.NegotiatedProtocol
	if own := v.own.Certificate.Leaf.NotAfter; own.Before(v.until) {
		v.until = own
	}
	return nil
}

var errNoProtocol = errors.New("no ALPN protocol " + Protocol)

// chain verifies that a certificate hangs on the roots, now and for its usage.
func (v *verifier) chain(chain []*x509.Certificate, now time.Time) *reason.Error {
	err := v.own.verify(chain, v.usage, now)
	if err == nil {
		return nil
	}
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && now.Before(invalid.Cert.NotBefore):
		return &reason.Error{Reason: reason.CertNotYetValid, Err: fmt.Errorf("the peer's, %s", beginning(invalid.Cert, now))}
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return &reason.Error{Reason: reason.CertExpired, Err: fmt.Errorf("the peer's, %s", expiry(invalid.Cert))}
	case errors.As(err, &unknown):
		return &reason.Error{Reason: reason.CertUntrusted, Err: err}
	}
	return &reason.Error{Reason: reason.CertMalformed, Err: err}
}

// verify verifies that a certificate hangs on the roots, at that time and for its usage.
func (id *Identity) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage, at time.Time) error {
	options := x509.VerifyOptions{
		Roots: id.Roots, Intermediates: x509.NewCertPool(), CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{usage},
	}
	for _, c := range chain[1:] {
		options.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(options)
	return err
}

// Verify does with the pod's own certificate what peers do that trust the same roots: it
// has to be good at that time, at both ends of a connection. Errors are crypto/x509's.
func (id *Identity) Verify(at time.Time) error {
	chain := []*x509.Certificate{id.Certificate.Leaf}
	for _, der := range id.Certificate.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		chain = append(chain, c)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if err := id.verify(chain, usage, at); err != nil {
			return err
		}
	}
	return nil
}

// idOf reads the one SPIFFE ID that a workload's certificate has (X509-SVID, sections
// 2 and 4), which is a service account's. Other names than URIs mean nothing.
func idOf(leaf *x509.Certificate) (spiffeid.ID, error) {
	if leaf.IsCA {
		return spiffeid.ID{}, errors.New("a CA's")
	}
	if n := len(leaf.URIs); n != 1 {
		return spiffeid.ID{}, fmt.Errorf("%d URI SANs, not one", n)
	}
	id, err := spiffeid.FromURI(leaf.URIs[0])
	if err != nil {
		return spiffeid.ID{}, err
	}
	path := strings.Split(id.Path(), "/")
	if len(path) != 5 || path[1] != "ns" || path[3] != "sa" {
		return spiffeid.ID{}, fmt.Errorf("%s is no service account's", id)
	}
	return id, nil
}

// whose names a certificate.
func whose(c *x509.Certificate) string {
	if id, err := idOf(c); err == nil {
		return "of " + id.String()
	}
	return fmt.Sprintf("of %.100q", c.Subject)
}

func expiry(c *x509.Certificate) string {
	return whose(c) + ", expired at " + c.NotAfter.UTC().Format(time.RFC3339)
}

func beginning(c *x509.Certificate, now time.Time) string {
	return fmt.Sprintf("%s, is valid from %s on; here it is %s", whose(c), c.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
}

// Overtaken reports whether a client's handshake failed because the server spoke in plain
// before it had read the hello: it took the client for one that waits.
func Overtaken(err error) bool {
	var plain tls.RecordHeaderError
	return errors.As(err, &plain)
}

// explain is the reason of a handshake's failure.
func (v *verifier) explain(err error) *reason.Error {
	gone := errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
	switch {
	case v.failed != nil:
		return v.failed
	case errors.Is(err, context.Canceled):
		return &reason.Error{Reason: reason.Shutdown, Err: err}
	case v.offered != nil && !slices.Contains(v.offered.SupportedVersions, tls.VersionTLS13):
		return &reason.Error{Reason: reason.TLSVersion, Err: err}
	case v.offered != nil && !slices.Contains(v.offered.SupportedProtos, Protocol):
		return &reason.Error{Reason: reason.TLSProtocol, Err: errNoProtocol}
	case alerted(err):
		return &reason.Error{Reason: reason.TLSRefused, Err: err}
	case gone && v.expected == "":
		return &reason.Error{Reason: reason.ClientGone, Err: fmt.Errorf("in the handshake: %w", err)}
	}
	return &reason.Error{Reason: reason.TLSFailed, Err: err}
}

// alerted reports whether the peer ended it with an alert.
func alerted(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}
