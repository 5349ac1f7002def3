package issue

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/agent/push"
)

var _ push.Issuer = (*Cluster)(nil)

func onCluster(t *testing.T, sign func(context.Context, model.Pod, []byte) ([][]byte, error)) *Cluster {
	t.Helper()
	return NewCluster(ClusterOptions{
		Path: filepath.Join(t.TempDir(), "roots.pem"), TrustDomain: domain, Pod: pods, Sign: sign, Log: slog.New(slog.DiscardHandler),
	})
}

func TestOnAClusterAPodIsWhoItsServiceAccountIsOnceAllIsKnown(t *testing.T) {
	roots := []*x509.Certificate{{Raw: []byte{1}}, {Raw: []byte{2}}}
	both := [][]byte{{1}, {2}}
	for _, tt := range []struct {
		name  string
		a     launch.Attachment
		roots []*x509.Certificate
		want  *proxypb.Identity
	}{
		{"known", attached("front", "u1"), roots, &proxypb.Identity{Id: "spiffe://cluster.local/ns/shop/sa/front", TrustDomain: "cluster.local", Roots: both}},
		{"static: nobody", attached("static", "u1"), roots, &proxypb.Identity{TrustDomain: "cluster.local", Roots: both}},
		{"of another UID", attached("front", "u2"), roots, nil},
		{"that the watch does not show yet", attached("back", "u3"), roots, nil},
		{"of which nobody knows yet which it is", launch.Attachment{}, roots, nil},
		{"before the roots are known", attached("front", "u1"), nil, nil},
	} {
		c := onCluster(t, nil)
		c.SetRoots(tt.roots)
		if diff := cmp.Diff(tt.want, c.Identity(tt.a), protocmp.Transform()); diff != "" {
			t.Errorf("a pod %s (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestADenialOfTheSignersIsARefusalAndNothingElseIs(t *testing.T) {
	away := errors.New("the API server is away")
	for _, tt := range []struct {
		name    string
		a       launch.Attachment
		err     error
		refused string
	}{
		{"signed", attached("front", "u1"), nil, ""},
		{"denied", attached("front", "u1"), fmt.Errorf("x: %w", &cluster.DeniedError{Reason: "OtherNode", Message: "not yours"}), "OtherNode: not yours"},
		{"away", attached("front", "u1"), away, ""},
		{"a pod that is gone", attached("back", "u1"), nil, ""},
	} {
		asked := ""
		c := onCluster(t, func(_ context.Context, pod model.Pod, request []byte) ([][]byte, error) {
			asked = pod.UID + " " + string(request)
			return [][]byte{{7}}, tt.err
		})
		chain, err := c.Issue(t.Context(), tt.a, []byte("request"))
		var refused *push.RefusedError
		if errors.As(err, &refused) != (tt.refused != "") || refused != nil && refused.Reason != tt.refused {
			t.Errorf("%s: %v", tt.name, err)
		}
		gone := tt.a.PodName == "back"
		if (asked == "u1 request") == gone || (err == nil) != (tt.err == nil && !gone) || err == nil && len(chain) != 1 {
			t.Errorf("%s: asked %q, %v, %v", tt.name, asked, chain, err)
		}
	}
}

func TestTheRootsAreKeptForTheNextAgent(t *testing.T) {
	ca := open(t, options(t)).keyring().Signs().Root()
	c := onCluster(t, nil)
	if !c.SetRoots([]*x509.Certificate{ca}) || c.SetRoots([]*x509.Certificate{ca}) || c.SetRoots(nil) {
		t.Error("what is new is told of, once, and none are no roots")
	}
	next := NewCluster(c.opts)
	if got := next.Identity(attached("front", "u1")).GetRoots(); len(got) != 1 || string(got[0]) != string(ca.Raw) {
		t.Errorf("the next agent has %d roots", len(got))
	}
	if end, _ := next.Ends(); !end.Equal(ca.NotAfter) {
		t.Errorf("they end at %s, not %s", end, ca.NotAfter)
	}
}
