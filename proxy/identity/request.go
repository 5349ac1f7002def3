package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/weirmesh/weir/agent/proxypb"
)

var errSilent = fmt.Errorf("the agent has not answered within %s", answerTimeout)

// newRequest makes a key and a request for a certificate. The request has no names: who
// the pod is, others know.
func newRequest() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make a key: %w", err)
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make a certificate request: %w", err)
	}
	return key, request, nil
}

// accept checks an answer: it must be for the key and the ID that were asked for, and
// good now for both ends of a connection, by the roots that come with it.
func accept(asked *asked, msg *proxypb.Certificate, trust *Trust, now time.Time) (*Snapshot, error) {
	roots, err := parseAll(msg.GetRoots())
	if err != nil {
		return nil, fmt.Errorf("roots: %w", err)
	}
	s, err := newSnapshot(msg.GetChain(), asked.key, roots, trust.domain, now)
	if err != nil {
		return nil, err
	}
	if s.ID != asked.id {
		return nil, fmt.Errorf("it is for %s, this pod is %s", s.ID, asked.id)
	}
	return s, verify(s.Certificate, s.Roots, now)
}

// newSnapshot puts an identity together, for which chain and key must fit.
func newSnapshot(chain [][]byte, key *ecdsa.PrivateKey, roots []*x509.Certificate, domain string, received time.Time) (*Snapshot, error) {
	certificates, err := parseAll(chain)
	switch {
	case err != nil:
		return nil, fmt.Errorf("chain: %w", err)
	case len(certificates) == 0:
		return nil, errors.New("there is no certificate")
	case len(roots) == 0:
		return nil, errors.New("there is no root to trust")
	}
	leaf := certificates[0]
	switch {
	case !key.PublicKey.Equal(leaf.PublicKey):
		return nil, errors.New("it is for another key")
	case len(leaf.URIs) != 1:
		return nil, fmt.Errorf("it has %d URIs, an identity is one", len(leaf.URIs))
	}
	s := &Snapshot{
		ID: leaf.URIs[0].String(), TrustDomain: domain, NotAfter: leaf.NotAfter, received: received,
		Certificate: tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf},
	}
	s.Roots, s.roots = pool(roots)
	return s, nil
}

// verify is what peers will do.
func verify(c tls.Certificate, roots *x509.CertPool, now time.Time) error {
	between := x509.NewCertPool()
	for _, der := range c.Certificate[1:] {
		parsed, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		between.AddCert(parsed)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		_, err := c.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}})
		if err != nil {
			return err
		}
	}
	return nil
}

func parseAll(list [][]byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for _, der := range list {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

// pool is a list of roots to verify by, and to keep.
func pool(roots []*x509.Certificate) (*x509.CertPool, [][]byte) {
	out, list := x509.NewCertPool(), make([][]byte, len(roots))
	for i, r := range roots {
		out.AddCert(r)
		list[i] = r.Raw
	}
	return out, list
}

func same(list [][]byte, roots []*x509.Certificate) bool {
	if len(list) != len(roots) {
		return false
	}
	for i := range list {
		if !bytes.Equal(list[i], roots[i].Raw) {
			return false
		}
	}
	return true
}
