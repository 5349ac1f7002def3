package identity

import (
	"bytes"
	"crypto"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weirmesh/weir/agent/identity/identitytest"
)

var (
	domain = spiffeid.RequireTrustDomainFromString("cluster.local")
	front  = spiffeid.RequireFromString("spiffe://cluster.local/ns/shop/sa/front")
	start  = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
)

func authority(t testing.TB, now time.Time, lifetime time.Duration) *Authority {
	t.Helper()
	a, err := NewAuthority(domain, now, lifetime)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func leafOf(t testing.TB, chain [][]byte) *x509.Certificate {
	t.Helper()
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

// verify is what a peer does at a time.
func verify(chain [][]byte, roots []*x509.Certificate, now time.Time, usage x509.ExtKeyUsage) error {
	pool, between := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range roots {
		pool.AddCert(r)
	}
	for _, der := range chain[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		between.AddCert(c)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return err
	}
	_, err = leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}})
	return err
}

func TestACertificateIsForOneIdentityAndADay(t *testing.T) {
	ca := authority(t, start, RootLifetime)
	key := identitytest.Key(t, elliptic.P256())
	for name, names := range map[string][]*url.URL{"without names": nil, "with the one it gets": identitytest.URIs(front.String())} {
		chain, err := ca.Sign(identitytest.Request(t, key, x509.CertificateRequest{URIs: names, Subject: pkix.Name{CommonName: "root"}}), front, start, DefaultTTL)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		leaf := leafOf(t, chain)
		if len(chain) != 1 || len(leaf.URIs) != 1 || leaf.URIs[0].String() != front.String() ||
			len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0 || leaf.Subject.String() != "" || leaf.IsCA {
			t.Errorf("%s: %v of %q, URIs %v, CA %v, chain of %d", name, leaf.DNSNames, leaf.Subject, leaf.URIs, leaf.IsCA, len(chain))
		}
		if !leaf.NotBefore.Equal(start.Add(-15*time.Minute)) || !leaf.NotAfter.Equal(start.Add(24*time.Hour)) {
			t.Errorf("%s: from %s to %s", name, leaf.NotBefore, leaf.NotAfter)
		}
		if leaf.KeyUsage != x509.KeyUsageDigitalSignature || !key.PublicKey.Equal(leaf.PublicKey) {
			t.Errorf("%s: usage %b, another key %v", name, leaf.KeyUsage, !key.PublicKey.Equal(leaf.PublicKey))
		}
	}
}

func TestACertificateHoldsForBothEndsAndClocksThatAreOff(t *testing.T) {
	ca := authority(t, start, RootLifetime)
	chain, err := ca.Sign(identitytest.Request(t, identitytest.Key(t, elliptic.P256()), x509.CertificateRequest{}), front, start, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		now   time.Time
		usage x509.ExtKeyUsage
		roots *Authority
		want  bool
	}{
		{"as a server", start, x509.ExtKeyUsageServerAuth, ca, true},
		{"as a client", start, x509.ExtKeyUsageClientAuth, ca, true},
		{"for code", start, x509.ExtKeyUsageCodeSigning, ca, false},
		{"a clock 10 minutes behind", start.Add(-10 * time.Minute), x509.ExtKeyUsageClientAuth, ca, true},
		{"a clock an hour behind", start.Add(-time.Hour), x509.ExtKeyUsageClientAuth, ca, false},
		{"expired", start.Add(time.Hour + time.Second), x509.ExtKeyUsageClientAuth, ca, false},
		{"another CA", start, x509.ExtKeyUsageClientAuth, authority(t, start, RootLifetime), false},
	} {
		if err := verify(chain, []*x509.Certificate{c.roots.Root()}, c.now, c.usage); (err == nil) != c.want {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestACertificateEndsWithItsCA(t *testing.T) {
	ca := authority(t, start, time.Hour)
	csr := identitytest.Request(t, identitytest.Key(t, elliptic.P256()), x509.CertificateRequest{})
	chain, err := ca.Sign(csr, front, start.Add(50*time.Minute), DefaultTTL)
	if err != nil {
		t.Fatal(err)
	}
	if end := leafOf(t, chain).NotAfter; !end.Equal(start.Add(time.Hour)) {
		t.Errorf("it ends at %s", end)
	}
	if _, err := ca.Sign(csr, front, start.Add(time.Hour), DefaultTTL); !errors.Is(err, ErrExpired) {
		t.Errorf("signed by a CA that has expired: %v", err)
	}
}

func TestARequestThatSaysOtherwiseIsRefused(t *testing.T) {
	ca := authority(t, start, RootLifetime)
	key := identitytest.Key(t, elliptic.P256())
	good := identitytest.Request(t, key, x509.CertificateRequest{})
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	forged := slices.Clone(good)
	forged[len(forged)-1] ^= 1
	// otherName, which Go does not show.
	other, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: []byte{6, 1, 42}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		csr  []byte
		want error
	}{
		{"good", good, nil},
		{"nothing", nil, ErrMalformed},
		{"no request", []byte("hello"), ErrMalformed},
		{"too long", make([]byte, maxRequest+1), ErrMalformed},
		{"more after it", append(slices.Clone(good), 0), ErrMalformed},
		{"not signed by its key", forged, ErrSignature},
		{"RSA", identitytest.Request(t, rsaKey, x509.CertificateRequest{}), ErrKey},
		{"P-384", identitytest.Request(t, identitytest.Key(t, elliptic.P384()), x509.CertificateRequest{}), ErrKey},
		{"a DNS name", identitytest.Request(t, key, x509.CertificateRequest{DNSNames: []string{"front.shop"}}), ErrOtherNames},
		{"a DNS name beside the identity", identitytest.Request(t, key, x509.CertificateRequest{URIs: identitytest.URIs(front.String()), DNSNames: []string{"front.shop"}}), ErrOtherNames},
		{"an address", identitytest.Request(t, key, x509.CertificateRequest{IPAddresses: []net.IP{{10, 0, 0, 1}}}), ErrOtherNames},
		{"a mail address", identitytest.Request(t, key, x509.CertificateRequest{EmailAddresses: []string{"a@b.c"}}), ErrOtherNames},
		{"a name of another kind", identitytest.Request(t, key, x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: subjectAltName, Value: other}}}), ErrOtherNames},
		{"two identities", identitytest.Request(t, key, x509.CertificateRequest{URIs: identitytest.URIs(front.String(), front.String()+"-2")}), ErrOtherNames},
		{"another service account", identitytest.Request(t, key, x509.CertificateRequest{URIs: identitytest.URIs("spiffe://cluster.local/ns/shop/sa/back")}), ErrOtherIdentity},
		{"another trust domain", identitytest.Request(t, key, x509.CertificateRequest{URIs: identitytest.URIs("spiffe://elsewhere/ns/shop/sa/front")}), ErrOtherIdentity},
		{"a URL", identitytest.Request(t, key, x509.CertificateRequest{URIs: identitytest.URIs("https://example.com")}), ErrOtherIdentity},
	} {
		t.Run(c.name, func(t *testing.T) {
			chain, err := ca.Sign(c.csr, front, start, DefaultTTL)
			if !errors.Is(err, c.want) || (chain == nil) == (c.want == nil) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

// below makes a CA that a signs, allowing depth CAs below it (-1: any number).
func below(t testing.TB, a *Authority, key crypto.Signer, depth int, ca bool) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "intermediate"}, NotBefore: start.Add(-time.Hour), NotAfter: start.Add(48 * time.Hour),
		IsCA: ca, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, MaxPathLen: depth, MaxPathLenZero: depth == 0,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.Issuer(), key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func pemKey(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func TestACAOfTheOperatorsMayBeAnIntermediate(t *testing.T) {
	root := authority(t, start, RootLifetime)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	upperKey, ecKey := identitytest.Key(t, elliptic.P384()), identitytest.Key(t, elliptic.P256())
	upper := below(t, root, upperKey, 1, true)
	lower := below(t, &Authority{chain: []*x509.Certificate{upper}, key: upperKey}, rsaKey, 0, true)
	flat := below(t, root, ecKey, 0, true)
	sec1, err := x509.MarshalECPrivateKey(ecKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name              string
		chain             []*x509.Certificate
		key, roots        []byte
		between, ofItsOwn int
	}{
		{"a root", []*x509.Certificate{root.Root()}, pemKey(t, root.key), nil, 0, 1},
		{"with the root in its chain", []*x509.Certificate{flat, root.Root()}, pemKey(t, ecKey), nil, 1, 2},
		{"with the root apart, and an old form of key", []*x509.Certificate{flat}, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1}), EncodeCertificates([]*x509.Certificate{root.Root()}), 1, 2},
		{"two below the root, and RSA", []*x509.Certificate{lower, upper}, pemKey(t, rsaKey), EncodeCertificates([]*x509.Certificate{root.Root()}), 2, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := ParseAuthority(EncodeCertificates(c.chain), c.key, c.roots)
			if err != nil {
				t.Fatal(err)
			}
			chain, err := a.Sign(identitytest.Request(t, identitytest.Key(t, elliptic.P256()), x509.CertificateRequest{}), front, start, DefaultTTL)
			if err != nil {
				t.Fatal(err)
			}
			if len(chain) != 1+c.between {
				t.Errorf("a chain of %d", len(chain))
			}
			if err := verify(chain, []*x509.Certificate{root.Root()}, start, x509.ExtKeyUsageServerAuth); err != nil {
				t.Error(err)
			}
			certificates, key, err := a.PEM()
			if err != nil || bytes.Count(certificates, []byte("BEGIN")) != c.ofItsOwn {
				t.Errorf("%s, %v", certificates, err)
			}
			again, err := ParseAuthority(certificates, key, nil)
			if err != nil || !again.Issuer().Equal(a.Issuer()) || !again.Root().Equal(root.Root()) {
				t.Errorf("read back: %v", err)
			}
		})
	}
}

func TestACAThatCannotSignIsRefused(t *testing.T) {
	root, other := authority(t, start, RootLifetime), authority(t, start, RootLifetime)
	key := identitytest.Key(t, elliptic.P256())
	middle, leaf := below(t, root, key, 0, true), below(t, root, key, -1, false)
	deepKey := identitytest.Key(t, elliptic.P256())
	deep := below(t, &Authority{chain: []*x509.Certificate{middle}, key: key}, deepKey, -1, true)
	list := func(c ...*x509.Certificate) []byte { return EncodeCertificates(c) }
	for _, c := range []struct {
		name              string
		chain, key, roots []byte
		want              string
	}{
		{"nothing", nil, pemKey(t, key), nil, "CA certificate: there is none"},
		{"no key", list(root.Root()), nil, nil, "CA key: there is none"},
		{"another's key", list(root.Root()), pemKey(t, key), nil, "not the key of the first certificate"},
		{"no root", list(middle), pemKey(t, key), nil, "add the root"},
		{"another root", list(middle), pemKey(t, key), list(other.Root()), "is not signed by"},
		{"no CA", list(leaf, root.Root()), pemKey(t, key), nil, "may not sign"},
		{"too deep", list(deep, middle, root.Root()), pemKey(t, deepKey), nil, "allows 0 CAs below it, and there are 1"},
		{"not PEM", []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), pemKey(t, key), nil, "CA certificate: x509"},
	} {
		if _, err := ParseAuthority(c.chain, c.key, c.roots); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", c.name, err, c.want)
		}
	}
}

// FuzzRequest: whatever is asked, what is signed is for the pod and nobody else.
func FuzzRequest(f *testing.F) {
	ca := authority(f, start, RootLifetime)
	key := identitytest.Key(f, elliptic.P256())
	f.Add(identitytest.Request(f, key, x509.CertificateRequest{}))
	f.Add(identitytest.Request(f, key, x509.CertificateRequest{URIs: identitytest.URIs(front.String()), DNSNames: []string{"a"}}))
	f.Fuzz(func(t *testing.T, csr []byte) {
		chain, err := ca.Sign(csr, front, start, DefaultTTL)
		if err != nil {
			return
		}
		leaf := leafOf(t, chain)
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != front.String() || len(leaf.DNSNames) > 0 || leaf.IsCA {
			t.Errorf("%v %v", leaf.URIs, leaf.DNSNames)
		}
	})
}
