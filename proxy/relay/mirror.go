package relay

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/weirmesh/weir/proxy/http1"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/route"
)

const (
	// maxMirrors are under way at a time; more are not sent: a mirror that is slow
	// costs the request nothing.
	maxMirrors = 64
	// mirrorTimeout bounds one.
	mirrorTimeout = 15 * time.Second
)

// mirror sends copies of the request to where its filters have them go. A request
// that is larger than the buffer is not copied.
func (h *http1Conn) mirror() {
	for _, f := range h.plan.filters {
		if f == nil {
			continue
		}
		for i := range f.Mirrors {
			if m := &f.Mirrors[i]; h.body.Done() && m.Meant(rand.Uint32()) {
				h.copyTo(&m.Backend)
			}
		}
	}
}

func (h *http1Conn) copyTo(backend *route.Backend) {
	if h.mirrors.Add(1) > maxMirrors {
		h.mirrors.Add(-1)
		return
	}
	text := h.request.AppendTo(nil, http1.Silent)
	text = append(text, h.client.bytes()[len(h.request.Raw()):h.taken]...)
	h.handlers.Add(1)
	go h.sendMirror(h.outer, h.accepted, backend, text, slices.Clone(h.method))
}

// sendMirror sends a copy and reads the answer, which nobody sees.
func (s *Server) sendMirror(ctx context.Context, c listen.Conn, backend *route.Backend, text, method []byte) {
	defer s.handlers.Done()
	defer s.mirrors.Add(-1)
	m := &http1Conn{Server: s, accepted: c, method: method, record: newRecord(c)}
	m.plan.backend, m.plan.key.Client = *backend, c.Peer.Addr()
	f, ok, err := m.find(ownerOf(backend), nil, false)
	if !ok || err != nil {
		return // it waits for no connection
	}
	if text, err = m.authorizeCopy(f.endpoint, text); err != nil {
		f.leave()
		return
	}
	up, err := m.use(ctx, f)
	if err != nil {
		return
	}
	m.up = up
	up.readBy(time.Now().Add(mirrorTimeout))
	err = m.exchange(up, text)
	up.picked.done(outcome(m.response.Status, err))
	if err != nil {
		m.discard()
	}
	m.giveBack(time.Now())
}

// authorizeCopy is authorizeOwn for a copy, and returns it as the endpoint is to have it.
func (h *http1Conn) authorizeCopy(endpoint route.Endpoint, text []byte) ([]byte, error) {
	if !h.Config.Own(endpoint.Addr.Addr()) {
		return text, nil
	}
	var scan http1.Scanner
	n, err := scan.End(text)
	if err == nil {
		err = h.request.ParseRequest(text[:n])
	}
	if err != nil {
		return nil, err
	}
	h.view = http1Request{Head: &h.request}
	h.handedOver(h.accepted, &h.view, h.record)
	err = h.authorizeOwn(endpoint)
	return append(h.request.AppendTo(nil, http1.Silent), text[n:]...), err
}

// exchange sends text and drops the answer.
func (h *http1Conn) exchange(up *httpUpstream, text []byte) error {
	if _, err := up.Write(text); err != nil {
		return up.failed(err)
	}
	for {
		var scan http1.Scanner
		n := 0
		for n == 0 {
			var err error
			if n, err = scan.End(up.bytes()); err != nil {
				return err
			}
			if n == 0 {
				if err := up.fill(); err != nil {
					return up.failed(err)
				}
			}
		}
		if err := h.response.ParseResponse(up.bytes()[:n], h.method); err != nil {
			return err
		}
		up.skip(n)
		if h.response.Status/100 != 1 {
			break
		}
	}
	up.spent = h.response.Close || h.response.Status == 101
	for body := h.response.Body; !body.Done() && body.Kind != http1.Tunnel; {
		n, err := body.Next(up.bytes())
		if err != nil {
			return err
		}
		up.skip(n)
		if body.Done() {
			break
		}
		if err := up.fill(); err != nil {
			return up.failed(err)
		}
	}
	return nil
}
