// Package mtlstest makes identities for tests.
package mtlstest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/mtls"
)

// TrustDomain is that of all identities.
const TrustDomain = "cluster.test"

// ID is a service account's SPIFFE ID.
func ID(namespace, account string) string {
	return "spiffe://" + TrustDomain + "/ns/" + namespace + "/sa/" + account
}

// CA signs.
type CA struct {
	Cert *x509.Certificate
	key  *ecdsa.PrivateKey
	tb   testing.TB
}

var serial atomic.Int64

// NewCA makes one.
func NewCA(tb testing.TB) *CA {
	tb.Helper()
	ca := &CA{tb: tb, key: newKey(tb)}
	ca.Cert = ca.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, &ca.key.PublicKey)
	return ca
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func (ca *CA) sign(template, parent *x509.Certificate, key *ecdsa.PublicKey) *x509.Certificate {
	ca.tb.Helper()
	template.SerialNumber = big.NewInt(serial.Add(1))
	if template.NotAfter.IsZero() {
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, ca.key)
	if err != nil {
		ca.tb.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		ca.tb.Fatal(err)
	}
	return out
}

// Identity is a workload's, which trusts its CA; change, if not nil, changes what its
// certificate is to be.
func (ca *CA) Identity(id string, change func(*x509.Certificate)) *mtls.Identity {
	ca.tb.Helper()
	uri, err := url.Parse(id)
	if err != nil {
		ca.tb.Fatal(err)
	}
	template := &x509.Certificate{
		URIs: []*url.URL{uri}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if change != nil {
		change(template)
	}
	key := newKey(ca.tb)
	leaf := ca.sign(template, ca.Cert, &key.PublicKey)
	roots := x509.NewCertPool()
	roots.AddCert(ca.Cert)
	return &mtls.Identity{
		ID:          authz.ParseIdentity(id),
		Certificate: &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf},
		Roots:       roots, Trust: 1, TrustDomain: TrustDomain,
	}
}

// Source has the identity that was set last. The zero value has none yet.
type Source struct{ current atomic.Pointer[mtls.Identity] }

// Of is one that has an identity.
func Of(id *mtls.Identity) *Source {
	s := &Source{}
	s.Set(id)
	return s
}

// Set sets the identity.
func (s *Source) Set(id *mtls.Identity) { s.current.Store(id) }

// Current is mtls.Source's.
func (s *Source) Current() *mtls.Identity { return s.current.Load() }

// Wait is mtls.Source's.
func (s *Source) Wait(ctx context.Context) (*mtls.Identity, error) {
	for {
		if id := s.Current(); id != nil {
			return id, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}
