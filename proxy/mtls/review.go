package mtls

import (
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/weirmesh/weir/proxy/reason"
)

// Review says of connections that go on whether their peers would be believed under the
// roots of now. One is for many of them: their peers are fewer. Its zero value finds
// fault with none.
type Review struct {
	now  *Identity
	seen map[*x509.Certificate]*reason.Error // by leaf; crypto/tls keeps each once
}

// Review begins one.
func (h *Handshaker) Review() *Review { return &Review{now: h.Source.Current()} }

// Check returns nil if c's peer hangs on a root that is trusted, or would, if its
// certificate had not expired meanwhile: no connection has to end for that. nil, a
// connection without TLS, has nobody to be believed. The error is a *reason.Error:
// cert_untrusted.
func (r *Review) Check(c *Conn) error {
	if c == nil || r.now == nil || c.trust.Load() == r.now.Trust {
		return nil
	}
	chain := c.tls.ConnectionState().PeerCertificates
	failed, seen := r.seen[chain[0]]
	if !seen {
		v := &verifier{own: r.now, usage: x509.ExtKeyUsageClientAuth}
		if c.client {
			v.usage = x509.ExtKeyUsageServerAuth
		}
		failed = v.chain(chain, time.Unix(c.verified, 0))
		if r.seen == nil {
			r.seen = map[*x509.Certificate]*reason.Error{}
		}
		r.seen[chain[0]] = failed
	}
	if failed != nil {
		return &reason.Error{Reason: reason.CertUntrusted, Err: fmt.Errorf("%w: %w", errTrustedNoMore, failed.Err)}
	}
	c.trust.Store(r.now.Trust)
	return nil
}

var errTrustedNoMore = errors.New("a root was trusted when the connection was made, and is no more")
