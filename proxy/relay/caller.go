package relay

import (
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/http1"
	"github.com/weirmesh/weir/proxy/listen"
)

// The application learns who its caller is from one field of a request, in the form that
// Envoy has given it (config.core, x-forwarded-client-cert): "URI=" and a SPIFFE ID. It is
// there if the caller has shown an identity. Nobody else can say it: what a request
// brings under that name goes no further than here, on its way to the application. What
// the application says of itself to others is theirs to believe or not: their proxies do
// not let it in.
//
// A request whose trailers have the field is not for any application: of HTTP/2 they lose
// it, of HTTP/1, whose bytes have gone by before it is known what they are, it is refused.

// callerField is the field's name.
const callerField = "x-forwarded-client-cert"

// isCallerField reports whether a field would be callerField to an application: in any
// case, and with _ for -, which are the same to those that make a variable of it (CGI, RFC
// 3875, section 4.1.18, and what came of that).
func isCallerField[T []byte | string](name T) bool {
	if len(name) != len(callerField) {
		return false
	}
	for i := range len(callerField) {
		c := name[i]
		switch {
		case 'A' <= c && c <= 'Z':
			c |= 0x20
		case c == '_':
			c = '-'
		}
		if c != callerField[i] {
			return false
		}
	}
	return true
}

// introduce has a request, which goes to the application, say who sent it: a SPIFFE ID,
// empty of nobody who is known.
func introduce(caller string, m message) {
	for i := 0; i < m.Len(); {
		if isCallerField(m.Name(i)) {
			m.Remove(i)
		} else {
			i++
		}
	}
	if caller != "" {
		m.Add(callerField, "URI="+caller)
	}
}

// callerOf is who sends what comes on a connection: from outside who the peer has shown to
// be, else this very pod.
func (s *Server) callerOf(c listen.Conn) authz.Identity {
	if c.Direction == listen.Inbound || s.TLS == nil {
		return c.Identity
	}
	if own := s.TLS.Source.Current(); own != nil {
		return own.ID
	}
	return authz.Identity{}
}

// handedOver notes that a request goes to an endpoint of this very pod, and has it say who
// sent it.
func (s *Server) handedOver(c listen.Conn, m message, r *record) {
	r.sender = s.callerOf(c)
	introduce(r.sender.String(), m)
}

// bodyOf is how a request goes on.
func bodyOf(request *http1.Head) http1.Body {
	body := request.Body
	body.Withheld = callerField
	return body
}
