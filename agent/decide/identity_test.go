package decide

import (
	"testing"

	"github.com/weirmesh/weir/agent/model"
)

// TestWhoIsReachedByMTLS: what the mesh says of ports holds where a pod says nothing.
func TestWhoIsReachedByMTLS(t *testing.T) {
	const id = "spiffe://cluster.local/ns/shop/sa/back"
	for _, c := range []struct {
		exclude, include string // the mesh's
		own              *model.InboundPorts
		want             string
	}{
		{"", "", nil, id},
		{"8000-8080", "", nil, ""},
		{"8000-8079", "", nil, id},
		{"", "80,8080", nil, id},
		{"", "80", nil, ""},
		{"8080", "8080", nil, ""},
		{"8080", "", &model.InboundPorts{Exclude: "80"}, id},
		{"8080", "", &model.InboundPorts{Include: "8080"}, ""},
		{"", "80", &model.InboundPorts{Include: "8080"}, id},
		{"80", "80", &model.InboundPorts{Exclude: "none", Include: "none"}, id}, // which cannot be read
	} {
		opts := Defaults()
		opts.Annotations = map[string]string{ExcludeInboundAnnotation: c.exclude, IncludeInboundAnnotation: c.include}
		p := model.Peer{Namespace: "shop", Name: "back-1", ServiceAccount: "back", Captured: true, Ports: c.own}
		if got := NewReach(opts).Identity(p, 8080); got != c.want {
			t.Errorf("%+v, of its own %+v: %q", c, c.own, got)
		}
	}
	if got := NewReach(Options{}).Identity(model.Peer{Namespace: "shop", ServiceAccount: "back", Captured: true}, 8080); got != "" {
		t.Errorf("without a trust domain: %q", got)
	}
}
