package launch_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
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

// TestAnAgentHasACertificateBeforeItsProxyHasSaidAnything: a proxy that dies just after it
// was adopted, while the agent does not know yet what to tell it, leaves its certificate
// all the same.
func TestAnAgentHasACertificateBeforeItsProxyHasSaidAnything(t *testing.T) {
	for _, c := range []struct {
		name string
		lose string // below the agent's folder
	}{{"as it was left", "nothing"}, {"its file is lost", "attachments"}} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			issuer := newTestIssuer(t)
			n.pusher.Issuer = issuer
			ns, req := n.sandbox("c1")
			adopted := n.start(req).Generation
			if err := n.manager.Commit("c1"); err != nil {
				t.Fatal(err)
			}
			end := n.certified()
			issuer.away.Store(true)
			n.manager.Close()
			if err := os.RemoveAll(filepath.Join(n.opts.RunDir, c.lose)); err != nil {
				t.Fatal(err)
			}
			n.opts.NetnsDir = t.TempDir() // where a proxy is found of which no file speaks
			if err := os.Symlink(ns.Path(), filepath.Join(n.opts.NetnsDir, "c1")); err != nil {
				t.Fatal(err)
			}
			n.opts.Session = func(ctx context.Context, i *launch.Instance) {
				if i.Attachment.Generation == adopted {
					<-ctx.Done()
					return
				}
				n.pusher.Session(ctx, i)
			}
			n.open()
			if err := syscall.Kill(n.pid("c1"), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if got := n.certified(); !got.Equal(end) || issuer.asked.Load() != 1 {
				t.Errorf("until %s, want %s; asked %d times", got, end, issuer.asked.Load())
			}
		})
	}
}

// TestAProxyWithoutACertificateIsAdopted, and gets one.
func TestAProxyWithoutACertificateIsAdopted(t *testing.T) {
	n := newNode(t)
	var log bytes.Buffer
	n.opts.Log = slog.New(slog.NewTextHandler(&log, nil))
	_, req := n.sandbox("c1")
	n.start(req)
	if err := n.manager.Commit("c1"); err != nil {
		t.Fatal(err)
	}
	pid := n.pid("c1")
	n.manager.Close()
	n.pusher.Issuer = newTestIssuer(t)
	n.open()
	if got := log.String(); n.pid("c1") != pid || strings.Contains(got, "level=WARN") {
		t.Errorf("process %d, before %d: %s", n.pid("c1"), pid, got)
	}
	n.certified()
}
