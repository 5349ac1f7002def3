package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/weirmesh/weir/proxy/balance"
	"github.com/weirmesh/weir/proxy/http1"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
)

// message is a request as its codec has it: what routes look at, and what they may
// change.
type message interface {
	route.Request
	route.Fields
	Name(i int) []byte  // of field i, as it came
	Value(i int) []byte // of field i
	// Prepare makes Path canonical; false: it has no such form.
	Prepare() bool
	// RawPath is the path as it came.
	RawPath() []byte
	Host() []byte
	SetHost(string)
	// SetPath puts a path in place of the target's; the query stays.
	SetPath([]byte)
}

// plan is what is to become of one request.
type plan struct {
	direct  bool   // it goes where it was going
	shows   string // the SPIFFE ID that what is there has to show
	backend route.Backend
	retry   *route.Retry
	answer  *answer // in place of an endpoint's; nil: there is none

	filters [2]*route.Filters // the rule's, the backend's; nil: none
	origin  []byte            // the request's Origin, for an answer to CORS
	timed   bool              // the rule says when, or that it is never
	ends    time.Time         // when all attempts together must be done; zero: never
	attempt time.Duration     // the same for each; 0: none

	key      balance.Key
	wait     time.Duration // how long until a request is allowed again; 0: this one is
	admitted bool          // it counts against the backend's limits, until leave
	retries  int           // that count against its budget, the same
	asked    bool          // for a retry that is allowed and has not begun
	pause    time.Duration // before that one
}

// destination is what c was going to; of an inbound connection nothing is asked, and
// what holds for its caller is the policy.
func (s *Server) destination(ctx context.Context, c listen.Conn) (route.Destination, error) {
	if d, ok := s.known(c); ok {
		return d, nil
	}
	return s.Config.Destination(ctx, c.Original)
}

// known is destination where that need not be waited for.
func (s *Server) known(c listen.Conn) (route.Destination, bool) {
	if c.Direction == listen.Inbound {
		return route.Destination{Policy: s.Config.Inbound(c.Original.Port())}, true
	}
	return s.Config.Known(c.Original)
}

// twice reports whether something of d may want a request's body twice: a retry, a
// mirror.
func twice(d route.Destination) bool {
	retries := func(p *route.Policy) bool { return p != nil && p.Retry != nil }
	if retries(d.Policy) {
		return true
	}
	if d.Routes == nil {
		return false
	}
	return slices.ContainsFunc(d.Routes.Rules, func(r route.Rule) bool {
		return r.Retry != nil || len(r.Filters.Mirrors) > 0 || slices.ContainsFunc(r.Backends, func(b route.WeightedBackend) bool {
			return retries(b.Backend.Policy) || len(b.Filters.Mirrors) > 0
		})
	})
}

// make decides. The error is a *reason.Error.
func (p *plan) make(s *Server, c listen.Conn, d route.Destination, m message, r *record) error {
	*p = plan{}
	r.of(s, m)
	now := r.now()
	r.decided(now, d)
	p.direct, p.shows, p.backend = own(c, d), d.Identity, d.Backend()
	if d.Routes != nil && d.Routes.Kind != route.TCPRoute {
		if err := p.route(d.Routes, c, m, r); err != nil || p.answer != nil {
			return err
		}
	}
	if c.Direction == listen.Inbound {
		introduce(c.ID, m)
		if err := s.authorize(c, c.Original.Port(), m, r); err != nil {
			return err
		}
	}
	if p.direct {
		return p.called(s, c, d.Policy)
	}
	p.key.Client = c.Peer.Addr()
	if policy := p.backend.Policy; policy != nil {
		p.obey(policy, m, now)
		var ok bool
		if p.wait, ok = s.balancer.Allow(&p.backend, balance.Client{Addr: c.Peer.Addr()}); !ok {
			return &reason.Error{Reason: reason.RateLimited, Err: fmt.Errorf("by TrafficPolicy %s", policy.Name)}
		}
	}
	if p.admitted = s.balancer.Admit(&p.backend, balance.Requests); !p.admitted {
		return &reason.Error{Reason: reason.CircuitOpen, Err: fmt.Errorf("by TrafficPolicy %s", p.backend.Policy.Name)}
	}
	return nil
}

// called decides on what goes to the pod's own application, whose policy, if there is
// one, counts each caller.
func (p *plan) called(s *Server, c listen.Conn, policy *route.Policy) error {
	if policy == nil {
		return nil
	}
	application := route.Backend{Service: "called " + policy.Name, Endpoints: []route.Endpoint{{Addr: c.Original}}, Policy: policy}
	var ok bool
	if p.wait, ok = s.balancer.Allow(&application, balance.Client{Addr: c.Peer.Addr(), Identity: c.ID}); !ok {
		return &reason.Error{Reason: reason.RateLimited, Err: fmt.Errorf("by TrafficPolicy %s, for each caller", policy.Name)}
	}
	return nil
}

// obey takes from the policy of the backend what the rule leaves open.
func (p *plan) obey(policy *route.Policy, m message, now time.Time) {
	if p.retry == nil {
		p.retry = policy.Retry
	}
	if !p.timed && policy.Timeout > 0 {
		p.ends = now.Add(policy.Timeout)
	}
	if policy.Balance != route.ConsistentHash {
		return
	}
	var on []byte
	switch policy.HashOn {
	case route.HashHeader:
		on, _ = m.Header(policy.HashName)
	case route.HashCookie:
		cookies, _ := m.Header("cookie")
		on = cookie(cookies, policy.HashName)
	case route.HashClient:
		on = p.key.Client.AsSlice()
	}
	if len(on) > 0 {
		p.key.Hash = balance.HashOf(on)
	}
}

// cookie finds a cookie's value in a Cookie field (RFC 6265, section 4.2.1); nil: it
// is not there.
func cookie(field []byte, name string) []byte {
	for pair := range bytes.SplitSeq(field, []byte(";")) {
		key, value, ok := bytes.Cut(bytes.TrimSpace(pair), []byte("="))
		if ok && string(key) == name {
			return value
		}
	}
	return nil
}

// leave ends what the request counts for.
func (p *plan) leave(s *Server) {
	if p.admitted {
		s.balancer.Leave(&p.backend, balance.Requests)
	}
	if p.asked {
		p.retries++
	}
	for range p.retries {
		s.balancer.RetryEnd(&p.backend)
	}
	p.admitted, p.asked, p.retries = false, false, 0
}

// route finds the rule and does what it says.
func (p *plan) route(routes *route.Routes, c listen.Conn, m message, r *record) error {
	if !m.Prepare() {
		return &reason.Error{Reason: reason.BadRequest, Err: errPath}
	}
	rule, match := routes.Match(m)
	if rule == nil {
		return &reason.Error{Reason: reason.RouteNotFound}
	}
	r.routed(rule.Route)
	if rule.Timeout != nil {
		p.timed = true
		if *rule.Timeout > 0 {
			p.ends = time.Now().Add(*rule.Timeout)
		}
	}
	p.attempt, p.retry = rule.BackendTimeout, rule.Retry
	if err := p.filter(&rule.Filters, 0, c, m, match); err != nil || p.answer != nil {
		return err
	}
	chosen, err := choose(rule)
	if err != nil {
		return err
	}
	p.backend = chosen.Backend
	return p.filter(&chosen.Filters, 1, c, m, match)
}

// choose picks one of a rule's backends. The error is a *reason.Error.
func choose(rule *route.Rule) (*route.WeightedBackend, error) {
	chosen := rule.Choose(rand.Uint32())
	switch {
	case chosen == nil:
		return nil, &reason.Error{Reason: reason.BackendInvalid, Err: errWeights}
	case chosen.Backend.Invalid:
		return nil, &reason.Error{Reason: reason.BackendInvalid, Err: errors.New(chosen.Backend.Service)}
	}
	return chosen, nil
}

// filter does what filters do to a request.
func (p *plan) filter(f *route.Filters, level int, c listen.Conn, m message, match *route.Match) error {
	p.filters[level] = f
	if f.Invalid {
		return &reason.Error{Reason: reason.BackendInvalid, Err: errFilter}
	}
	if f.CORS != nil {
		origin, cross := m.Header("origin")
		p.origin = append([]byte(nil), origin...)
		method, preflight := m.Header("access-control-request-method")
		if cross && preflight && string(m.Method()) == "OPTIONS" {
			headers, _ := m.Header("access-control-request-headers")
			p.answer = &answer{status: 204, fields: f.CORS.Preflight(origin, method, headers)}
			return nil
		}
	}
	if f.RequestHeaders != nil {
		f.RequestHeaders.Apply(m)
	}
	if d := f.Redirect; d != nil {
		location := d.Location("http", m.Host(), c.Original.Port(), m.RawPath(), m.Query(), match)
		p.answer = &answer{status: d.Status, fields: []route.Header{{Name: "Location", Value: location}}}
		p.edit(p.answer)
		return nil
	}
	if w := f.Rewrite; w != nil {
		if w.Path != nil {
			m.SetPath(w.Path.Apply(m.RawPath(), match))
		}
		if w.Hostname != "" {
			m.SetHost(w.Hostname)
		}
	}
	return nil
}

// edit does what filters do to an answer: an endpoint's, or the proxy's own in place
// of one, a failure among them, whose reason a browser may otherwise not show to the
// page that asked. The answer to a preflight is all CORS's.
func (p *plan) edit(answer route.Fields) {
	for _, f := range p.filters {
		if f == nil {
			continue
		}
		if f.ResponseHeaders != nil {
			f.ResponseHeaders.Apply(answer)
		}
		if f.CORS != nil {
			change := route.HeaderChange{}
			for _, h := range f.CORS.Answer(p.origin) {
				if h.Name == "vary" {
					change.Add = append(change.Add, h)
				} else {
					change.Set = append(change.Set, h)
				}
			}
			change.Apply(answer)
		}
	}
}

// limit is when an attempt that begins now must be answered; zero: never.
func (p *plan) limit(now time.Time) time.Time {
	if p.attempt == 0 {
		return p.ends
	}
	if t := now.Add(p.attempt); p.ends.IsZero() || t.Before(p.ends) {
		return t
	}
	return p.ends
}

// counts reports whether an answer is a failure that may be tried again.
func (p *plan) counts(status int) bool {
	if p.retry == nil || status < 500 {
		return false
	}
	for _, code := range p.retry.Codes {
		if int(code) == status {
			return true
		}
	}
	return false
}

// again reports whether a request whose attempt failed, the first being 1, is
// tried again. What never arrived is, at up to maxAttempts endpoints; what may have
// is only if doing it twice does no harm (RFC 9110, section 9.2.2), and if there is
// time for the pause before it.
func (p *plan) again(s *Server, failure *attemptError, method []byte, attempt int) bool {
	now := time.Now()
	if p.over(now) {
		return false
	}
	switch {
	case failure.unsent:
		return attempt < maxAttempts || p.retry != nil && attempt <= p.retry.Attempts
	case !idempotent(method):
		return false
	case failure.stale:
		return attempt < maxAttempts
	}
	if p.retry == nil || attempt > p.retry.Attempts {
		return false
	}
	if !p.asked {
		pause := p.retry.Backoff << min(attempt-1, 6)
		p.pause = pause/2 + rand.N(pause/2+1)
		p.asked = !p.over(now.Add(p.pause)) && s.balancer.RetryBegin(&p.backend)
	}
	return p.asked
}

// over reports whether the time of all attempts is over by then.
func (p *plan) over(then time.Time) bool { return !p.ends.IsZero() && !then.Before(p.ends) }

// retried is when an attempt that again allowed begins: after a pause, if it is by
// policy.
func (p *plan) retried() time.Duration {
	if !p.asked {
		return 0
	}
	p.asked = false
	p.retries++
	return p.pause
}

func idempotent(method []byte) bool {
	switch string(method) {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return true
	}
	return false
}

// http1Request is a message of HTTP/1.
type http1Request struct {
	*http1.Head
	canonical []byte
}

func (r *http1Request) Prepare() bool {
	path, ok := route.CanonicalPath(r.RawPath())
	r.canonical = path
	return ok
}

func (r *http1Request) Name(i int) []byte { return r.Fields[i].Name }
func (r *http1Request) Method() []byte    { return r.Head.Method }
func (r *http1Request) Path() []byte      { return r.canonical }

func (r *http1Request) RawPath() []byte {
	path, _ := r.Head.Path()
	return path
}

func (r *http1Request) Query() []byte {
	_, query := r.Head.Path()
	return query
}

func (r *http1Request) Header(name string) ([]byte, bool) { return r.Get(name) }
func (r *http1Request) Host() []byte                      { return r.Head.Host }

func (r *http1Request) SetHost(host string) {
	for i := range r.Len() {
		if r.Is(i, "host") {
			r.Set(i, host)
			return
		}
	}
	r.Add("Host", host)
}

func (r *http1Request) SetPath(path []byte) {
	target := append([]byte(nil), path...)
	if query := r.Query(); query != nil {
		target = append(append(target, '?'), query...)
	}
	r.SetTarget(target)
}
