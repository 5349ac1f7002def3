package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/sniff"
	"github.com/weirmesh/weir/proxy/upstream"
)

// Between two pods of the mesh goes TLS (package mtls), on the port that the client
// dialled, whatever it carries. The client's proxy knows from the agent whose identity
// the endpoint has to show; the server's proxy knows a proxy's ClientHello by its ALPN,
// and goes on with what is inside as with a plain connection.

// helloTimeout is how long a plain client may stay silent before it is taken for one
// whose server speaks first. A proxy says hello with its first packet; one that comes
// later finds that the server has spoken, if that does, and tries again, hellos times.
const (
	helloTimeout = 30 * time.Millisecond
	hellos       = 3
)

// errNoTLS is that there is no identity that this proxy could have.
var errNoTLS = &reason.Error{Reason: reason.CertUnavailable, Err: fmt.Errorf("%w: it gets none", mtls.ErrOwn)}

// probes reports whether a request is a probe of the kubelet's, which has no identity and
// needs none.
func (s *Server) probes(c listen.Conn, port uint16, m message) bool {
	if c.Direction != listen.Inbound || m == nil || c.Identity.Known() {
		return false
	}
	probes := s.Config.Probes()
	if !probes.Of(c.Peer.Addr(), port) {
		return false
	}
	_, upgrades := m.Header("upgrade")
	return probes.Match(c.Peer.Addr(), port, m.Method(), m.RawPath(), m.Query(), upgrades)
}

// errConnected is a client that wanted to connect and no more, as a probe does. It may
// read on: where mTLS is demanded the application must not be asked what it has to say.
var errConnected = errors.New("the client has nothing to say")

// meet finds out whether an inbound connection is a proxy's, and if so, who its caller
// is. One that is not has its bytes in client's buffer, if any came.
func (s *Server) meet(ctx context.Context, c *listen.Conn, client *conn) error {
	mode := s.Config.Peers(c.Original.Port())
	if s.TLS == nil && mode != route.Strict || mode == route.Disable && len(client.bytes()) == 0 {
		return nil
	}
	silence := s.Hello
	if silence == 0 {
		silence = helloTimeout
	}
	if mode == route.Strict {
		silence = mtls.Timeout // no server is kept waiting
	}
	hello, err := s.hello(client, silence)
	switch {
	case err != nil:
		return &reason.Error{Reason: reason.ClientGone, Err: err}
	case hello == sniff.HelloOffers, hello == sniff.HelloOther && mode == route.Strict:
		return s.accepts(ctx, c, client)
	case mode != route.Strict:
		return nil
	case client.eof && len(client.bytes()) == 0:
		return errConnected
	case hello == sniff.HelloNone && len(client.bytes()) > 0 && s.Config.Probes().Of(c.Peer.Addr(), c.Original.Port()):
		return nil
	}
	return &reason.Error{Reason: reason.PlaintextRefused, Err: fmt.Errorf("port %d", c.Original.Port())}
}

// hello reads until it is clear whether a client says hello, or until it has not for
// the time of silence, or taken too long.
func (s *Server) hello(client *conn, silence time.Duration) (sniff.Hello, error) {
	defer client.readBy(time.Time{})
	begun := len(client.bytes()) > 0
	client.readBy(time.Now().Add(silence))
	for {
		if hello := sniff.LookHello(client.bytes(), mtls.Protocol); hello != sniff.HelloUndecided {
			return hello, nil
		}
		if len(client.bytes()) > 0 && !begun {
			begun = true
			client.readBy(time.Now().Add(mtls.Timeout))
		}
		err := client.fill()
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, os.ErrDeadlineExceeded):
			return sniff.HelloNone, nil
		case err != nil:
			return sniff.HelloNone, err
		}
	}
}

// accepts shakes hands with a client that said hello.
func (s *Server) accepts(ctx context.Context, c *listen.Conn, client *conn) error {
	if s.TLS == nil {
		return errNoTLS
	}
	own, err := s.TLS.Own(ctx)
	if err != nil {
		return err
	}
	first := bytes.Clone(client.bytes())
	client.drop()
	began := time.Now()
	secure, err := s.TLS.Server(ctx, c.TCPConn, own, first, s.takes(c.Original.Port())...)
	c.Handshake = time.Since(began)
	if err != nil {
		return err
	}
	client.secure, c.ID, c.Identity = secure, secure.Peer(), authz.ParseIdentity(secure.Peer())
	return nil
}

// mayBeProxy reports whether a client may be a proxy that has not said hello yet.
func (s *Server) mayBeProxy(c listen.Conn, client *conn) bool {
	return c.Direction == listen.Inbound && s.TLS != nil && client.secure == nil
}

// saysHello reports whether an inbound client that was not waited for may be a proxy.
func (s *Server) saysHello(c listen.Conn, client *conn) bool {
	return s.mayBeProxy(c, client) && len(client.bytes()) > 0 && sniff.LookHello(client.bytes(), mtls.Protocol) != sniff.HelloNone
}

// reach connects to an endpoint, with mTLS if it has to show its identity. One of this
// very pod is not gone to through a proxy.
func (s *Server) reach(ctx context.Context, c listen.Conn, e route.Endpoint) (*upstream.Conn, error) {
	if !s.shows(e) {
		return s.dial(ctx, c, e.Addr)
	}
	return s.dialSecure(ctx, e)
}

// shows reports whether an endpoint has to show its identity.
func (s *Server) shows(e route.Endpoint) bool {
	return e.Identity != "" && !s.Config.Own(e.Addr.Addr())
}

// dialSecure connects to an endpoint with mTLS. Errors are *reason.Error: the Dialer's,
// mtls's, which are mtls.ErrOwn if it is not the endpoint's fault.
func (s *Server) dialSecure(ctx context.Context, e route.Endpoint, better ...string) (*upstream.Conn, error) {
	if s.TLS == nil {
		return nil, errNoTLS
	}
	own, err := s.TLS.Own(ctx)
	if err == nil {
		err = own.Valid()
	}
	if err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		up, err := s.dialer.Dial(ctx, e.Addr)
		if err != nil {
			return nil, err
		}
		began := time.Now()
		up.Secure, err = s.TLS.Client(ctx, up.TCPConn, own, e.Identity, better...)
		if err == nil {
			up.Handshake, up.Trust = time.Since(began), own.Trust
			return up, nil
		}
		if up.Looped() {
			err = &reason.Error{Reason: reason.Loop}
		}
		up.Close()
		if try == hellos || !mtls.Overtaken(err) {
			return nil, err
		}
	}
}

// keyOf is where the connections to an endpoint are kept.
func (s *Server) keyOf(owner upstream.Owner, e route.Endpoint) upstream.Key {
	key := upstream.Key{Addr: e.Addr, Owner: owner}
	if s.TLS != nil && s.shows(e) {
		key.Identity, key.Trust = e.Identity, s.TLS.Trust()
	}
	return key
}

// overtime is how long after its certificates' end a client's connection goes on that is
// not used: a proxy that calls has let go of it by then, and no request crosses the end.
const overtime = 2 * time.Second

// endsWith has an inbound connection end soon once a certificate has that it was made
// with: whoever is at its other end has to show another. What it returns is called when
// the connection has ended.
func endsWith(secure *mtls.Conn, drain func()) func() bool {
	if secure == nil {
		return func() bool { return false }
	}
	return time.AfterFunc(time.Until(secure.Until().Add(overtime)), drain).Stop
}

// secured is an upstream connection whose bytes go through TLS, for package http2.
type secured struct {
	*mtls.Conn
	dialled *upstream.Conn
}

// stream is the connection as package http2 wants it.
func stream(c *upstream.Conn) net.Conn {
	if c.Secure == nil {
		return c
	}
	return secured{c.Secure, c}
}

// Close closes the socket, and forgets its addresses.
func (s secured) Close() error { return s.dialled.Close() }

// NetConn is the socket.
func (s secured) NetConn() net.Conn { return s.dialled }

// refused reports whether a failure of the connection is that its server, a proxy, did
// not take this client: nothing of what was sent has been heeded. It says so after the
// handshake, so writing may fail before it is read.
func (c *conn) refused(err error) bool {
	if c.secure == nil {
		return false
	}
	if errors.Is(err, mtls.ErrRefused) {
		return true
	}
	if c.stream == nil {
		_, err = c.secure.Peek(make([]byte, 1))
	}
	return errors.Is(err, mtls.ErrRefused)
}
