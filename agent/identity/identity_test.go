package identity

import (
	"strings"
	"testing"

	"github.com/weirmesh/weir/agent/model"
)

func TestAPodIsItsServiceAccount(t *testing.T) {
	td, err := TrustDomain("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		pod  model.Pod
		want string
	}{
		{"a pod", model.Pod{Namespace: "shop", Name: "front-1", ServiceAccount: "front"}, "spiffe://cluster.local/ns/shop/sa/front"},
		{"without an account", model.Pod{Namespace: "shop", Name: "front-1"}, ""},
		{"a static pod", model.Pod{Namespace: "shop", Name: "front-n1", ServiceAccount: "front", MirrorHash: "f00"}, ""},
	} {
		id, err := OfPod(td, c.pod)
		if err != nil || id.String() != c.want {
			t.Errorf("%s: %q, %v; want %q", c.name, id, err, c.want)
		}
	}
	for _, bad := range [][2]string{{"shop", ""}, {"", "front"}, {"shop", "a/b"}, {"..", "front"}, {"shop", "a b"}} {
		if id, err := Of(td, bad[0], bad[1]); err == nil {
			t.Errorf("%q: %s", bad, id)
		}
	}
}

func TestATrustDomainIsANameAndNothingElse(t *testing.T) {
	for _, good := range []string{"cluster.local", "a", "td_1-b.example.com"} {
		if td, err := TrustDomain(good); err != nil || td.Name() != good {
			t.Errorf("%q: %v, %v", good, td, err)
		}
	}
	for _, bad := range []string{"", "Cluster.local", "spiffe://cluster.local", "cluster.local/ns", "a:b", "a b", strings.Repeat("a", 256)} {
		if _, err := TrustDomain(bad); err == nil || !strings.Contains(err.Error(), "trust domain") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
