package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/mtls"
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
func accept(asked *asked, msg *proxypb.Certificate, trust *Trust, now time.Time) (*held, error) {
	roots, err := parseAll(msg.GetRoots())
	if err != nil {
		return nil, fmt.Errorf("roots: %w", err)
	}
	s, err := newHeld(msg.GetChain(), asked.key, roots, trust.domain, now)
	if err != nil {
		return nil, err
	}
	if s.ID.String() != asked.id {
		return nil, fmt.Errorf("it is for %s, this pod is %s", s.Certificate.Leaf.URIs[0], asked.id)
	}
	return s, s.Verify(now)
}

// newHeld puts an identity together, for which chain and key must fit.
func newHeld(chain [][]byte, key *ecdsa.PrivateKey, roots []*x509.Certificate, domain string, received time.Time) (*held, error) {
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
	return &held{
		Identity: mtls.Identity{
			ID:          authz.ParseIdentity(leaf.URIs[0].String()),
			Certificate: &tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf},
			Roots:       pool(roots), TrustDomain: domain,
		},
		roots: roots, received: received,
	}, nil
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

func pool(roots []*x509.Certificate) *x509.CertPool {
	out := x509.NewCertPool()
	for _, r := range roots {
		out.AddCert(r)
	}
	return out
}

func same(a, b []*x509.Certificate) bool {
	return slices.EqualFunc(a, b, (*x509.Certificate).Equal)
}
