// Package mtls makes connections between proxies of an identity: TLS 1.3, a
// certificate at both ends, and each end checks whose the other's is.
//
// A Handshaker shakes hands over a TCP connection and returns a Conn, which knows its
// peer's SPIFFE ID. The server learns it; the client demands the one it picked. What
// goes wrong is a *reason.Error that says which rule was broken. Nothing is resumed:
// each connection is made under the trust of its day (proxies keep their connections,
// so that the handshake is rarely paid). Where roots go away later, a Review says which
// connections would not be made any more.
//
// A Conn moves bytes as package sock does, without waiting, so that whoever serves
// sockets serves it in the same way; it gathers records, since a system call for each
// of them costs more than their cipher.
//
// Where an identity comes from is its Source's business; who may do what, package
// authz's.
package mtls

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/reason"
)

// Protocol is the ALPN between proxies (RFC 7301): what is inside is what would be
// there without TLS.
const Protocol = "weir/1"

// Streams is the ALPN between proxies that gather what they have for each other: inside
// are streams of package mux, each with what would be there without any of it. Who offers
// it offers Protocol, too.
const Streams = "weir.mux/1"

const (
	// Timeout bounds a handshake.
	Timeout = 5 * time.Second
	// Patience is how long a connection waits for this proxy's own certificate.
	Patience = 5 * time.Second
)

// Identity is a pod's own, as it is at one time. It is never changed: a renewed
// certificate, or other roots, are another one.
type Identity struct {
	ID          authz.Identity   // whose it is
	Certificate *tls.Certificate // chain, key and Leaf
	Roots       *x509.CertPool
	Trust       uint64 // counts the roots: of another number they are others
	TrustDomain string
}

// Source has the identity.
type Source interface {
	// Current is the identity as it is now; nil: there is none yet.
	Current() *Identity
	// Wait returns it once it is there, or ctx's error.
	Wait(context.Context) (*Identity, error)
}

// ErrOwn is a failure that is this proxy's own, and the same with any peer.
var ErrOwn = errors.New("this proxy's own certificate")

// Handshaker shakes hands. Source is needed.
type Handshaker struct {
	Source Source
	// Classic says whether the post-quantum key exchange is left out of a handshake that
	// begins now: X25519 alone, not X25519MLKEM768; nil: it is not.
	Classic func() bool
	// Patience is how long a connection waits for the certificate; 0: Patience.
	Patience time.Duration
}

// Trust is the number of the roots that hold now; 0: there are none yet.
func (h *Handshaker) Trust() uint64 {
	if id := h.Source.Current(); id != nil {
		return id.Trust
	}
	return 0
}

// Own returns the identity, which is waited for, for at most 5 s. The error is a
// *reason.Error, and ErrOwn: cert_unavailable.
func (h *Handshaker) Own(ctx context.Context) (*Identity, error) {
	if id := h.Source.Current(); id != nil {
		return id, nil
	}
	waiting, cancel := context.WithTimeout(ctx, cmp.Or(h.Patience, Patience))
	defer cancel()
	id, err := h.Source.Wait(waiting)
	if err != nil {
		return nil, &reason.Error{Reason: reason.CertUnavailable, Err: fmt.Errorf("%w: %w", ErrOwn, err)}
	}
	return id, nil
}

// Valid says whether the certificate is, now: a client that does not ask first hears
// nothing but that it is refused. (A server's clients say what is wrong with it.) The
// error is a *reason.Error, and ErrOwn: cert_expired, cert_not_yet_valid.
func (id *Identity) Valid() error {
	now, leaf := time.Now(), id.Certificate.Leaf
	switch {
	case now.After(leaf.NotAfter):
		return &reason.Error{Reason: reason.CertExpired, Err: fmt.Errorf("%w, %s", ErrOwn, expiry(leaf))}
	case now.Before(leaf.NotBefore):
		return &reason.Error{Reason: reason.CertNotYetValid, Err: fmt.Errorf("%w, %s", ErrOwn, beginning(leaf, now))}
	}
	return nil
}

// Client shakes hands with the server of that SPIFFE ID, for Protocol, or one of those that
// are better. Errors are *reason.Error; the connection is the caller's to close.
func (h *Handshaker) Client(ctx context.Context, tcp *net.TCPConn, own *Identity, expected string, better ...string) (*Conn, error) {
	v := &verifier{own: own, usage: x509.ExtKeyUsageServerAuth, expected: expected, protocols: append(better, Protocol)}
	config := h.config(v)
	// The name in a certificate is no host's: VerifyConnection does all there is to verify.
	config.InsecureSkipVerify = true
	return handshake(ctx, tcp, nil, v, func(w *wire) *tls.Conn { return tls.Client(w, config) })
}

// Server shakes hands with a client, of which some bytes were read already, for Protocol,
// or one of those that are better. Errors are *reason.Error; the connection is the
// caller's to close.
func (h *Handshaker) Server(ctx context.Context, tcp *net.TCPConn, own *Identity, first []byte, better ...string) (*Conn, error) {
	v := &verifier{own: own, usage: x509.ExtKeyUsageClientAuth, protocols: append(better, Protocol)}
	config := h.config(v)
	// None is refused by VerifyConnection, which says so.
	config.ClientAuth = tls.RequestClientCert
	config.GetConfigForClient = v.hello
	return handshake(ctx, tcp, first, v, func(w *wire) *tls.Conn { return tls.Server(w, config) })
}

func (h *Handshaker) config(v *verifier) *tls.Config {
	curves := []tls.CurveID{tls.X25519MLKEM768, tls.X25519}
	if h.Classic != nil && h.Classic() {
		curves = curves[1:]
	}
	return &tls.Config{
		MinVersion:       tls.VersionTLS13,
		NextProtos:       v.protocols,
		Certificates:     []tls.Certificate{*v.own.Certificate},
		CurvePreferences: curves,
		VerifyConnection: v.verify,

		SessionTicketsDisabled:      true,
		DynamicRecordSizingDisabled: true, // pods are near, and what is written is gathered
	}
}

func handshake(ctx context.Context, tcp *net.TCPConn, first []byte, v *verifier, begin func(*wire) *tls.Conn) (*Conn, error) {
	w, err := newWire(tcp, first)
	if err != nil {
		return nil, &reason.Error{Reason: reason.TLSFailed, Err: err}
	}
	if err := tcp.SetDeadline(time.Now().Add(Timeout)); err != nil {
		return nil, &reason.Error{Reason: reason.TLSFailed, Err: err}
	}
	stop := context.AfterFunc(ctx, func() { _ = tcp.SetDeadline(time.Unix(1, 0)) })
	c := &Conn{tls: begin(w), wire: w}
	err = c.tls.Handshake()
	stopped := stop()
	switch {
	case !stopped && ctx.Err() != nil:
		err = ctx.Err()
	case err == nil && v.peer == "":
		err = errors.New("the peer was not verified") // crypto/tls has VerifyConnection called
	case err == nil:
		err = tcp.SetDeadline(time.Time{})
	}
	if err != nil {
		w.drop()
		return nil, v.explain(err)
	}
	w.nonblocking = true
	c.peer, c.until, c.client, c.verified, c.protocol = v.peer, v.until, v.expected != "", v.verified, v.protocol
	c.trust.Store(v.own.Trust)
	return c, nil
}
