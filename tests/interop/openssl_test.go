package interop

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/tests/pod"
)

// openSSLPort is a port of called, whose application repeats what it hears.
const openSSLPort = 8443

// TestOpenSSLGetsNoFurtherThanItsCertificate: who speaks as a proxy does, and is none, is
// refused, logged and counted under what is wrong, beside the one whose certificate is
// right.
func TestOpenSSLGetsNoFurtherThanItsCertificate(t *testing.T) {
	onNode(t)
	t.Parallel()
	l := listen(t, openSSLPort)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(conn, conn)
			conn.Close()
		}
	}()
	beStrict(t)
	const account = "spiffe://cluster.local/ns/shop/sa/openssl"
	mesh := meshCA(t)
	foreign := &tls.Certificate{Leaf: mesh.Leaf, PrivateKey: newKey(t)}
	dir := folder(t)
	leaf := func(name string, ca *tls.Certificate, begin time.Duration, ids ...string) []string {
		path := filepath.Join(dir, name+".pem")
		writeLeaf(t, path, ca, begin, ids...)
		return []string{"-cert", path, "-key", path}
	}
	const day = 24 * time.Hour
	before, ended := metrics(t), map[string]float64{}
	right := leaf("right", mesh, -time.Hour, account)
	for _, c := range []struct {
		name string
		args []string
		want string // the reason
	}{
		{"as a proxy does it", right, ""},
		{"TLS 1.2", append([]string{"-tls1_2"}, right...), "tls_version"},
		{"TLS 1.1", append([]string{"-tls1_1", "-cipher", "DEFAULT:@SECLEVEL=0"}, right...), "tls_version"},
		{"TLS 1.0", append([]string{"-tls1", "-cipher", "DEFAULT:@SECLEVEL=0"}, right...), "tls_version"},
		{"another ALPN", append([]string{"-alpn", "h2"}, right...), "tls_protocol"},
		{"no certificate", nil, "cert_missing"},
		{"a foreign CA", leaf("foreign", foreign, -time.Hour, account), "cert_untrusted"},
		{"an expired leaf", leaf("expired", mesh, -2*day, account), "cert_expired"},
		{"a leaf of tomorrow", leaf("tomorrow", mesh, day, account), "cert_not_yet_valid"},
		{"two URI SANs", leaf("two", mesh, -time.Hour, account, "spiffe://cluster.local/ns/shop/sa/called"), "cert_malformed"},
		{"another trust domain", leaf("domain", mesh, -time.Hour, "spiffe://other.test/ns/shop/sa/openssl"), "trust_domain"},
	} {
		logged := len(accessLog.String())
		args := c.args
		if !slices.Contains(args, "-alpn") {
			args = append([]string{"-alpn", mtls.Protocol}, args...)
		}
		out := sClient(t, args...)
		if (out == "hello") != (c.want == "") {
			t.Errorf("%s: heard %q", c.name, out)
		}
		shown := map[bool]string{true: account}[c.want == ""]
		eventually(t, patience, c.name, func() error {
			all, err := parseRecords(accessLog.String()[logged:])
			if err != nil {
				return err
			}
			for _, r := range all {
				if r.Direction == "inbound" && r.Server == on(openSSLPort).String() && r.Reason == c.want && r.PeerIdentity == shown && r.TimeTLS > 0 {
					return nil
				}
			}
			return errors.New("there is no such record")
		})
		of := map[bool]string{true: namespace, false: "unknown"}[c.want == ""]
		ended[fmt.Sprintf(closedInbound, c.want, of)]++
	}
	grown(t, before, ended)
}

// closedInbound is the series of called's connections that ended for a reason, of callers
// of a namespace.
const closedInbound = `weir_tcp_connections_closed_total{destination_namespace="shop",destination_service="unknown",destination_workload="called",direction="inbound",reason=%q,source_namespace=%q,source_workload="unknown"}`

// beStrict has the port demand mTLS, and waits until it does.
func beStrict(t *testing.T) {
	t.Helper()
	type object = map[string]any
	if err := node.Write("strict.yaml", object{
		"apiVersion": "policy.weirmesh.io/v1alpha1", "kind": "PeerAuthentication",
		"metadata": object{"namespace": namespace, "name": "openssl"},
		"spec":     object{"podSelector": object{"matchLabels": object{"app": called.App}}, "ports": []object{{"port": openSSLPort, "mode": "Strict"}}},
	}); err != nil {
		t.Fatal(err)
	}
	eventually(t, patience, "mTLS is not demanded", func() error {
		conn, err := net.Dial("tcp", on(openSSLPort).String())
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		_, _ = io.WriteString(conn, "hello")
		if _, err := io.ReadFull(conn, make([]byte, 5)); err == nil {
			return errors.New("the application is reached in plaintext")
		}
		return nil
	})
}

// sClient says hello from the node, whose connections nobody turns aside but called's
// proxy, and returns what comes back.
func sClient(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), clientTimeout)
	defer cancel()
	cmd := program(ctx, t, "openssl", append([]string{"s_client", "-quiet", "-no_ign_eof", "-connect", on(openSSLPort).String()}, args...)...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(stdin, "hello")
	got := make([]byte, len("hello"))
	n, _ := io.ReadFull(stdout, got)
	stdin.Close()
	_ = cmd.Wait() // it fails where it is refused
	return string(got[:n])
}

// meshCA is the CA of the node's agent.
func meshCA(t *testing.T) *tls.Certificate {
	t.Helper()
	document, err := os.ReadFile(filepath.Join(pod.NodeDir, "weir", "ca.json"))
	if err != nil {
		t.Fatal(err)
	}
	ring, err := identity.ParseKeyring(document)
	if err != nil {
		t.Fatal(err)
	}
	certificates, key, err := ring.Signs().PEM()
	if err != nil {
		t.Fatal(err)
	}
	ca, err := tls.X509KeyPair(certificates, key)
	if err != nil {
		t.Fatal(err)
	}
	return &ca
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// writeLeaf signs a certificate, with its key, that is valid for a day from that time on,
// counted from now.
func writeLeaf(t *testing.T, path string, ca *tls.Certificate, begin time.Duration, ids ...string) {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(begin), NotAfter: time.Now().Add(begin + 24*time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, id := range ids {
		uri, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, uri)
	}
	issuer := *ca.Leaf
	issuer.PublicKey = ca.PrivateKey.(crypto.Signer).Public() // it may not be the name's
	der, err := x509.CreateCertificate(rand.Reader, template, &issuer, &key.PublicKey, ca.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for _, block := range []*pem.Block{{Type: "CERTIFICATE", Bytes: der}, {Type: "PRIVATE KEY", Bytes: private}} {
		_ = pem.Encode(&out, block)
	}
	if err := os.WriteFile(path, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}
