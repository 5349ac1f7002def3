package launch_test

import (
	"context"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/agent/push"
)

// testIssuer signs until it is away.
type testIssuer struct {
	ca    *identity.Authority
	away  atomic.Bool
	asked atomic.Int32
}

var _ push.Issuer = (*testIssuer)(nil)

func newTestIssuer(t *testing.T) *testIssuer {
	t.Helper()
	td, err := identity.TrustDomain("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	ca, err := identity.NewAuthority(td, time.Now(), identity.RootLifetime)
	if err != nil {
		t.Fatal(err)
	}
	return &testIssuer{ca: ca}
}

func (i *testIssuer) Identity(launch.Attachment) *proxypb.Identity {
	return &proxypb.Identity{Id: "spiffe://cluster.local/ns/shop/sa/front", TrustDomain: "cluster.local", Roots: [][]byte{i.ca.Root().Raw}}
}

func (i *testIssuer) Roots() [][]byte { return [][]byte{i.ca.Root().Raw} }

func (i *testIssuer) Issue(_ context.Context, a launch.Attachment, request []byte) ([][]byte, error) {
	i.asked.Add(1)
	if i.away.Load() {
		return nil, errors.New("the API server is away")
	}
	td, err := identity.TrustDomain("cluster.local")
	if err != nil {
		return nil, err
	}
	id, err := identity.Of(td, a.PodNamespace, "front")
	if err != nil {
		return nil, err
	}
	return i.ca.Sign(request, id, time.Now(), identity.DefaultTTL)
}

// certified waits until a proxy says that it has a certificate, of which the agent has
// taken the memory file by then. It returns when that ends.
func (n *node) certified() time.Time {
	n.Helper()
	select {
	case end := <-n.kept:
		return end
	case <-time.After(20 * time.Second):
		n.Fatal("no certificate")
		return time.Time{}
	}
}

// TestAProxyThatIsKilledLeavesItsCertificateToTheNext: though nobody signs any more,
// and though the agent has been another since.
func TestAProxyThatIsKilledLeavesItsCertificateToTheNext(t *testing.T) {
	n := newNode(t)
	issuer := newTestIssuer(t)
	n.pusher.Issuer = issuer
	_, req := n.sandbox("c1")
	n.start(req)
	if err := n.manager.Commit("c1"); err != nil {
		t.Fatal(err)
	}
	end := n.certified()
	issuer.away.Store(true)
	same := func(when string) {
		t.Helper()
		if got := n.certified(); !got.Equal(end) {
			t.Errorf("%s: until %s, want %s", when, got, end)
		}
		if asked := issuer.asked.Load(); asked != 1 {
			t.Errorf("%s: asked %d times", when, asked)
		}
	}
	kill := func() {
		t.Helper()
		if err := syscall.Kill(n.pid("c1"), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	kill()
	same("killed")
	kill()
	same("killed again")
	n.manager.Close()
	n.open()
	same("with another agent")
	kill()
	same("killed with another agent")
}
