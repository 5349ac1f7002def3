package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net/url"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/mtls"
)

// signer is the CA of a fakeAgent.
func signer(t testing.TB, id string) (*proxypb.Identity, func(*proxypb.CertificateRequest) *proxypb.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	rootDER, err := x509.CreateCertificate(rand.Reader, root, root, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	sign := func(m *proxypb.CertificateRequest) *proxypb.Certificate {
		request, err := x509.ParseCertificateRequest(m.GetRequest())
		if err != nil {
			return &proxypb.Certificate{Number: m.GetNumber(), Error: err.Error()}
		}
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(2), URIs: []*url.URL{uri}, NotBefore: root.NotBefore, NotAfter: root.NotAfter,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}, root, request.PublicKey, key)
		if err != nil {
			return &proxypb.Certificate{Number: m.GetNumber(), Error: err.Error()}
		}
		return &proxypb.Certificate{Number: m.GetNumber(), Chain: [][]byte{der}, Roots: [][]byte{rootDER}}
	}
	return &proxypb.Identity{Id: id, TrustDomain: "cluster.local", Roots: [][]byte{rootDER}}, sign
}

// TestTheIdentityOutlivesTheProxy: locked in as it is, a proxy gets a certificate, and
// the next one has it without asking anybody.
func TestTheIdentityOutlivesTheProxy(t *testing.T) {
	cg := newCgroups(t)
	first := start(t, newNamespace(t), cg, nil)
	if fd := identityOf(t, first.control); fd >= 0 {
		t.Error("an identity before there is one")
	}
	agent := &fakeAgent{}
	agent.identity, agent.sign = signer(t, "spiffe://cluster.local/ns/shop/sa/front")
	agent.connect(t, first.control)
	agent.await(t, "a memory file", func() bool { return len(agent.keptUntil) > 0 })
	file := identityOf(t, first.control)
	if file < 0 {
		t.Fatal("there is no memory file")
	}
	if _, err := unix.Write(file, []byte("x")); !errors.Is(err, unix.EPERM) {
		t.Errorf("the memory file can be written to: %v", err)
	}
	first.kill()

	for generation := range 2 { // the second has it from the first's copy
		second, err := launchAs(t, newNamespace(t), launchOf(cg.paths), nil, file)
		if err != nil {
			t.Fatal(err)
		}
		again := &fakeAgent{identity: agent.identity, sign: agent.sign}
		stop := again.connect(t, second.control)
		again.await(t, "the memory file", func() bool { return len(again.keptUntil) > 0 })
		if handed := identityOf(t, second.control); handed < 0 || inode(t, handed) != inode(t, file) {
			t.Error("it has another memory file")
		}
		stop()
		if !again.keptUntil[0].Equal(agent.keptUntil[0]) || again.requests > 0 {
			t.Errorf("%d: until %s, want %s; asked %d times", generation, again.keptUntil[0], agent.keptUntil[0], again.requests)
		}
		second.kill()
	}
}

// TestTheKeyExchangeIsTheMeshs, of connections that are made from when the agent says so.
func TestTheKeyExchangeIsTheMeshs(t *testing.T) {
	p := newTestPod(t, captured)
	p.pod.listen(t, "10.9.0.2:8080", sayName)
	p.agent.identity, p.agent.sign = signer(t, "spiffe://cluster.local/ns/shop/sa/front")
	caller := certificateOf(t, p.agent.sign)
	for _, c := range []struct {
		classic bool
		want    tls.CurveID
	}{{false, tls.X25519MLKEM768}, {true, tls.X25519}, {false, tls.X25519MLKEM768}} {
		p.agent.classic, p.agent.acked = c.classic, 0
		stop := p.agent.connect(t, p.proxy.control)
		conn := tls.Client(p.world.dial(t, "10.9.0.2:8080"), &tls.Config{
			Certificates: []tls.Certificate{caller}, NextProtos: []string{mtls.Protocol}, InsecureSkipVerify: true,
		})
		if got := line(t, conn); got != "10.9.0.2:8080" {
			t.Errorf("reached %s", got)
		}
		if got := conn.ConnectionState().CurveID; got != c.want {
			t.Errorf("%s, want %s", got, c.want)
		}
		stop()
	}
}

// TestAPeerWhoseRootGoesIsResetAtOnce, and one whose root stays goes on.
func TestAPeerWhoseRootGoesIsResetAtOnce(t *testing.T) {
	p := newTestPod(t, captured)
	p.pod.listen(t, "10.9.0.2:8080", sayName)
	own, sign := signer(t, "spiffe://cluster.local/ns/shop/sa/front")
	other, signOther := signer(t, "spiffe://cluster.local/ns/shop/sa/back")
	p.agent.identity = &proxypb.Identity{Id: own.GetId(), TrustDomain: own.GetTrustDomain(), Roots: [][]byte{own.GetRoots()[0], other.GetRoots()[0]}}
	p.agent.sign = func(m *proxypb.CertificateRequest) *proxypb.Certificate {
		out := sign(m)
		out.Roots = p.agent.identity.GetRoots()
		return out
	}
	stop := p.agent.connect(t, p.proxy.control)
	p.agent.await(t, "a certificate", func() bool { return len(p.agent.keptUntil) > 0 })
	var conns []*tls.Conn
	for _, by := range []func(*proxypb.CertificateRequest) *proxypb.Certificate{signOther, sign} {
		conn := tls.Client(p.world.dial(t, "10.9.0.2:8080"), &tls.Config{
			Certificates: []tls.Certificate{certificateOf(t, by)}, NextProtos: []string{mtls.Protocol}, InsecureSkipVerify: true,
		})
		line(t, conn)
		conns = append(conns, conn)
	}
	stop()
	p.agent.identity = own
	p.agent.connect(t, p.proxy.control)
	if _, err := io.Copy(io.Discard, conns[0]); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
	if r := p.agent.record(t, 0); r.Reason != "cert_untrusted" || r.PeerIdentity != other.GetId() {
		t.Errorf("record %v", r)
	}
	roundTrip(t, conns[1], "still there")
}

// certificateOf is a caller's.
func certificateOf(t testing.TB, sign func(*proxypb.CertificateRequest) *proxypb.Certificate) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: sign(&proxypb.CertificateRequest{Request: request}).GetChain(), PrivateKey: key}
}

// TestAMemoryFileOfNothingKeepsNoProxyFromServing: it asks for a certificate.
func TestAMemoryFileOfNothingKeepsNoProxyFromServing(t *testing.T) {
	cg := newCgroups(t)
	pipe := make([]int, 2)
	if err := unix.Pipe2(pipe, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	p, err := launchAs(t, newNamespace(t), launchOf(cg.paths), nil, pipe[0])
	if err != nil {
		t.Fatal(err)
	}
	agent := &fakeAgent{}
	agent.identity, agent.sign = signer(t, "spiffe://cluster.local/ns/shop/sa/front")
	agent.connect(t, p.control)
	agent.await(t, "a memory file", func() bool { return len(agent.keptUntil) > 0 })
}
