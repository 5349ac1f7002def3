package push

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/proxypb"
)

// fakeIssuer signs when it is told to.
type fakeIssuer struct {
	mu     sync.Mutex
	told   *proxypb.Identity
	issue  func(ctx context.Context, request []byte) ([][]byte, error)
	issued int
}

func (f *fakeIssuer) Identity(launch.Attachment) *proxypb.Identity {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.told
}

func (f *fakeIssuer) Roots() [][]byte { return f.Identity(launch.Attachment{}).GetRoots() }

func (f *fakeIssuer) tell(m *proxypb.Identity) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = m
}

func (f *fakeIssuer) Issue(ctx context.Context, a launch.Attachment, request []byte) ([][]byte, error) {
	if a.PodName != "front" {
		return nil, errors.New("for whom?")
	}
	f.mu.Lock()
	f.issued++
	issue := f.issue
	f.mu.Unlock()
	return issue(ctx, request)
}

// identified is a session with a proxy whose pod has an identity.
type identified struct {
	*peer
	issuer *fakeIssuer
}

// startIdentified has an issuer that signs at once.
func startIdentified(t *testing.T) identified {
	t.Helper()
	issuer := &fakeIssuer{
		told: &proxypb.Identity{Id: "spiffe://cluster.local/ns/shop/sa/front", TrustDomain: "cluster.local", Roots: [][]byte{{1}}},
		issue: func(_ context.Context, request []byte) ([][]byte, error) {
			return [][]byte{append([]byte("signed "), request...)}, nil
		},
	}
	s := startWith(t, issuer)
	close(s.synced)
	return identified{s.stream(), issuer}
}

func (i identified) ask(number uint64) {
	i.say(&proxypb.FromProxy{Message: &proxypb.FromProxy_CertificateRequest{
		CertificateRequest: &proxypb.CertificateRequest{Number: number, Request: []byte("request")},
	}})
}

func (i identified) certificate() *proxypb.Certificate {
	i.Helper()
	select {
	case c := <-i.certificates:
		return c
	case <-time.After(5 * time.Second):
		i.Fatal("no certificate")
		return nil
	}
}

func TestARequestIsSignedForThePodThatTheProxyIsOf(t *testing.T) {
	i := startIdentified(t)
	i.ask(3)
	want := &proxypb.Certificate{Number: 3, Chain: [][]byte{[]byte("signed request")}, Roots: [][]byte{{1}}}
	if diff := cmp.Diff(want, i.certificate(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestWhatIsSaidOfIdentitiesIsAResource(t *testing.T) {
	i := startIdentified(t)
	i.subscribe(map[string]string{proxypb.ProxyResource: "", proxypb.IdentityResource: ""})
	u := i.update()
	if diff := cmp.Diff([]string{"identity", "proxy"}, slices.Sorted(slices.Values(names(u)))); diff != "" {
		t.Error(diff)
	}
	if i.pusher.Trusted() {
		t.Error("trusted before it was acknowledged")
	}
	i.ack(u)
	i.silent("nothing changed")
	if !i.pusher.Trusted() {
		t.Error("not trusted after the acknowledgement")
	}
	if got := i.pusher.Programmed().Trusted; got != identity.Digest([][]byte{{1}}) {
		t.Errorf("the agent says that %q are trusted", got)
	}
	i.issuer.tell(&proxypb.Identity{Id: "spiffe://cluster.local/ns/shop/sa/front", TrustDomain: "cluster.local", Roots: [][]byte{{1}, {2}}})
	if i.pusher.Trusted() || i.pusher.Programmed().Trusted != "" {
		t.Error("a new root is trusted before it was sent")
	}
	i.pusher.Changed()
	u = i.update()
	if got := u.GetResources()[0].GetIdentity().GetRoots(); len(u.GetResources()) != 1 || len(got) != 2 {
		t.Errorf("%v", u)
	}
	i.ack(u)
	i.silent("nothing changed")
	if !i.pusher.Trusted() || i.pusher.Programmed().Trusted != identity.Digest([][]byte{{2}, {1}}) {
		t.Error("not trusted after the acknowledgement")
	}
}

// TestANodeWithoutProxiesTrustsWhatItKnowsOf: nothing, as long as that is nothing.
func TestANodeWithoutProxiesTrustsWhatItKnowsOf(t *testing.T) {
	issuer := &fakeIssuer{}
	p := &Pusher{View: &fakeView{}, Issuer: issuer}
	if got := p.Programmed().Trusted; got != "" {
		t.Errorf("%q", got)
	}
	issuer.tell(&proxypb.Identity{Roots: [][]byte{{1}}})
	if got := p.Programmed().Trusted; got != identity.Digest([][]byte{{1}}) {
		t.Errorf("%q", got)
	}
}

// TestWhatIsNotKnownYetIsNotTold: nor that the pod is nobody. What else there is comes.
func TestWhatIsNotKnownYetIsNotTold(t *testing.T) {
	i := startIdentified(t)
	told := i.issuer.Identity(launch.Attachment{})
	i.issuer.tell(nil)
	i.subscribe(map[string]string{proxypb.ProxyResource: "", proxypb.IdentityResource: ""})
	u := i.update()
	if diff := cmp.Diff([]string{"proxy"}, names(u)); diff != "" || len(u.GetRemoved()) > 0 {
		t.Errorf("%v", u)
	}
	i.ack(u)
	i.ask(1)
	if c := i.certificate(); c.GetError() == "" || c.GetRetryAfter() != 0 || i.issuer.issued != 0 {
		t.Errorf("%v", c)
	}
	if i.pusher.Trusted() {
		t.Error("trusted, and there is nothing to trust")
	}
	i.issuer.tell(told)
	i.pusher.Changed()
	u = i.update()
	if diff := cmp.Diff([]string{"identity"}, names(u)); diff != "" {
		t.Errorf("once it is known: %s", diff)
	}
	i.ack(u)
	i.issuer.tell(nil)
	i.pusher.Changed()
	i.silent("what was told before holds")
}

// TestAProxyThatKnowsOfNoIdentityHoldsUpNoRotation: it is of an earlier version.
func TestAProxyThatKnowsOfNoIdentityHoldsUpNoRotation(t *testing.T) {
	i := startIdentified(t)
	if i.pusher.Trusted() {
		t.Error("it has said nothing yet")
	}
	i.subscribe(map[string]string{proxypb.ProxyResource: ""})
	i.ack(i.update())
	if !i.pusher.Trusted() {
		t.Error("it does")
	}
}

func TestWithoutAnIssuerNobodyHasAnIdentity(t *testing.T) {
	s := start(t)
	close(s.synced)
	i := identified{peer: s.stream()}
	i.subscribe(map[string]string{proxypb.IdentityResource: ""})
	u := i.update()
	if got := u.GetResources()[0].GetIdentity(); got == nil || got.GetId() != "" {
		t.Errorf("told %v", got)
	}
	i.ask(1)
	if c := i.certificate(); !strings.Contains(c.GetError(), "the pod has no identity") || c.GetRetryAfter() < int64(time.Minute) {
		t.Errorf("answered %v", c)
	}
}

func TestSigningThatTakesLongHoldsNothingElseUpAndEndsWithTheSession(t *testing.T) {
	i := startIdentified(t)
	signing, ended := make(chan struct{}, 5), make(chan struct{}, 5)
	i.issuer.issue = func(ctx context.Context, _ []byte) ([][]byte, error) {
		signing <- struct{}{}
		<-ctx.Done()
		ended <- struct{}{}
		return nil, ctx.Err()
	}
	i.ask(1)
	<-signing
	i.subscribe(map[string]string{proxypb.ProxyResource: ""})
	i.ack(i.update())
	i.proxy.end <- struct{}{}
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Fatal("it goes on without a session")
	}
}

// TestARefusalIsSaidOnce: to the pod's owner, and in the log, however often the proxy
// asks; and the proxy is told not to ask soon.
func TestARefusalIsSaidOnce(t *testing.T) {
	i := startIdentified(t)
	var mu sync.Mutex
	var log strings.Builder
	refusals := 0
	i.pusher.Log = slog.New(slog.NewTextHandler(locked{&mu, &log}, nil))
	i.pusher.Refused = func(a launch.Attachment, reason string) {
		mu.Lock()
		defer mu.Unlock()
		refusals++
		if a.PodName != "front" || reason != "the pod has ended" {
			t.Errorf("%s: %s", a.PodName, reason)
		}
	}
	i.issuer.issue = func(context.Context, []byte) ([][]byte, error) {
		return nil, &RefusedError{Reason: "the pod has ended"}
	}
	for n := range uint64(3) {
		i.ask(n + 1)
		if c := i.certificate(); c.GetError() != "the pod has ended" || c.GetRetryAfter() != int64(refusedFor) || c.GetChain() != nil || c.GetRoots() != nil {
			t.Errorf("answered %v", c)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if refusals != 1 || strings.Count(log.String(), "the pod has ended") != 1 {
		t.Errorf("said %d times; log:\n%s", refusals, log.String())
	}
}

func TestTheEndOfACertificateIsMeasured(t *testing.T) {
	i := startIdentified(t)
	end := time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC)
	i.say(&proxypb.FromProxy{Message: &proxypb.FromProxy_CertificateKept{CertificateKept: &proxypb.CertificateKept{NotAfterUnixNanos: end.UnixNano()}}})
	select {
	case got := <-i.metrics:
		if got != "certificate until 2026-03-02" {
			t.Error(got)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("it is not")
	}
}

// locked is a writer for several.
type locked struct {
	mu *sync.Mutex
	to *strings.Builder
}

func (l locked) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.to.Write(b)
}
