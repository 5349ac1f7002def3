package mtls_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/mtls/mtlstest"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/sock/socktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	front = mtlstest.ID("shop", "front")
	back  = mtlstest.ID("shop", "back")
)

// sockets are the two ends of a connection.
func sockets(t testing.TB) (*net.TCPConn, *net.TCPConn) {
	t.Helper()
	client, server := socktest.Connected(t, "tcp", "127.0.0.1:0")
	t.Cleanup(func() { server.Close() })
	return client.(*net.TCPConn), server.(*net.TCPConn)
}

// serverSide shakes hands as a server that has no more to say than why it does not.
func serverSide(tcp *net.TCPConn, id *mtls.Identity) (*mtls.Conn, error) {
	c, err := (&mtls.Handshaker{}).Server(context.Background(), tcp, id, nil)
	if err != nil {
		_ = tcp.CloseWrite()
	}
	return c, err
}

type shaken struct {
	conn *mtls.Conn
	err  error
}

// meet has two identities shake hands.
func meet(t testing.TB, client, server *mtls.Identity, expected string) (shaken, shaken) {
	t.Helper()
	clientTCP, serverTCP := sockets(t)
	served := make(chan shaken, 1)
	go func() {
		c, err := serverSide(serverTCP, server)
		served <- shaken{c, err}
	}()
	c, err := (&mtls.Handshaker{}).Client(t.Context(), clientTCP, client, expected)
	if err != nil {
		_ = clientTCP.CloseWrite()
	}
	return shaken{c, err}, <-served
}

func why(err error) reason.Reason {
	var e *reason.Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return reason.None
}

func TestEachEndLearnsWhoTheOtherIs(t *testing.T) {
	ca := mtlstest.NewCA(t)
	client, server := meet(t, ca.Identity(front, nil), ca.Identity(back, nil), back)
	if client.err != nil || server.err != nil {
		t.Fatal(client.err, server.err)
	}
	if client.conn.Peer() != back || server.conn.Peer() != front {
		t.Errorf("%q met %q", server.conn.Peer(), client.conn.Peer())
	}
}

// TestKeysAreAgreedOnAsAskedFor, in one round trip, also where one end leaves out what the
// other would rather have.
func TestKeysAreAgreedOnAsAskedFor(t *testing.T) {
	ca := mtlstest.NewCA(t)
	for _, c := range []struct {
		client, server bool // classic
		want           tls.CurveID
	}{
		{false, false, tls.X25519MLKEM768},
		{true, true, tls.X25519},
		{true, false, tls.X25519},
		{false, true, tls.X25519},
	} {
		clientTCP, serverTCP := sockets(t)
		served := make(chan shaken, 1)
		go func() {
			h := &mtls.Handshaker{Classic: func() bool { return c.server }}
			s, err := h.Server(context.Background(), serverTCP, ca.Identity(back, nil), nil)
			served <- shaken{s, err}
		}()
		h := &mtls.Handshaker{Classic: func() bool { return c.client }}
		client, err := h.Client(t.Context(), clientTCP, ca.Identity(front, nil), back)
		server := <-served
		if err != nil || server.err != nil {
			t.Errorf("%+v: %v, %v", c, err, server.err)
			continue
		}
		for _, state := range []tls.ConnectionState{client.State(), server.conn.State()} {
			if state.CurveID != c.want || state.HelloRetryRequest {
				t.Errorf("%+v: %s, tried again: %v", c, state.CurveID, state.HelloRetryRequest)
			}
		}
	}
}

// forged is what is wrong with a certificate, and what either end makes of it.
var forged = []struct {
	name   string
	id     string // in its certificate
	change func(*x509.Certificate)
	want   reason.Reason
	detail string
}{
	{name: "expired", change: func(c *x509.Certificate) {
		c.NotAfter = time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
		c.NotBefore = c.NotAfter.Add(-time.Hour)
	}, want: reason.CertExpired, detail: "expired at 2020-01-02T03:04:05Z"},
	{name: "of the future", change: func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(10*time.Minute), time.Now().Add(time.Hour)
	}, want: reason.CertNotYetValid, detail: "here it is"},
	{name: "with two IDs", change: func(c *x509.Certificate) {
		c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: mtlstest.TrustDomain, Path: "/ns/shop/sa/admin"})
	}, want: reason.CertMalformed, detail: "2 URI SANs"},
	{name: "without an ID", change: func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"back.shop"} },
		want: reason.CertMalformed, detail: "0 URI SANs"},
	{name: "that is a CA's", change: func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true },
		want: reason.CertMalformed, detail: "a CA's"},
	{name: "for something else", change: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} },
		want: reason.CertMalformed, detail: "incompatible key usage"},
	{name: "of another scheme", id: "https://cluster.test/ns/shop/sa/back", want: reason.CertMalformed, detail: "scheme"},
	{name: "of no service account", id: "spiffe://cluster.test/shop/back", want: reason.CertMalformed, detail: "no service account"},
	{name: "of a path too long", id: "spiffe://cluster.test/ns/shop/sa/back/x", want: reason.CertMalformed, detail: "no service account"},
	{name: "of another trust domain", id: "spiffe://cluster.evil/ns/shop/sa/back", want: reason.TrustDomain, detail: "cluster.evil"},
}

func TestWhatIsWrongWithTheServerIsSaid(t *testing.T) {
	ca := mtlstest.NewCA(t)
	good := ca.Identity(front, nil)
	for _, f := range forged {
		id := f.id
		if id == "" {
			id = back
		}
		client, server := meet(t, good, ca.Identity(id, f.change), id)
		if got := why(client.err); got != f.want || !strings.Contains(client.err.Error(), f.detail) {
			t.Errorf("%s: %v, want %s: %s", f.name, client.err, f.want, f.detail)
		}
		if got := why(server.err); got != reason.TLSRefused {
			t.Errorf("%s: the server says %v", f.name, server.err)
		}
	}
}

func TestWhatIsWrongWithTheClientIsSaid(t *testing.T) {
	ca := mtlstest.NewCA(t)
	good := ca.Identity(back, nil)
	for _, f := range forged {
		id := f.id
		if id == "" {
			id = front
		}
		client, server := meet(t, ca.Identity(id, f.change), good, back)
		if got := why(server.err); got != f.want || !strings.Contains(server.err.Error(), f.detail) {
			t.Errorf("%s: %v, want %s: %s", f.name, server.err, f.want, f.detail)
		}
		if client.err != nil {
			continue // it heard of it before its own handshake was over
		}
		_ = client.conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := client.conn.Read(make([]byte, 1)); !errors.Is(err, mtls.ErrRefused) {
			t.Errorf("%s: the client reads %v", f.name, err)
		}
	}
}

func TestTheVeryOneThatWasPickedIsDemanded(t *testing.T) {
	ca := mtlstest.NewCA(t)
	client, _ := meet(t, ca.Identity(front, nil), ca.Identity(mtlstest.ID("shop", "other"), nil), back)
	if why(client.err) != reason.PeerIdentity {
		t.Errorf("%v", client.err)
	}
}

func TestAForeignCAIsRefusedByEitherEnd(t *testing.T) {
	ours, theirs := mtlstest.NewCA(t), mtlstest.NewCA(t)
	client, _ := meet(t, ours.Identity(front, nil), theirs.Identity(back, nil), back)
	if why(client.err) != reason.CertUntrusted {
		t.Errorf("the client: %v", client.err)
	}
	stranger := theirs.Identity(front, nil)
	stranger.Roots = ours.Identity(front, nil).Roots
	_, server := meet(t, stranger, ours.Identity(back, nil), back)
	if why(server.err) != reason.CertUntrusted {
		t.Errorf("the server: %v", server.err)
	}
}

// TestOtherTLSIsRefusedWithWhatItLacks: what a client may send that is none of ours.
func TestOtherTLSIsRefusedWithWhatItLacks(t *testing.T) {
	ca := mtlstest.NewCA(t)
	server, client := ca.Identity(back, nil), ca.Identity(front, nil)
	for _, c := range []struct {
		name   string
		change func(*tls.Config)
		want   reason.Reason
	}{
		{"TLS 1.2", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, reason.TLSVersion},
		{"TLS 1.0", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }, reason.TLSVersion},
		{"another protocol", func(c *tls.Config) { c.NextProtos = []string{"h2"} }, reason.TLSProtocol},
		{"no protocol", func(c *tls.Config) { c.NextProtos = nil }, reason.TLSProtocol},
		{"no certificate", func(c *tls.Config) { c.Certificates = nil }, reason.CertMissing},
	} {
		t.Run(c.name, func(t *testing.T) {
			clientTCP, serverTCP := sockets(t)
			config := &tls.Config{
				NextProtos: []string{mtls.Protocol}, Certificates: []tls.Certificate{*client.Certificate}, InsecureSkipVerify: true,
			}
			c.change(config)
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				_, _ = tls.Client(clientTCP, config).Read(make([]byte, 1))
			}()
			if _, err := serverSide(serverTCP, server); why(err) != c.want {
				t.Errorf("%v, want %s", err, c.want)
			}
			<-ended
		})
	}
}

func TestAHandshakeEndsWithItsContext(t *testing.T) {
	ca := mtlstest.NewCA(t)
	clientTCP, _ := sockets(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (&mtls.Handshaker{}).Client(ctx, clientTCP, ca.Identity(front, nil), back); why(err) != reason.Shutdown {
		t.Errorf("%v", err)
	}
}

func TestTheOwnCertificateIsWaitedForAndLookedAt(t *testing.T) {
	ca := mtlstest.NewCA(t)
	source := &mtlstest.Source{}
	h := &mtls.Handshaker{Source: source, Patience: time.Millisecond}
	if _, err := h.Own(t.Context()); why(err) != reason.CertUnavailable || !errors.Is(err, mtls.ErrOwn) || h.Trust() != 0 {
		t.Errorf("without one: %v", err)
	}
	h.Patience = 0
	got := make(chan error, 1)
	go func() {
		_, err := h.Own(context.Background())
		got <- err
	}()
	source.Set(ca.Identity(front, nil))
	if err := <-got; err != nil || h.Trust() != 1 || source.Current().Valid() != nil {
		t.Errorf("one that comes: %v", err)
	}
	for _, f := range forged[:2] {
		if err := ca.Identity(front, f.change).Valid(); why(err) != f.want || !errors.Is(err, mtls.ErrOwn) || !strings.Contains(err.Error(), "/sa/front") {
			t.Errorf("%s: %v", f.name, err)
		}
	}
}
