// Package identity is who this proxy's pod is to its peers: it makes keys, has the
// agent get certificates for them, and has them replaced long before they end.
//
// What the agent says comes through package control (Told, Answered), and what is to be
// said to it goes through there (Next). A key never leaves the process but in the memory
// file (memfd) that the pod's next proxy gets: see memory.go.
//
// What is done with an identity, TLS, is package mtls's business.
package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/mtls"
)

// held is a pod's identity at one time. It does not change; another one takes its place
// when the certificate or the roots do.
type held struct {
	mtls.Identity
	roots    []*x509.Certificate // those in Roots
	received time.Time           // when the certificate was
}

func (s *held) notAfter() time.Time { return s.Certificate.Leaf.NotAfter }

// Trust is what the agent says of identities (proxypb.Identity).
type Trust struct {
	id, domain string
	roots      []*x509.Certificate
}

// ParseTrust reads what the agent says, or says what is wrong with it.
func ParseTrust(msg *proxypb.Identity) (Trust, error) {
	roots, err := parseAll(msg.GetRoots())
	switch {
	case err != nil:
		return Trust{}, fmt.Errorf("roots: %w", err)
	case msg.GetId() == "":
	case msg.GetTrustDomain() == "":
		return Trust{}, errors.New("an ID without a trust domain")
	case len(roots) == 0:
		return Trust{}, errors.New("an ID without a root to trust")
	}
	return Trust{msg.GetId(), msg.GetTrustDomain(), roots}, nil
}

// ErrNone says that the pod has no identity: it has no service account, or nobody signs
// for it. Nothing is waited for.
var ErrNone = errors.New("the pod has no identity")

// MissingError says why there is no certificate, although there should be.
type MissingError struct {
	Expired time.Time // when the last one did; zero: there was none
	Cause   string
}

func (e *MissingError) Error() string {
	if e.Expired.IsZero() {
		return "no certificate yet: " + e.Cause
	}
	return fmt.Sprintf("the certificate expired at %s, and there is no other: %s", e.Expired.UTC().Format(time.RFC3339), e.Cause)
}

// Holder holds the identity and keeps it fresh: an mtls.Source. Make it with New; Run has
// to run for there to be a certificate.
type Holder struct {
	current atomic.Pointer[held]
	work    chan struct{} // buffered: Run has something to look at
	woken   chan struct{} // buffered: Next has something to say

	mu      sync.Mutex
	changed chan struct{} // closed and made anew when waiting may be over
	trusts  uint64        // counts the roots of current
	trust   *Trust        // nil: the agent has not said
	foreign bool          // the certificate is not below a root that is trusted now
	first   time.Time     // when the first key is to be made; zero: the pod has had no ID yet
	wanted  bool          // somebody has waited: the first key is to be made now
	renewal time.Time     // when another certificate is to be asked for
	asked   *asked        // nil: nothing is
	number  uint64        // of the last request
	retry   time.Time     // not before then
	failed  int           // how often in a row
	cause   error         // of the last failure
	session uint64        // counts sessions
	told    bool          // the session knows of file
	file    int           // memory file of current; -1: none
}

// asked is a request under way.
type asked struct {
	id      string
	key     *ecdsa.PrivateKey
	message *proxypb.CertificateRequest
	since   time.Time
	sent    bool // in this session
}

// New returns one that knows nothing.
func New() *Holder {
	return &Holder{work: make(chan struct{}, 1), woken: make(chan struct{}, 1), changed: make(chan struct{}), file: -1}
}

// Current is the identity there is, expired or not: who shakes hands with it says so, and
// waits for nothing. nil: there has been none yet.
func (h *Holder) Current() *mtls.Identity {
	if s := h.current.Load(); s != nil {
		return &s.Identity
	}
	return nil
}

// good is the identity there is; nil: none, or its certificate has expired.
func (h *Holder) good() *held {
	s := h.current.Load()
	if s == nil || !time.Now().Before(s.notAfter()) {
		return nil
	}
	return s
}

// Wait waits until ctx is done for there to be an identity that has not expired; the first
// is asked for at once then. The error is ErrNone, at once, or a *MissingError.
func (h *Holder) Wait(ctx context.Context) (*mtls.Identity, error) {
	for {
		if s := h.good(); s != nil {
			return &s.Identity, nil
		}
		changed, none := h.want()
		if s := h.good(); s != nil { // before changed was looked at
			return &s.Identity, nil
		}
		if none {
			return nil, ErrNone
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, h.missing()
		}
	}
}

// want notes that somebody waits, and returns what is closed when that may be over; true:
// there will be no identity.
func (h *Holder) want() (<-chan struct{}, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.wanted {
		h.wanted = true
		wake(h.work)
	}
	return h.changed, h.trust != nil && h.trust.id == ""
}

// missing says why there is no certificate.
func (h *Holder) missing() *MissingError {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := &MissingError{}
	if s := h.current.Load(); s != nil {
		out.Expired = s.notAfter()
	}
	switch {
	case h.cause != nil:
		out.Cause = h.cause.Error()
	case h.trust == nil:
		out.Cause = "the agent has not been heard of"
	case h.asked != nil:
		out.Cause = fmt.Sprintf("asked for %s ago", time.Since(h.asked.since).Round(time.Millisecond))
	default:
		out.Cause = "it is about to be asked for"
	}
	return out
}

// Told takes in what the agent says of identities.
func (h *Holder) Told(t Trust) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.trust = &t
	if h.first.IsZero() && t.id != "" {
		h.first = time.Now().Add(minFirst + rand.N(maxFirst-minFirst))
	}
	if s := h.current.Load(); s != nil && len(t.roots) > 0 {
		h.trusting(s, t.roots)
	}
	h.signal()
}

// Answered takes in the answer to a request.
func (h *Holder) Answered(msg *proxypb.Certificate) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.asked == nil || h.asked.message.GetNumber() != msg.GetNumber() {
		return // to one that was given up
	}
	asked := h.asked
	h.asked = nil
	defer h.signal()
	if msg.GetError() != "" {
		h.fail(errors.New(msg.GetError()), time.Duration(msg.GetRetryAfter()))
		return
	}
	s, err := accept(asked, msg, h.trust, time.Now())
	if err != nil {
		h.fail(fmt.Errorf("the certificate that the agent brought cannot be used: %w", err), 0)
		return
	}
	h.failed, h.cause, h.retry, h.foreign = 0, nil, time.Time{}, false
	h.take(s)
}

// take makes s the identity there is.
func (h *Holder) take(s *held) {
	h.renewal = renewal(s)
	h.publish(s)
	h.keep(s)
}

// publish has everybody find s.
func (h *Holder) publish(s *held) {
	if before := h.current.Load(); before == nil || !same(before.roots, s.roots) {
		h.trusts++
	}
	s.Trust = h.trusts
	h.current.Store(s)
}

// trusting changes the roots that are trusted, if they are others.
func (h *Holder) trusting(s *held, roots []*x509.Certificate) {
	if same(s.roots, roots) {
		return
	}
	next := *s
	next.Roots, next.roots = pool(roots), roots
	h.foreign = next.Verify(time.Now()) != nil
	h.publish(&next)
	h.keep(&next)
}

// signal has everybody look again. The caller holds h.mu.
func (h *Holder) signal() {
	close(h.changed)
	h.changed = make(chan struct{})
	wake(h.work)
}

func wake(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
