package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/weirmesh/weir/tests/pod"
)

// Pairs of peers that speak TLS 1.3 with each other, both with a certificate (ECDSA
// P-256), each verifying the other's, as Weir's proxies do.

// peerName is in the peers' certificate.
const peerName = "peer.test"

// credentials are files in PEM: a CA, a certificate with its key, and both apart.
type credentials struct{ ca, both, certificate, key string }

// newCredentials makes a CA and what it signs.
func (d *dataplane) newCredentials() (credentials, error) {
	c := credentials{
		ca: filepath.Join(d.dir, "ca.pem"), both: filepath.Join(d.dir, "peer.pem"),
		certificate: filepath.Join(d.dir, "peer.crt"), key: filepath.Join(d.dir, "peer.key"),
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return c, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return c, err
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: peerName}, DNSNames: []string{peerName}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	root, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return c, err
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	if err != nil {
		return c, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return c, err
	}
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	secret := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
	return c, errors.Join(
		os.WriteFile(c.ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root}), 0o644),
		os.WriteFile(c.certificate, certificate, 0o644), os.WriteFile(c.key, secret, 0o644),
		os.WriteFile(c.both, append(certificate, secret...), 0o644),
	)
}

// secureNginx starts one end: near the caller it speaks TLS upstream, else it takes it.
func (d *dataplane) secureNginx(ctx context.Context, p *pod.Pod, port uint16, to nexts, c credentials, near bool) (int, error) {
	server := fmt.Sprintf(`listen %d ssl reuseport; ssl_protocols TLSv1.3; ssl_certificate %s; ssl_certificate_key %s; ssl_client_certificate %s; ssl_verify_client on; location / { proxy_pass http://next;`,
		port, c.certificate, c.key, c.ca)
	if near {
		server = fmt.Sprintf(`listen %d reuseport; location / { proxy_pass https://next; proxy_ssl_protocols TLSv1.3; proxy_ssl_certificate %s; proxy_ssl_certificate_key %s; proxy_ssl_trusted_certificate %s; proxy_ssl_verify on; proxy_ssl_name %s;`,
			port, c.certificate, c.key, c.ca, peerName)
	}
	return d.startNginx(ctx, p, "secure", fmt.Sprintf(`  upstream next { server %s; keepalive 256; keepalive_requests 1000000000; keepalive_timeout 1h; }
  server { %s proxy_http_version 1.1; proxy_set_header Connection ""; } }
`, to.requests, server), d.startProxy)
}

// secureHAProxy is the same of HAProxy.
func (d *dataplane) secureHAProxy(ctx context.Context, p *pod.Pod, port uint16, to nexts, c credentials, near bool) (int, error) {
	bind := fmt.Sprintf("ssl crt %s ca-file %s verify required ssl-min-ver TLSv1.3", c.both, c.ca)
	server := ""
	if near {
		bind, server = "", fmt.Sprintf("ssl crt %s ca-file %s verify required verifyhost %s ssl-min-ver TLSv1.3", c.both, c.ca, peerName)
	}
	alpn := func(options, protocol string) string {
		if options == "" {
			return "proto " + protocol
		}
		return options + " alpn " + protocol
	}
	config := fmt.Sprintf(`global
  nbthread 1
  maxconn 4096
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  http-reuse always
listen requests
  bind :%d %s
  server next %s %s
listen streams
  bind :%d %s
  server next %s %s
listen source
  mode tcp
  bind :%d %s
  server next %s %s
listen sink
  mode tcp
  bind :%d %s
  server next %s %s
`, port, bind, to.requests, server, port+1, alpn(bind, "h2"), to.streams, alpn(server, "h2"), port+2, bind, to.source, server, port+3, bind, to.sink, server)
	file := filepath.Join(d.dir, p.ContainerID+"-secure.conf")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, haproxy, "-db", "-q", "-f", file)
	if err := d.startProxy(p, cmd); err != nil {
		return 0, err
	}
	go func() { _ = cmd.Wait() }()
	return cmd.Process.Pid, nil
}
