package controller

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/model"
)

// TestWhatAnAgentAsksForIsWhatTheSignerSigns has the two sides meet: the fake API server
// says who asks.
func TestWhatAnAgentAsksForIsWhatTheSignerSigns(t *testing.T) {
	for _, tt := range []struct{ node, want string }{{"n1", ""}, {"n2", reasonOtherNode}} {
		synctest.Test(t, func(t *testing.T) {
			client := fake.NewClientset(front())
			client.PrependReactor("create", "certificatesigningrequests", func(a k8stesting.Action) (bool, runtime.Object, error) {
				r := a.(k8stesting.CreateAction).GetObject().(*certificatesv1.CertificateSigningRequest)
				r.Name = r.GenerateName + "1"
				r.Spec.Username, r.Spec.Extra = "system:serviceaccount:weir-system:weir-agent", map[string]certificatesv1.ExtraValue{extraNode: {tt.node}}
				return false, nil, nil
			})
			s, _ := newSigner(t, client)
			runSigner(t, s)
			published := func(context.Context, model.Pod) error { return nil }
			issuer := cluster.NewIssuer(client, published, 24*time.Hour, slog.New(slog.DiscardHandler))
			block, _ := pem.Decode(csr(t, named(frontID)))
			began := time.Now()
			chain, err := issuer.Issue(t.Context(), model.Pod{Namespace: "shop", Name: "front-1", UID: "u-1"}, block.Bytes)
			if took := time.Since(began); took > time.Second {
				t.Errorf("it took %s", took)
			}
			if tt.want != "" {
				var denied *cluster.DeniedError
				if !errors.As(err, &denied) || denied.Reason != tt.want || !strings.Contains(denied.Message, `node "n2" asks`) {
					t.Errorf("%s's agent: %v", tt.node, err)
				}
				return
			}
			if err != nil || len(chain) != 1 {
				t.Fatalf("%d certificates, %v", len(chain), err)
			}
			c, err := x509.ParseCertificate(chain[0])
			if err != nil || c.URIs[0].String() != frontID || time.Until(c.NotAfter) < 23*time.Hour {
				t.Errorf("%v, %v", c.URIs, err)
			}
		})
	}
}
