package relay

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/weirmesh/weir/proxy/balance"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
	"github.com/weirmesh/weir/proxy/upstream"
)

// Connections to a backend whose policy bounds them have a place each, from before
// they are dialled until they are closed, whatever they carry; and they are no other
// backend's. Where all places are taken an idle connection is closed for a new one;
// where none is idle, who needs one stands in line. The counts are the balancer's.
// Other backends' connections come by none of this.

// ownerOf is whose the connections to a backend are.
func ownerOf(b *route.Backend) upstream.Owner {
	if b.Policy == nil || b.Policy.Limits.Connections == 0 || len(b.Endpoints) == 0 {
		return upstream.Owner{}
	}
	return upstream.Owner{Service: b.Service, Port: b.Endpoints[0].Addr.Port()}
}

// place is that of a connection. The zero value is of a backend that needs none.
type place struct {
	server  *Server
	owner   upstream.Owner
	backend *route.Backend
}

// takePlace takes a place, and reports false if there is none.
func (s *Server) takePlace(b *route.Backend) (place, bool) {
	owner := ownerOf(b)
	if owner == (upstream.Owner{}) {
		return place{}, true
	}
	for !s.balancer.Admit(b, balance.Connections) {
		if !s.pool.CloseOne(owner) && !s.streams.closeIdle(owner) {
			return place{}, false
		}
	}
	kept := *b // the caller's is its request's
	return place{s, owner, &kept}, true
}

// free reports whether a connection would find a place now.
func (s *Server) free(b *route.Backend) bool {
	p, ok := s.takePlace(b)
	if ok {
		s.balancer.Leave(p.backend, balance.Connections) // and nobody is called for that
	}
	return ok
}

// leave is when the connection is closed, or could not be made.
func (p place) leave() {
	if p.server != nil {
		p.server.balancer.Leave(p.backend, balance.Connections)
		p.server.lines.call(p.owner)
	}
}

// keep has c leave its place when it is closed.
func (p place) keep(c *upstream.Conn) {
	if p.server != nil {
		c.OnClose = p.leave
	}
}

// lines are those who wait for connections, first come, first served.
type lines struct {
	mu sync.Mutex
	of map[upstream.Owner][]chan struct{} // closed when it is their turn
}

// empty reports whether nobody stands in a line. Where nobody's connections are
// counted, nobody ever does.
func (l *lines) empty(o upstream.Owner) bool {
	if o == (upstream.Owner{}) {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.of[o]) == 0
}

// join stands in line, in front if that was its turn already, and reports whether
// nobody is before it.
func (l *lines) join(o upstream.Owner, front bool) (chan struct{}, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	turn := make(chan struct{})
	if l.of == nil {
		l.of = map[upstream.Owner][]chan struct{}{}
	}
	at := len(l.of[o])
	if front {
		at = 0
	}
	l.of[o] = slices.Insert(l.of[o], at, turn)
	return turn, at == 0
}

// leave leaves the line. A turn that came, and is not used, is the next one's.
func (l *lines) leave(o upstream.Owner, turn chan struct{}) {
	l.mu.Lock()
	at := slices.Index(l.of[o], turn)
	if at >= 0 {
		l.remove(o, at)
	}
	l.mu.Unlock()
	if at < 0 {
		l.call(o)
	}
}

// call calls the first one: there is a place, or room on a connection.
func (l *lines) call(o upstream.Owner) {
	if o == (upstream.Owner{}) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.of[o]) > 0 {
		close(l.of[o][0])
		l.remove(o, 0)
	}
}

// remove takes one out. l.mu is held.
func (l *lines) remove(o upstream.Owner, at int) {
	if l.of[o] = slices.Delete(l.of[o], at, at+1); len(l.of[o]) == 0 {
		delete(l.of, o)
	}
}

// waiting waits for something, at most until then, and reports whether it is there.
type waiting func(something <-chan struct{}, until time.Time) (bool, error)

// stand calls try whenever it is the backend's turn, until it succeeds or fails, for
// somebody who was not to try or did so in vain. Errors are *reason.Error: circuit_open,
// or wait's or try's.
func (s *Server) stand(b *route.Backend, owner upstream.Owner, until time.Time, wait waiting, try func() (bool, error)) error {
	limits := b.Policy.Limits
	if !s.balancer.Admit(b, balance.Pending) {
		return &reason.Error{Reason: reason.CircuitOpen, Err: fmt.Errorf(
			"by TrafficPolicy %s: all %d connections are in use, and %d wait for one", b.Policy.Name, limits.Connections, limits.Pending)}
	}
	defer s.balancer.Leave(b, balance.Pending)
	for front := false; ; front = true {
		turn, first := s.lines.join(owner, front)
		if first {
			if ok, err := try(); ok || err != nil {
				s.lines.leave(owner, turn)
				return err
			}
		}
		if ok, err := wait(turn, until); !ok {
			s.lines.leave(owner, turn)
			if err == nil {
				err = &reason.Error{Reason: reason.CircuitOpen, Err: fmt.Errorf(
					"by TrafficPolicy %s: none of %d connections came free in time", b.Policy.Name, limits.Connections)}
			}
			return err
		}
	}
}

// patience is until when somebody waits for a connection whose request is to end by
// then; zero: never.
func (s *Server) patience(ends time.Time) time.Time {
	until := time.Now().Add(cmp.Or(s.dialer.Timeout, upstream.Timeout))
	if ends.IsZero() || until.Before(ends) {
		return until
	}
	return ends
}

// waitIn is the waiting of what has nobody else to look after.
func waitIn(ctx context.Context) waiting {
	return waitUnless(ctx.Done(), func() error { return &reason.Error{Reason: reason.Shutdown, Err: ctx.Err()} })
}

// waitUnless gives up when end is closed, with what why says then.
func waitUnless(end <-chan struct{}, why func() error) waiting {
	return func(something <-chan struct{}, until time.Time) (bool, error) {
		timer := time.NewTimer(time.Until(until))
		defer timer.Stop()
		select {
		case <-something:
			return true, nil
		case <-timer.C:
			return false, nil
		case <-end:
			return false, why()
		}
	}
}
