package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// DefaultTTL is how long a certificate is good for where nobody says.
	DefaultTTL = 24 * time.Hour
	// MinTTL is the least that may be said.
	MinTTL = 10 * time.Second
	// MaxTTL is the most that may be said.
	MaxTTL = 24 * time.Hour
	// RootLifetime is that of a root of our own making. It is replaced at half of it.
	RootLifetime = 365 * 24 * time.Hour
	// backdate is how far a certificate's beginning lies in the past: clocks may
	// differ by 10 minutes.
	backdate = 15 * time.Minute
)

// ErrExpired says that a CA is past its end, or will be in a moment.
var ErrExpired = errors.New("the CA has expired")

// leastLife is what a certificate must at least be good for to be worth signing.
const leastLife = time.Second

// Authority is a CA: what signs certificates, and the root that they lead to. Make it
// with NewAuthority or ParseAuthority; it does not change.
type Authority struct {
	chain []*x509.Certificate // the issuer's own first; without the root, unless that is the issuer
	root  *x509.Certificate
	key   crypto.Signer
}

// NewAuthority makes a self-signed root with a key of its own (ECDSA P-256), good from
// now on for lifetime.
func NewAuthority(td spiffeid.TrustDomain, now time.Time, lifetime time.Duration) (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("CA: %w", err)
	}
	serial, err := serialNumber()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{"Weir"}, CommonName: "root of " + td.Name(), SerialNumber: serial.Text(16)},
		URIs:                  []*url.URL{td.ID().URL()},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(lifetime),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("CA: %w", err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("CA: %w", err)
	}
	return &Authority{chain: []*x509.Certificate{root}, root: root, key: key}, nil
}

// ParseAuthority reads a CA from PEM: its certificate, those that lead from it to a
// root, in order, and its key (PKCS #8 or SEC 1). The root is the last one in
// certificates, or in roots, where cert-manager has it (ca.crt). It is not checked
// against a clock: Sign does that.
func ParseAuthority(certificates, key, roots []byte) (*Authority, error) {
	chain, err := parseCertificates(certificates)
	if err != nil {
		return nil, fmt.Errorf("CA certificate: %w", err)
	}
	root := chain[len(chain)-1]
	if len(bytes.TrimSpace(roots)) > 0 {
		given, err := parseCertificates(roots)
		if err != nil {
			return nil, fmt.Errorf("CA root: %w", err)
		}
		root = given[len(given)-1]
	}
	if len(chain) > 1 && chain[len(chain)-1].Equal(root) {
		chain = chain[:len(chain)-1]
	}
	a := &Authority{chain: chain, root: root}
	if a.key, err = parseKey(key); err != nil {
		return nil, fmt.Errorf("CA key: %w", err)
	}
	return a, a.check()
}

// check says what is wrong with a CA that was given.
func (a *Authority) check() error {
	issuer := a.Issuer()
	public, ok := a.key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(issuer.PublicKey) {
		return errors.New("CA key: it is not the key of the first certificate")
	}
	if !a.root.IsCA || a.root.CheckSignatureFrom(a.root) != nil {
		return fmt.Errorf("CA root: the last certificate, %q, is not a self-signed CA's; add the root", a.root.Subject)
	}
	for i, c := range a.chain {
		parent := a.root
		if i+1 < len(a.chain) {
			parent = a.chain[i+1]
		}
		switch {
		case !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0:
			return fmt.Errorf("CA certificate: %q may not sign certificates", c.Subject)
		case c.MaxPathLenZero && i > 0 || c.MaxPathLen > 0 && c.MaxPathLen < i:
			return fmt.Errorf("CA certificate: %q allows %d CAs below it, and there are %d", c.Subject, max(c.MaxPathLen, 0), i)
		}
		if err := c.CheckSignatureFrom(parent); err != nil {
			return fmt.Errorf("CA certificate: %q is not signed by %q: %w", c.Subject, parent.Subject, err)
		}
	}
	return nil
}

// PEM is what ParseAuthority reads: certificates, and the key.
func (a *Authority) PEM() ([]byte, []byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		return nil, nil, fmt.Errorf("CA key: %w", err)
	}
	certificates := a.chain
	if !a.Issuer().Equal(a.root) {
		certificates = append(certificates[:len(certificates):len(certificates)], a.root)
	}
	return EncodeCertificates(certificates), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), nil
}

// Issuer is the certificate of the key that signs; that of a root of our own making is
// the root's.
func (a *Authority) Issuer() *x509.Certificate { return a.chain[0] }

// Root is what has to be trusted for what this CA signs.
func (a *Authority) Root() *x509.Certificate { return a.root }

// End is when the first certificate between a leaf and the root ends, the root's
// included: what is signed is good for no longer.
func (a *Authority) End() time.Time {
	end := a.root.NotAfter
	for _, c := range a.chain {
		if c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

// GoodAt returns ErrExpired, and when that was, unless the CA is good until then.
func (a *Authority) GoodAt(t time.Time) error {
	if end := a.End(); end.Before(t) {
		return fmt.Errorf("%w: %q is good until %s", ErrExpired, a.Issuer().Subject, end.UTC().Format(time.RFC3339))
	}
	return nil
}

// Sign answers a request (DER) with a chain (DER): a certificate for id, good for ttl or
// for as long as the CA is, and what leads from it to the root. The request's key is all
// that is taken from it. The error is one of ErrMalformed, ErrSignature, ErrKey,
// ErrOtherNames, ErrOtherIdentity, ErrExpired.
func (a *Authority) Sign(request []byte, id spiffeid.ID, now time.Time, ttl time.Duration) ([][]byte, error) {
	key, err := checkRequest(request, id)
	if err != nil {
		return nil, err
	}
	end := now.Add(ttl)
	if last := a.End(); last.Before(end) {
		end = last
	}
	if err := a.GoodAt(now.Add(leastLife)); err != nil {
		return nil, err
	}
	serial, err := serialNumber()
	if err != nil {
		return nil, err
	}
	leaf, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber:          serial,
		URIs:                  []*url.URL{id.URL()},
		NotBefore:             now.Add(-backdate),
		NotAfter:              end,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}, a.Issuer(), key, a.key)
	if err != nil {
		return nil, fmt.Errorf("sign a certificate: %w", err)
	}
	out := [][]byte{leaf}
	for _, c := range a.chain {
		if !c.Equal(a.root) {
			out = append(out, c.Raw)
		}
	}
	return out, nil
}

// serialNumber is positive, with 127 bits that cannot be guessed (RFC 5280, section
// 4.1.2.2, allows 159).
func serialNumber() (*big.Int, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("serial number: %w", err)
	}
	return serial.Add(serial, big.NewInt(1)), nil
}

// parseKey reads the first private key of a PEM document.
func parseKey(document []byte) (crypto.Signer, error) {
	for block, rest := pem.Decode(document); block != nil; block, rest = pem.Decode(rest) {
		switch block.Type {
		case "EC PRIVATE KEY":
			return x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			return x509.ParsePKCS1PrivateKey(block.Bytes)
		case "PRIVATE KEY":
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, err
			}
			signer, ok := key.(crypto.Signer)
			if !ok {
				return nil, fmt.Errorf("%T cannot sign", key)
			}
			return signer, nil
		}
	}
	return nil, errors.New("there is none, in PEM")
}
