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
	"strings"
	"syscall"
	"time"

	"github.com/weirmesh/weir/tests/cluster"
)

const (
	suiteModule = home + "/suite"
	echoModule  = home + "/build/echo"
	// suitePackage is upstream's, with its own test.
	suitePackage = "sigs.k8s.io/gateway-api/conformance"
	// echoImage is what the suite's manifests run.
	echoImage = "registry.k8s.io/gateway-api/echo-advanced:v1.5.1"
	weirImage = "out/weir-image.tar" // of `make image`
)

// programs are what a run needs beside the cluster's.
type programs struct {
	suite     string // the suite's test program
	crds      string // folder of the Gateway API's CRDs, standard channel
	manifests string // folder of the routes of the suite's mesh tests
	echo      string // archive of echoImage
}

// build makes the programs and images; all but Weir's own are there after the first
// time.
func (j *job) build(ctx context.Context) (programs, error) {
	p := programs{suite: filepath.Join(j.work, "suite"), echo: filepath.Join(j.work, "echo.tar")}
	j.step("building the suite")
	if _, err := command(ctx, "go", "test", "-C", suiteModule, "-c", "-ldflags=-s -w", "-o", p.suite, suitePackage); err != nil {
		return p, fmt.Errorf("the suite: %w", err)
	}
	for _, folder := range []struct {
		path   *string
		module string
		inside string
	}{
		{&p.crds, "sigs.k8s.io/gateway-api", "config/crd/standard"},
		{&p.manifests, "sigs.k8s.io/gateway-api/conformance", "tests/mesh"},
	} {
		dir, err := command(ctx, "go", "list", "-C", suiteModule, "-m", "-f", "{{.Dir}}", folder.module)
		if err != nil {
			return p, fmt.Errorf("the suite's manifests: %w", err)
		}
		*folder.path = filepath.Join(strings.TrimSpace(dir), folder.inside)
	}
	j.step("building images")
	if err := j.buildEcho(ctx, p.echo); err != nil {
		return p, fmt.Errorf("image of echo: %w", err)
	}
	if _, err := command(ctx, "make", "--no-print-directory", "image"); err != nil {
		return p, fmt.Errorf("image of Weir: %w", err)
	}
	return p, nil
}

// buildEcho makes the image of pkg/test/echo/docker/Dockerfile.app in Istio's
// source: two programs, and a key and a certificate for port 8443.
func (j *job) buildEcho(ctx context.Context, archive string) error {
	echo := cluster.Module{Name: "echo", Version: "v1.5.1", Packages: "tool"}
	bin, err := echo.Build(ctx, echoModule, "", j.step)
	if err != nil {
		return err
	}
	certificate, key, err := selfSigned("echo")
	if err != nil {
		return err
	}
	return cluster.BuildImage(archive, cluster.Image{
		Ref: echoImage,
		Files: map[string]string{
			"/usr/local/bin/client": filepath.Join(bin, "client"),
			"/usr/local/bin/server": filepath.Join(bin, "server"),
		},
		Data:       map[string][]byte{"/cert.crt": certificate, "/cert.key": key},
		Entrypoint: []string{"/usr/local/bin/server"},
		User:       "1338",
	})
}

// selfSigned makes a certificate for a name, good for a day, and its key, as PEM.
func selfSigned(name string) ([]byte, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), nil
}

// command runs a program and returns its output; the error carries what it said.
func command(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	// go and make end what they have started themselves.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Env = append(os.Environ(), "GOWORK=off")
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return "", fmt.Errorf("%s: %w: %s", name, err, exit.Stderr)
		}
		return "", err
	}
	return string(out), nil
}
