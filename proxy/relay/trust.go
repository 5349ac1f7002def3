package relay

import (
	"net"
	"time"

	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/upstream"
)

// Roots that are trusted may go: a CA's key was stolen, or another CA has taken over.
// What goes on with peers that hang on them ends, without a request failing: a client's
// connection that carries HTTP ends with the requests that it carries, or when it was
// idle for a moment; and no other request begins on a connection to an endpoint which was
// made under other roots. What is not HTTP is reset, as nobody knows where it could end.

// review begins one of connections that go on.
func (s *Server) review() *mtls.Review {
	if s.TLS == nil {
		return &mtls.Review{}
	}
	return s.TLS.Review()
}

// distrust has the connection end if its client is trusted no more.
func (h *http1Conn) distrust(review *mtls.Review) {
	if review.Check(h.client.secure) != nil {
		h.estrange()
	}
}

// estrange has the connection end with the request that it carries.
func (h *http1Conn) estrange() {
	if !h.strange.Swap(true) {
		h.drain()
	}
}

// distrust has the connection end if its client is trusted no more; and what leads to
// endpoints, as outdated has it.
func (h *http2Conn) distrust(review *mtls.Review) {
	if review.Check(h.peer) != nil {
		h.server.Drain()
	}
	if h.own != nil {
		h.own.Review()
	}
}

// outdated reports whether a connection to an endpoint was made under other roots than
// those of now, or with a certificate that has ended.
func (s *Server) outdated(c *upstream.Conn, now time.Time) bool {
	return c.Secure != nil && c.Trust != s.TLS.Trust() || pastEnd(c, now)
}

// pastEnd reports whether a certificate has ended that a connection was made with.
func pastEnd(c *upstream.Conn, now time.Time) bool {
	return c.Secure != nil && !now.Before(c.Secure.Until())
}

// usable is outdated for package http2.
func (s *Server) usable(c net.Conn) bool {
	to, secure := c.(secured)
	return !secure || !s.outdated(to.dialled, time.Now())
}

// closeOutdated closes connections that are kept for others and outdated.
func (s *Server) closeOutdated() {
	if s.TLS == nil {
		return
	}
	trust := s.TLS.Trust()
	s.pool.CloseAll(func(k upstream.Key) bool { return k.Identity != "" && k.Trust != trust })
	s.streams.review()
	s.sessions.review(trust)
}

// review has connections that are outdated end with their streams.
func (c *http2Clients) review() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, client := range c.by {
		client.Review()
	}
}
