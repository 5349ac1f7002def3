package relay

import (
	"cmp"
	"context"
	"errors"
	"io"
	"os"
	"time"

	"github.com/weirmesh/weir/proxy/balance"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/sniff"
	"github.com/weirmesh/weir/proxy/upstream"
)

// sniffTimeout is how long the rest of a request line may take, on a port that
// nobody declares, once its beginning is there, and its beginning, once no server was
// found.
const sniffTimeout = 100 * time.Millisecond

// prefaceTimeout is how long a client may be silent whose server has spoken HTTP/2: it
// is a client of that, unless it has something to ask of the server's settings first.
const prefaceTimeout = time.Second

// identify finds out what c carries, and carries it. It returns the number of
// requests that were logged.
//
// On a port that nobody declares, the upstream connection is opened while the
// client is silent: who speaks first decides, and a server that speaks first has
// not waited for us. Servers of HTTP/2 do: what they say tells.
func (s *Server) identify(ctx context.Context, c listen.Conn, client *conn, d route.Destination, r *record) (int, error) {
	if client.secure != nil && client.secure.Streams() {
		return s.serveStreams(ctx, c, client.secure, d)
	}
	declared := d.Protocol
	switch {
	case s.Config.Opaque(c.Original.Port()), d.Routes != nil && d.Routes.Kind == route.TCPRoute:
		declared = route.Opaque
	case d.Routes != nil && d.Routes.Kind == route.HTTPRoute && declared == route.Undeclared:
		declared = route.HTTP
	case d.Routes != nil && d.Routes.Kind == route.GRPCRoute:
		declared = route.HTTP2
	}
	var early *upstream.Conn
	var picked pick
	protocol, opaque := sniff.Opaque, declared == route.Opaque
	switch {
	case opaque && !s.mayBeProxy(c, client):
	case opaque, declared == route.Undeclared:
		silence, refused := s.refusedOpaque(c)
		if opaque {
			silence = refusedSilence // no request of HTTP is waited for
		}
		if refused {
			// No connection is opened for whom nothing but a request is allowed.
			protocol = s.look(client, time.Now().Add(silence))
		} else {
			var err error
			if early, picked, err = s.overture(ctx, c, client, d, r); err != nil {
				return 0, err
			}
		}
		if s.saysHello(c, client) {
			if early != nil {
				early.Close()
				picked.done(balance.Unknown)
			}
			err := s.meet(ctx, &c, client)
			r.met(c)
			if err != nil {
				return 0, err
			}
			if client.secure != nil {
				return s.identify(ctx, c, client, d, r)
			}
			early, picked = nil, pick{}
		}
		switch {
		case opaque:
			protocol = sniff.Opaque
		case !refused && len(client.bytes()) > 0:
			protocol = s.look(client, time.Now().Add(sniffTimeout))
		case early != nil && speaksHTTP2(early):
			protocol = s.look(client, time.Now().Add(prefaceTimeout))
		}
	default:
		protocol = s.look(client, time.Now().Add(keepAlive))
		if protocol == sniff.Opaque && len(client.bytes()) > 0 {
			protocol = sniff.HTTP1 // its parser says what is wrong with it
		}
	}
	if protocol == sniff.HTTP2 {
		return s.serveHTTP2(ctx, c, client, d, early, picked)
	}
	if protocol != sniff.HTTP1 {
		return 0, s.relay(ctx, c, client, d, early, picked, r)
	}
	var first *httpUpstream
	if early != nil {
		var err error
		if first, err = newHTTPUpstream(early, r.endpoint); err != nil {
			picked.done(balance.Unknown)
			return 0, &reason.Error{Reason: reason.UpstreamClosed, Err: err}
		}
		if first.picked, first.shared = picked, !own(c, d); first.shared {
			first.owner = ownerOf(picked.backend)
		}
		first.took = r.entry.Connect
	}
	return s.serveHTTP1(ctx, c, client, first)
}

// overture waits until either side has something to say. It returns the upstream
// connection if one was opened; the client's bytes are in its buffer if it was the
// client.
func (s *Server) overture(ctx context.Context, c listen.Conn, client *conn, d route.Destination, r *record) (*upstream.Conn, pick, error) {
	if len(client.bytes()) > 0 {
		return nil, pick{}, nil
	}
	err := client.tryFill()
	switch {
	case err == nil, errors.Is(err, io.EOF):
		return nil, pick{}, nil // what it is, is passed on
	case !errors.Is(err, os.ErrDeadlineExceeded):
		return nil, pick{}, &reason.Error{Reason: reason.ClientGone, Err: err}
	}
	up, picked, err := s.connect(ctx, c, d, r)
	if err != nil {
		if asks(client) {
			return nil, pick{}, nil // what is a request is answered, and told why
		}
		return nil, pick{}, err
	}
	if err := awaitEither(client, up); err != nil {
		_ = up.SetLinger(0)
		up.Close()
		picked.done(balance.Unknown)
		return nil, pick{}, err
	}
	return up, picked, nil
}

// asks reports whether a client says something to whom no server was found. That may be
// clear, and its connection at its end, before its first bytes are there.
func asks(client *conn) bool {
	client.readBy(time.Now().Add(sniffTimeout))
	defer client.readBy(time.Time{})
	return client.fill() == nil
}

// awaitEither returns when one of them has something to say; the client's bytes
// are in its buffer then. A failure of one is a *reason.Error.
func awaitEither(client *conn, up *upstream.Conn) error {
	server, err := newUpstreamConn(up)
	if err != nil {
		return &reason.Error{Reason: reason.UpstreamClosed, Err: err}
	}
	spoke := make(chan error, 1)
	go func() {
		err := server.awaitReadable()
		_ = client.SetReadDeadline(time.Unix(1, 0))
		spoke <- err
	}()
	clientFailed := client.awaitReadable()
	_ = server.SetReadDeadline(time.Unix(1, 0))
	serverFailed := <-spoke
	_ = server.SetReadDeadline(time.Time{})
	_ = client.SetReadDeadline(time.Time{})
	switch {
	case up.Looped():
		return &reason.Error{Reason: reason.Loop}
	case serverFailed != nil && !errors.Is(serverFailed, os.ErrDeadlineExceeded):
		return &reason.Error{Reason: reason.UpstreamClosed, Err: serverFailed}
	case clientFailed != nil && !errors.Is(clientFailed, os.ErrDeadlineExceeded):
		return &reason.Error{Reason: reason.ClientGone, Err: clientFailed}
	}
	err = client.tryFill()
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) {
		return &reason.Error{Reason: reason.ClientGone, Err: err}
	}
	return nil
}

// speaksHTTP2 reports whether what has come of a server is HTTP/2, and does not take it.
func speaksHTTP2(up *upstream.Conn) bool {
	server, err := newUpstreamConn(up)
	if err != nil {
		return false
	}
	var first [16]byte
	n, _ := server.peek(server.socket, first[:])
	return sniff.SpeaksHTTP2(first[:n])
}

// look reads until it is clear what the client speaks, or until the time is up,
// when it is nothing known.
func (s *Server) look(client *conn, until time.Time) sniff.Protocol {
	defer client.readBy(time.Time{})
	begun := false
	for {
		if p := sniff.Look(client.bytes()); p != sniff.Undecided {
			return p
		}
		if len(client.bytes()) > 0 && !begun {
			begun = true
			if head := time.Now().Add(cmp.Or(s.Head, headTimeout)); head.Before(until) {
				until = head
			}
		}
		client.readBy(until)
		if client.fill() != nil {
			return sniff.Opaque
		}
	}
}
