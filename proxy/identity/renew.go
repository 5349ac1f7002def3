package identity

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/weirmesh/weir/agent/proxypb"
)

const (
	// minFirst and maxFirst bound how long the first key waits from when the pod's ID is
	// known, unless somebody waits for it. Pods that start together would have their keys
	// made and signed while others of them are still on their way: of 110 on two
	// processors, that takes a second.
	minFirst = time.Second
	maxFirst = 3 * time.Second
	// answerTimeout is how long an answer may take before it is asked again. Signing may
	// wait for somebody's approval, but a request that got lost is asked for anew.
	answerTimeout = 2 * time.Minute
	// minBackoff and maxBackoff are between attempts that fail.
	minBackoff = time.Second
	maxBackoff = 5 * time.Minute
	// maxRetry bounds what the agent may have this proxy wait.
	maxRetry = time.Hour
	// minRenewal keeps certificates that are about to end with their CA from being
	// asked for all the time.
	minRenewal = 100 * time.Millisecond
	// lookAgain is how long Run sleeps while there is a certificate: timers stand still
	// while a machine is suspended, certificates do not.
	lookAgain = 10 * time.Minute
	// idle is as good as never: whatever is to be done wakes Run.
	idle = 24 * time.Hour
)

// Run asks for certificates until ctx is done: for the first one to three seconds after
// the pod's ID is known, or when somebody waits for it, and for another when half of the
// life of the one there is is over.
func (h *Holder) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.work:
		case <-timer.C:
		}
		timer.Reset(h.step(time.Now()))
	}
}

// step does what is to be done now, and says when to look again.
func (h *Holder) step(now time.Time) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.trust == nil || h.trust.id == "" {
		h.asked = nil
		return idle
	}
	if h.asked != nil && h.asked.id != h.trust.id {
		h.asked = nil
	}
	if h.asked != nil {
		if left := answerTimeout - now.Sub(h.asked.since); left > 0 {
			return left
		}
		h.asked = nil
		h.fail(errSilent, 0)
	}
	due := h.renewal
	switch s := h.current.Load(); {
	case s == nil && !h.wanted:
		due = h.first
	case s == nil, h.foreign, s.ID.String() != h.trust.id:
		due = now
	}
	if due.Before(h.retry) {
		due = h.retry
	}
	if left := due.Sub(now); left > 0 {
		return min(left, lookAgain)
	}
	if err := h.ask(now); err != nil {
		h.fail(err, 0)
		return h.retry.Sub(now)
	}
	return answerTimeout
}

// ask makes a key and a request for the agent.
func (h *Holder) ask(now time.Time) error {
	key, request, err := newRequest()
	if err != nil {
		return err
	}
	h.number++
	h.asked = &asked{id: h.trust.id, key: key, since: now, message: &proxypb.CertificateRequest{Number: h.number, Request: request}}
	wake(h.woken)
	return nil
}

// fail notes that there is no certificate this time, and when to ask again: as the agent
// wishes, else later and later. The one there is is kept.
func (h *Holder) fail(cause error, after time.Duration) {
	if after <= 0 {
		after = min(minBackoff<<min(h.failed, 20), maxBackoff)
	}
	h.failed++
	h.cause = cause
	h.retry = time.Now().Add(jittered(min(after, maxRetry)))
}

// renewal is when half of a certificate's life, from when it was received, is over: by the
// clock on the wall, whatever the machine did meanwhile.
func renewal(s *held) time.Time {
	life := s.notAfter().Sub(s.received)
	return s.received.Round(0).Add(max(jittered(life/2), minRenewal))
}

// jittered is a duration that may be a fifth less or more, so that not all ask at once.
func jittered(d time.Duration) time.Duration {
	return d - d/5 + rand.N(2*d/5+1)
}

// Resume is the beginning of a session, which has another number than those before: what
// they may not have heard is said again.
func (h *Holder) Resume(session uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.session = session
	h.told = false
	if h.asked != nil {
		h.asked.sent = false
	}
	wake(h.woken)
}

// Woken receives when Next has something.
func (h *Holder) Woken() <-chan struct{} { return h.woken }

// Wake has the next session look, whatever this one was woken for.
func (h *Holder) Wake() { wake(h.woken) }

// Next is a message for the agent; nil: there is none, or there is a newer session,
// which gets it.
func (h *Holder) Next(session uint64) *proxypb.FromProxy {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case session != h.session:
		return nil
	case h.asked != nil && !h.asked.sent:
		h.asked.sent = true
		return &proxypb.FromProxy{Message: &proxypb.FromProxy_CertificateRequest{CertificateRequest: h.asked.message}}
	case h.file >= 0 && !h.told:
		h.told = true
		kept := &proxypb.CertificateKept{NotAfterUnixNanos: h.current.Load().notAfter().UnixNano()}
		return &proxypb.FromProxy{Message: &proxypb.FromProxy_CertificateKept{CertificateKept: kept}}
	}
	return nil
}
