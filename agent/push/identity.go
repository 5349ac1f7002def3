package push

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/proxypb"
)

// Issuer knows who pods are, and has certificates signed for them. Which pod asks is told
// by the proxy's attachment, never by the proxy.
type Issuer interface {
	// Identity is what a proxy is told: who its pod is, an empty ID for a pod that is
	// nobody, and whom to believe; nil if that is not known yet: the proxy goes by what it
	// was told before, or waits. Pusher.Changed has it asked for again.
	Identity(launch.Attachment) *proxypb.Identity
	// Roots are those that Identity tells everybody to trust (DER); none: they are not
	// known yet.
	Roots() [][]byte
	// Issue has a request (PKCS #10, DER) signed for the pod, and returns the chain (DER)
	// without the root. It may take as long as ctx allows. A *RefusedError says that it is
	// not worth asking again soon.
	Issue(ctx context.Context, a launch.Attachment, request []byte) ([][]byte, error)
}

// RefusedError says that a request was looked at and denied.
type RefusedError struct {
	Reason string // why, and what to do
	Err    error  // what it comes from, or nil
}

func (e *RefusedError) Error() string { return e.Reason }
func (e *RefusedError) Unwrap() error { return e.Err }

const (
	// issueTimeout is how long signing may take. A proxy waits for longer.
	issueTimeout = 90 * time.Second
	// requestPause is between answers to one proxy, which could ask all the time.
	requestPause = 100 * time.Millisecond
	// refusedFor is how long a proxy is not to ask again after a refusal.
	refusedFor = 10 * time.Minute
)

var errNobody = &RefusedError{Reason: "the pod has no identity: it has no service account, the agent does not know it, or nobody signs here"}

// errUnknown passes soon.
var errUnknown = errors.New("the agent does not know yet who the pod is, or whom it is to believe")

// identity is the resource of that name.
func (p *Pusher) identity(i *launch.Instance) *proxypb.Identity {
	if p.Issuer == nil {
		return &proxypb.Identity{}
	}
	return p.Issuer.Identity(i.Attachment)
}

// ask has the proxy's request answered, unless there is a newer one by then.
func (s *session) ask(m *proxypb.CertificateRequest) {
	for {
		select {
		case s.requests <- m:
			return
		default:
		}
		select {
		case <-s.requests:
		default:
		}
	}
}

// issue answers the proxy's requests, one after the other, until ctx is done.
func (s *session) issue(ctx context.Context) {
	for {
		var m *proxypb.CertificateRequest
		select {
		case <-ctx.Done():
			return
		case m = <-s.requests:
		}
		if s.pusher.WaitSynced(ctx) != nil {
			return // nobody is known yet
		}
		answer := s.pusher.issue(ctx, s.instance, m)
		if ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		s.certificate = answer
		s.mu.Unlock()
		s.wake()
		select {
		case <-ctx.Done():
			return
		case <-time.After(requestPause):
		}
	}
}

// issue answers one request.
func (p *Pusher) issue(ctx context.Context, i *launch.Instance, m *proxypb.CertificateRequest) *proxypb.Certificate {
	answer := &proxypb.Certificate{Number: m.GetNumber()}
	err := error(errNobody)
	switch told := p.identity(i); {
	case told == nil:
		err = errUnknown
	case told.GetId() != "":
		timed, cancel := context.WithTimeout(ctx, issueTimeout)
		answer.Chain, err = p.Issuer.Issue(timed, i.Attachment, m.GetRequest())
		cancel()
	}
	if ctx.Err() != nil {
		return nil
	}
	p.noteIssue(i, err)
	if err != nil {
		answer.Chain, answer.Error = nil, err.Error()
		if refused := (*RefusedError)(nil); errors.As(err, &refused) {
			answer.RetryAfter = int64(refusedFor)
		}
	}
	return answer
}

// noteIssue writes down why a pod gets no certificate, once for each cause.
func (p *Pusher) noteIssue(i *launch.Instance, err error) {
	cause := ""
	if err != nil {
		cause = err.Error()
	}
	p.mu.Lock()
	before := p.unissued[i]
	if cause == "" {
		delete(p.unissued, i)
	} else {
		if p.unissued == nil {
			p.unissued = map[*launch.Instance]string{}
		}
		p.unissued[i] = cause
	}
	p.mu.Unlock()
	if cause == before {
		return
	}
	pod := i.Attachment.PodNamespace + "/" + i.Attachment.PodName
	if cause == "" {
		p.Log.Info("certificate issued after all", "pod", pod)
		return
	}
	p.Log.Warn("no certificate for a proxy; it asks again", "pod", pod, "error", cause)
	if refused := (*RefusedError)(nil); errors.As(err, &refused) && p.Refused != nil {
		p.Refused(i.Attachment, refused.Reason)
	}
}

// takeCertificate returns the answer to a request, once; nil: there is none. It has the
// roots as they are now: what is sent before and after it has older and newer ones.
func (s *session) takeCertificate() *proxypb.Certificate {
	s.mu.Lock()
	c := s.certificate
	s.certificate = nil
	s.mu.Unlock()
	if c != nil && c.GetError() == "" {
		c.Roots = s.pusher.identity(s.instance).GetRoots()
	}
	return c
}

// keep takes in that the proxy has another memory file.
func (s *session) keep(m *proxypb.CertificateKept) {
	if err := s.instance.IdentityKept(); err != nil {
		s.pusher.Log.Warn("the next proxy of a pod will have to ask for a certificate", "pod",
			s.instance.Attachment.PodNamespace+"/"+s.instance.Attachment.PodName, "error", err)
	}
	s.pusher.Metrics.Certificate(s.instance, time.Unix(0, m.GetNotAfterUnixNanos()))
}

// Trusted reports whether all proxies are known to have the newest of what there is to be
// trusted.
func (p *Pusher) Trusted() bool { return p.trusts(p.Issuer.Roots()) }

// trusts reports whether all proxies are known to trust these roots, which are the newest.
// One that has only begun is not; one that does not want to know is of a version
// that trusts nobody.
func (p *Pusher) trusts(roots [][]byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.live {
		s := p.heard[i]
		if s == nil {
			return false
		}
		has, asked := s.has(proxypb.IdentityResource)
		if !asked {
			continue
		}
		r := p.identityResource(i)
		if r == nil || has != version(r) || !slices.EqualFunc(r.GetIdentity().GetRoots(), roots, bytes.Equal) {
			return false
		}
	}
	return true
}

// identityResource is nil if there is nothing to tell yet.
func (p *Pusher) identityResource(i *launch.Instance) *proxypb.Resource {
	told := p.identity(i)
	if told == nil {
		return nil
	}
	return &proxypb.Resource{Name: proxypb.IdentityResource, Body: &proxypb.Resource_Identity{Identity: told}}
}

// has is the version that the proxy has of a resource, "" for none, and whether it has
// asked for it.
func (s *session) has(name string) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h, asked := s.held[name]
	return h.version, asked
}
