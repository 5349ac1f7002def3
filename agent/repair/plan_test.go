package repair

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/plugin/capture"
)

var addr = netip.MustParseAddr("10.0.0.5")

func running(label string, annotations map[string]string) model.Pod {
	pod := model.Pod{Namespace: "shop", Name: "front", UID: "u1", Phase: model.PodRunning, Addresses: []netip.Addr{addr}, Annotations: annotations}
	if label != "" {
		pod.Labels = map[string]string{decide.CaptureLabel: label}
	}
	return pod
}

func attached(change func(*launch.Attachment)) []launch.Attachment {
	a := launch.Attachment{ContainerID: "c1", PodNamespace: "shop", PodName: "front", PodUID: "u1", Committed: true,
		Spec: capture.Spec{OutboundPort: 15001, InboundPort: 15006}}
	if change != nil {
		change(&a)
	}
	return []launch.Attachment{a}
}

func TestPlan(t *testing.T) {
	for name, c := range map[string]struct {
		pod         model.Pod
		attachments []launch.Attachment
		want        string
	}{
		"a running pod that should be captured is":       {running("enabled", nil), nil, "capture"},
		"one of another UID does not count":              {running("enabled", nil), attached(func(a *launch.Attachment) { a.PodUID = "u0" }), "capture"},
		"one that is captured stays":                     {running("enabled", nil), attached(nil), ""},
		"one whose label went is released":               {running("", nil), attached(nil), "release"},
		"one that says disabled is released":             {running("disabled", nil), attached(nil), "release"},
		"one that is being released is left alone":       {running("", nil), attached(func(a *launch.Attachment) { a.Released = true }), ""},
		"an ADD under way is left alone":                 {running("", nil), attached(func(a *launch.Attachment) { a.Committed = false }), ""},
		"one that is not to be captured and is not":      {running("", nil), nil, ""},
		"annotations that changed change what is turned": {running("enabled", map[string]string{"weirmesh.io/exclude-outbound-ports": "5432"}), attached(nil), "change"},
		"a label that means nothing is a complaint":      {running("yes", nil), attached(nil), "InvalidAnnotation"},
		"one that is being created is its ADD's business": {func() model.Pod {
			p := running("enabled", nil)
			p.Phase = model.PodPending
			return p
		}(), nil, ""},
		"one that is being deleted is left alone": {func() model.Pod {
			p := running("enabled", nil)
			p.Leaving = true
			return p
		}(), nil, ""},
		"one on the host's network is never captured": {func() model.Pod {
			p := running("enabled", nil)
			p.HostNetwork = true
			return p
		}(), nil, "CaptureFailed"},
	} {
		t.Run(name, func(t *testing.T) {
			p := plan([]model.Pod{c.pod}, func(n string) model.Namespace { return model.Namespace{Name: n} }, c.attachments, decide.Defaults())
			var got []string
			if len(p.capture) > 0 {
				got = append(got, "capture")
			}
			if len(p.release) > 0 {
				got = append(got, "release")
			}
			if len(p.change) > 0 {
				got = append(got, "change")
			}
			for _, c := range p.complaints {
				got = append(got, c.reason)
			}
			if strings.Join(got, " ") != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

// TestWishesForTheProxyComeAlong: captured in place, a pod gets the proxy that it
// would have got at its birth.
func TestWishesForTheProxyComeAlong(t *testing.T) {
	pod := running("enabled", map[string]string{"weirmesh.io/proxy-memory-limit": "64Mi", "weirmesh.io/quic": "reject"})
	p := plan([]model.Pod{pod}, func(n string) model.Namespace { return model.Namespace{Name: n} }, nil, decide.Defaults())
	if len(p.capture) != 1 || p.capture[0].dec.Proxy.MemoryLimit != 64<<20 || !p.capture[0].dec.Spec.RefuseQUIC {
		t.Errorf("%+v", p.capture)
	}
}

func TestAPodIsFoundByAllItsAddressesInOneNamespace(t *testing.T) {
	six := netip.MustParseAddr("fd00::5")
	pod := model.Pod{Addresses: []netip.Addr{addr, six}}
	both := launch.Sandbox{Name: "both", Addresses: []netip.Addr{addr, six}}
	for name, c := range map[string]struct {
		sandboxes []launch.Sandbox
		want      string
	}{
		"one":             {[]launch.Sandbox{{Name: "other", Addresses: []netip.Addr{addr}}, both}, "both"},
		"none":            {[]launch.Sandbox{{Name: "half", Addresses: []netip.Addr{six}}}, ""},
		"two are no good": {[]launch.Sandbox{both, both}, ""},
	} {
		got, err := find(c.sandboxes, pod)
		if got.Name != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %q, %v", name, got.Name, err)
		}
	}
}

// TestARebuiltAttachmentIsOfThePodWithItsAddresses: of no other, and of none if two
// have them.
func TestARebuiltAttachmentIsOfThePodWithItsAddresses(t *testing.T) {
	other := netip.MustParseAddr("10.0.0.6")
	pod := func(change func(*model.Pod)) model.Pod {
		p := running("enabled", nil)
		change(&p)
		return p
	}
	front := pod(func(*model.Pod) {})
	for name, c := range map[string]struct {
		pods  []model.Pod
		found bool
	}{
		"the one":                    {[]model.Pod{pod(func(p *model.Pod) { p.Name, p.Addresses = "back", []netip.Addr{other} }), front}, true},
		"none":                       {[]model.Pod{pod(func(p *model.Pod) { p.Addresses = []netip.Addr{other} })}, false},
		"one without addresses":      {[]model.Pod{pod(func(p *model.Pod) { p.Addresses = nil })}, false},
		"two":                        {[]model.Pod{front, pod(func(p *model.Pod) { p.Name = "again" })}, false},
		"one that had them before":   {[]model.Pod{front, pod(func(p *model.Pod) { p.Name, p.Phase = "job", model.PodSucceeded })}, true},
		"one on the host's network":  {[]model.Pod{pod(func(p *model.Pod) { p.HostNetwork = true })}, false},
		"one with a further address": {[]model.Pod{pod(func(p *model.Pod) { p.Addresses = append(p.Addresses, other) })}, false},
	} {
		got, err := findPod(c.pods, launch.Attachment{Addresses: []netip.Addr{addr}})
		if (err == nil) != c.found || c.found && got.Name != front.Name {
			t.Errorf("%s: %q, %v", name, got.Name, err)
		}
	}
}
