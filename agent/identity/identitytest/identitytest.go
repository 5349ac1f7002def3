// Package identitytest makes keys and requests for certificates, right and wrong ones,
// for tests.
package identitytest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"net/url"
	"testing"
)

// Key makes a key. Proxies' are on elliptic.P256.
func Key(tb testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// Request makes a request in DER, signed by the key, for the names of the template. A
// proxy's has none.
func Request(tb testing.TB, key crypto.Signer, template x509.CertificateRequest) []byte {
	tb.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		tb.Fatal(err)
	}
	return der
}

// URIs are names of a request. It panics over one that is no URI.
func URIs(list ...string) []*url.URL {
	var out []*url.URL
	for _, s := range list {
		u, err := url.Parse(s)
		if err != nil {
			panic(err)
		}
		out = append(out, u)
	}
	return out
}
