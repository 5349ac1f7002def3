package decide

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/plugin/capture"
)

// prefixes compares netip values, which cmp cannot look into.
var prefixes = cmpopts.EquateComparable(netip.Prefix{})

func shop(labels map[string]string) model.Namespace {
	return model.Namespace{Name: "shop", Labels: labels}
}

func label(value string) map[string]string { return map[string]string{CaptureLabel: value} }

func TestWhoIsCaptured(t *testing.T) {
	front := model.Pod{Namespace: "shop", Name: "front"}
	with := func(change func(*model.Pod)) model.Pod {
		p := front
		change(&p)
		return p
	}
	allow := func(change func(*Options)) Options {
		o := Defaults()
		change(&o)
		return o
	}
	labelled := func(v string) model.Pod { return with(func(p *model.Pod) { p.Labels = label(v) }) }

	tests := []struct {
		promise string
		pod     model.Pod
		ns      model.Namespace
		opts    Options
		want    Decision
	}{
		{"without a label a pod is left alone", front, shop(nil), Defaults(),
			Decision{Reason: "neither pod nor namespace has the label weirmesh.io/capture"}},
		{"a namespace's label captures its pods", front, shop(label("enabled")), Defaults(),
			Decision{Captured: true, Reason: "label weirmesh.io/capture=enabled on namespace shop"}},
		{"a pod's label captures it alone", labelled("enabled"), shop(nil), Defaults(),
			Decision{Captured: true, Reason: "label weirmesh.io/capture=enabled on pod shop/front"}},
		{"a pod opts out of its namespace", labelled("disabled"), shop(label("enabled")), Defaults(),
			Decision{Reason: "label weirmesh.io/capture=disabled on pod shop/front"}},
		{"a pod opts into a namespace that is out", labelled("enabled"), shop(label("disabled")), Defaults(),
			Decision{Captured: true, Reason: "label weirmesh.io/capture=enabled on pod shop/front"}},
		{"a pod's label counts even where the namespace's means nothing", labelled("disabled"), shop(label("maybe")), Defaults(),
			Decision{Reason: "label weirmesh.io/capture=disabled on pod shop/front"}},
		{"a namespace may be labelled out", front, shop(label("disabled")), Defaults(),
			Decision{Reason: "label weirmesh.io/capture=disabled on namespace shop"}},
		{"an exempt namespace is never captured",
			model.Pod{Namespace: "kube-system", Name: "coredns"}, model.Namespace{Name: "kube-system"}, Defaults(),
			Decision{Reason: "namespace kube-system is exempt"}},
		{"exempt wins over the pod's label, and says so",
			model.Pod{Namespace: "kube-system", Name: "coredns", Labels: label("enabled")}, model.Namespace{Name: "kube-system"}, Defaults(),
			Decision{Reason: "namespace kube-system is exempt",
				Warning: "label weirmesh.io/capture=enabled on the pod has no effect: namespace kube-system is exempt"}},
		{"exempt wins over the namespace's label, and says so",
			model.Pod{Namespace: "kube-system", Name: "coredns"}, model.Namespace{Name: "kube-system", Labels: label("enabled")}, Defaults(),
			Decision{Reason: "namespace kube-system is exempt",
				Warning: "label weirmesh.io/capture=enabled on namespace kube-system has no effect: namespace kube-system is exempt"}},
		{"a pod on the host's network is never captured, in a captured namespace without a word",
			with(func(p *model.Pod) { p.HostNetwork = true }), shop(label("enabled")), Defaults(),
			Decision{Reason: "the pod is on the host's network"}},
		{"a pod on the host's network that asks for it is told",
			with(func(p *model.Pod) { p.HostNetwork, p.Labels = true, label("enabled") }), shop(nil), Defaults(),
			Decision{Reason: "the pod is on the host's network",
				Warning: "label weirmesh.io/capture=enabled on the pod has no effect: the pod is on the host's network"}},
		{"static pods are captured like others",
			with(func(p *model.Pod) { p.MirrorHash = "h" }), shop(label("enabled")), Defaults(),
			Decision{Captured: true, Reason: "label weirmesh.io/capture=enabled on namespace shop"}},
		{"static pods can be exempt",
			with(func(p *model.Pod) { p.MirrorHash = "h" }), shop(label("enabled")), allow(func(o *Options) { o.ExemptStaticPods = true }),
			Decision{Reason: "static pods are exempt"}},
		{"a runtime class that is listed is fine",
			with(func(p *model.Pod) { p.RuntimeClass = "nvidia" }), shop(label("enabled")), allow(func(o *Options) { o.AllowRuntimeClasses = []string{"nvidia"} }),
			Decision{Captured: true, Reason: "label weirmesh.io/capture=enabled on namespace shop"}},
		{"a runtime class does not matter to a pod that is not captured",
			with(func(p *model.Pod) { p.RuntimeClass = "gvisor" }), shop(nil), Defaults(),
			Decision{Reason: "neither pod nor namespace has the label weirmesh.io/capture"}},
		{"annotations do not matter to a pod that is not captured",
			with(func(p *model.Pod) { p.Annotations = map[string]string{"weirmesh.io/quic": "?"} }), shop(nil), Defaults(),
			Decision{Reason: "neither pod nor namespace has the label weirmesh.io/capture"}},
	}
	for _, test := range tests {
		t.Run(test.promise, func(t *testing.T) {
			got, err := Capture(test.pod, test.ns, test.opts)
			if err != nil {
				t.Fatal(err)
			}
			test.want.Spec.KeepClient = test.want.Captured
			if diff := cmp.Diff(test.want, got, prefixes); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestWhatIsRefused(t *testing.T) {
	annotated := func(name, value string) model.Pod {
		return model.Pod{Namespace: "shop", Name: "front", Annotations: map[string]string{"weirmesh.io/" + name: value}}
	}
	tests := []struct {
		promise string
		pod     model.Pod
		ns      model.Namespace
		code    attachpb.Code
		want    string // the detail
	}{
		{"a namespace's label that means nothing", model.Pod{Namespace: "shop", Name: "front"}, shop(label("true")), attachpb.InvalidRequest,
			`label weirmesh.io/capture on namespace shop is "true", which is neither "enabled" nor "disabled"`},
		{"a pod's label that means nothing", model.Pod{Namespace: "shop", Name: "front", Labels: label("")}, shop(label("enabled")), attachpb.InvalidRequest,
			`label weirmesh.io/capture on pod shop/front is "", which is neither "enabled" nor "disabled"`},
		{"a runtime class that is not listed", model.Pod{Namespace: "shop", Name: "front", RuntimeClass: "kata"}, shop(label("enabled")), attachpb.Unsupported,
			`pod shop/front has runtimeClassName "kata", whose traffic may never meet the capture rules; allowRuntimeClasses lists those that are fine`},
		{"a port that is none", annotated("exclude-inbound-ports", "80,http"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/exclude-inbound-ports on pod shop/front is "80,http": "http": not a port between 1 and 65535`},
		{"an empty list", annotated("include-outbound-ports", ""), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/include-outbound-ports on pod shop/front is "": "": not a port between 1 and 65535`},
		{"the proxy's inbound port among those to take in", annotated("include-inbound-ports", "15006"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/include-inbound-ports on pod shop/front is "15006": "15006": includes 15006, a port of the proxy itself`},
		{"a range with a port of the proxy in it", annotated("include-outbound-ports", "80,1-65535"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/include-outbound-ports on pod shop/front is "80,1-65535": "1-65535": includes 15001, a port of the proxy itself`},
		{"an address range that is none", annotated("exclude-outbound-cidrs", "10.0.0.0/33"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/exclude-outbound-cidrs on pod shop/front is "10.0.0.0/33": "10.0.0.0/33": not an address range like 10.0.0.0/8 or fd00::/8`},
		{"an address for a range", annotated("exclude-outbound-cidrs", "fd00::1"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/exclude-outbound-cidrs on pod shop/front is "fd00::1": "fd00::1": write fd00::1/128`},
		{"a range with an address inside", annotated("include-outbound-cidrs", "10.1.2.3/8"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/include-outbound-cidrs on pod shop/front is "10.1.2.3/8": "10.1.2.3/8": has bits behind its length; the range is 10.0.0.0/8`},
		{"IPv4 in IPv6's clothes", annotated("include-outbound-cidrs", "::ffff:10.0.0.0/104"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/include-outbound-cidrs on pod shop/front is "::ffff:10.0.0.0/104": "::ffff:10.0.0.0/104": write IPv4 ranges as IPv4`},
		{"a user by name", annotated("exclude-outbound-uids", "root"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/exclude-outbound-uids on pod shop/front is "root": "root": not a number between 0 and 4294967294`},
		{"the user that stands for none", annotated("exclude-outbound-uids", "1000-4294967295"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/exclude-outbound-uids on pod shop/front is "1000-4294967295": "1000-4294967295": not a number between 0 and 4294967294`},
		{"a range of groups that ends before it starts", annotated("exclude-outbound-gids", "9-8"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/exclude-outbound-gids on pod shop/front is "9-8": "9-8": the range ends before it starts`},
		{"an empty list of groups", annotated("exclude-outbound-gids", ""), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/exclude-outbound-gids on pod shop/front is "": "": not a number between 0 and 4294967294`},
		{"more ports than a node should sort", annotated("exclude-inbound-ports", strings.Repeat("80,", 256)+"80"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/exclude-inbound-ports on pod shop/front is "` + strings.Repeat("80,", 33) + `8…": more than 256 items`},
		{"more ranges than a node should sort", annotated("exclude-outbound-cidrs", strings.Repeat("::/0,", 256)+"::/0"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/exclude-outbound-cidrs on pod shop/front is "` + strings.Repeat("::/0,", 20) + `…": more than 256 items`},
		{"an interface with an alias", annotated("exclude-interfaces", "net1,eth0:1"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/exclude-interfaces on pod shop/front is "net1,eth0:1": "eth0:1": not an interface's name: ':' is in it`},
		{"an interface that Linux does not have", annotated("exclude-interfaces", "1234567890123456"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/exclude-interfaces on pod shop/front is "1234567890123456": "1234567890123456": not an interface's name: those have 1 to 15 characters`},
		{"an opaque port that is none", annotated("opaque-ports", "0"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/opaque-ports on pod shop/front is "0": "0": not a port between 1 and 65535`},
		{"QUIC neither way", annotated("quic", "Reject"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/quic on pod shop/front is "Reject": neither "pass" nor "reject"`},
		{"too little memory", annotated("proxy-memory-limit", "33554431"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/proxy-memory-limit on pod shop/front is "33554431": not between 32Mi and 16Gi`},
		{"too much memory", annotated("proxy-memory-limit", "18G"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/proxy-memory-limit on pod shop/front is "18G": not between 32Mi and 16Gi`},
		{"memory in no unit of Kubernetes", annotated("proxy-memory-limit", "64MB"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/proxy-memory-limit on pod shop/front is "64MB": not a quantity like 64Mi or 134217728`},
		{"no weight", annotated("proxy-cpu-weight", "0"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/proxy-cpu-weight on pod shop/front is "0": not a number between 1 and 10000`},
		{"too much weight", annotated("proxy-cpu-weight", "10001"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/proxy-cpu-weight on pod shop/front is "10001": not a number between 1 and 10000`},
		{"half a weight", annotated("proxy-cpu-weight", "0.5"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/proxy-cpu-weight on pod shop/front is "0.5": not a number between 1 and 10000`},
		{"an annotation that is misspelt", annotated("exclude-inbound-port", "80"), shop(label("enabled")), attachpb.InvalidRequest,
			`unknown annotation weirmesh.io/exclude-inbound-port="80" on pod shop/front; did you mean weirmesh.io/exclude-inbound-ports?`},
		{"a short one that is misspelt: near to everything", annotated("quit", "x"), shop(label("enabled")), attachpb.InvalidRequest,
			`unknown annotation weirmesh.io/quit="x" on pod shop/front`},
		{"an annotation that is like none", annotated("sidecar", "no"), shop(label("enabled")), attachpb.InvalidRequest,
			`unknown annotation weirmesh.io/sidecar="no" on pod shop/front`},
		{"a label among the annotations", annotated("capture", "disabled"), shop(label("enabled")), attachpb.InvalidRequest,
			`annotation weirmesh.io/capture="disabled" on pod shop/front means nothing: weirmesh.io/capture is a label`},
	}
	for _, test := range tests {
		t.Run(test.promise, func(t *testing.T) {
			_, err := Capture(test.pod, test.ns, Defaults())
			var failure *attachpb.Failure
			if !errors.As(err, &failure) {
				t.Fatalf("got %v, want a Failure", err)
			}
			if diff := cmp.Diff(&attachpb.Failure{Code: test.code, Detail: test.want}, failure); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestWhatOfAPodIsCaptured(t *testing.T) {
	prefix := netip.MustParsePrefix
	tests := []struct {
		promise     string
		annotations map[string]string
		want        capture.Spec
	}{
		{"without annotations, all TCP", nil, capture.Spec{}},
		{"others' annotations are not ours", map[string]string{"example.com/exclude-inbound-ports": "x"}, capture.Spec{}},
		{"ports and ranges of them", map[string]string{
			"weirmesh.io/exclude-inbound-ports":  "22, 8000-8010",
			"weirmesh.io/include-inbound-ports":  "80",
			"weirmesh.io/exclude-outbound-ports": "5432",
			"weirmesh.io/include-outbound-ports": "1-15000,15002-15005,15007-65535",
		}, capture.Spec{
			ExcludeInboundPorts:  []capture.PortRange{{First: 22, Last: 22}, {First: 8000, Last: 8010}},
			IncludeInboundPorts:  []capture.PortRange{{First: 80, Last: 80}},
			ExcludeOutboundPorts: []capture.PortRange{{First: 5432, Last: 5432}},
			IncludeOutboundPorts: []capture.PortRange{{First: 1, Last: 15000}, {First: 15002, Last: 15005}, {First: 15007, Last: 65535}},
		}},
		{"address ranges of both families", map[string]string{
			"weirmesh.io/exclude-outbound-cidrs": "10.1.0.0/16, fd00:1::/32",
			"weirmesh.io/include-outbound-cidrs": "10.0.0.0/8,fd00::/8,::/0",
		}, capture.Spec{
			ExcludeOutboundCIDRs: []netip.Prefix{prefix("10.1.0.0/16"), prefix("fd00:1::/32")},
			IncludeOutboundCIDRs: []netip.Prefix{prefix("10.0.0.0/8"), prefix("fd00::/8"), prefix("::/0")},
		}},
		{"the proxy's own ports may be excluded, which they are anyway", map[string]string{"weirmesh.io/exclude-inbound-ports": "15000-15010"},
			capture.Spec{ExcludeInboundPorts: []capture.PortRange{{First: 15000, Last: 15010}}}},
	}
	for _, test := range tests {
		t.Run(test.promise, func(t *testing.T) {
			pod := model.Pod{Namespace: "shop", Name: "front", Labels: label("enabled"), Annotations: test.annotations}
			got, err := Capture(pod, shop(nil), Defaults())
			if err != nil {
				t.Fatal(err)
			}
			test.want.KeepClient = true
			if diff := cmp.Diff(test.want, got.Spec, prefixes); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestWhatAPodGetsOfItsOtherWishes(t *testing.T) {
	all := Decision{
		Captured: true,
		Reason:   "label weirmesh.io/capture=enabled on pod shop/front",
		Spec: capture.Spec{
			ExcludeOutboundUIDs: []capture.IDRange{{First: 0, Last: 0}, {First: 1000, Last: 1999}},
			ExcludeOutboundGIDs: []capture.IDRange{{First: 7, Last: capture.MaxID}},
			ExcludeInterfaces:   []string{"net1", "eth0.100"},
			RefuseQUIC:          true,
			KeepClient:          true,
		},
		Proxy: Proxy{
			MemoryLimit: 64 << 20,
			CPUWeight:   10000,
			OpaquePorts: []capture.PortRange{{First: 3306, Last: 3306}, {First: 5000, Last: 5999}},
		},
	}
	tests := []struct {
		promise     string
		annotations map[string]string
		want        Decision
	}{
		{"all of them", map[string]string{
			"weirmesh.io/exclude-outbound-uids": "0, 1000-1999",
			"weirmesh.io/exclude-outbound-gids": "7-4294967294",
			"weirmesh.io/exclude-interfaces":    "net1, eth0.100",
			"weirmesh.io/opaque-ports":          "3306,5000-5999",
			"weirmesh.io/quic":                  "reject",
			"weirmesh.io/proxy-memory-limit":    "64Mi",
			"weirmesh.io/proxy-cpu-weight":      "10000",
		}, all},
		{"what is the default already", map[string]string{"weirmesh.io/quic": "pass"}, Decision{Captured: true, Reason: all.Reason, Spec: capture.Spec{KeepClient: true}}},
		{"an opaque port may be the proxy's: it is nobody's there", map[string]string{"weirmesh.io/opaque-ports": "15001"},
			Decision{Captured: true, Reason: all.Reason, Spec: capture.Spec{KeepClient: true}, Proxy: Proxy{OpaquePorts: []capture.PortRange{{First: 15001, Last: 15001}}}}},
	}
	for _, test := range tests {
		t.Run(test.promise, func(t *testing.T) {
			pod := model.Pod{Namespace: "shop", Name: "front", Labels: label("enabled"), Annotations: test.annotations}
			got, err := Capture(pod, shop(nil), Defaults())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got, prefixes); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestClientAddressesAreKeptUnlessTurnedOff(t *testing.T) {
	pod := model.Pod{Namespace: "shop", Name: "front", Labels: label("enabled")}
	for _, keep := range []bool{true, false} {
		opts := Defaults()
		if !opts.KeepClientAddress {
			t.Error("not by default")
		}
		opts.KeepClientAddress = keep
		got, err := Capture(pod, shop(nil), opts)
		if err != nil || got.Spec.KeepClient != keep {
			t.Errorf("%v: %v, %v", keep, got.Spec.KeepClient, err)
		}
	}
}

// Whatever an annotation says, the answer is a failure with the right code or a
// spec that survives the wire and keeps off the proxy.
func FuzzAnnotation(f *testing.F) {
	for _, name := range []string{"exclude-inbound-ports", "include-outbound-ports", "exclude-outbound-cidrs", "include-outbound-cidr", "exclude-outbound-uids", "exclude-interfaces",
		"opaque-ports", "quic", "proxy-memory-limit", "proxy-cpu-weight", ""} {
		for _, value := range []string{"", "80", "80,8000-8010", "15001", "0-0", "65536", "10.0.0.0/8,fd00::/8", "10.0.0.1", "::ffff:1.2.3.4/128", "fe80::1%eth0/64", "\n",
			"reject", "0,4294967294", "eth0,net1+", "64Mi", "1.5e8", "10000"} {
			f.Add(name, value)
		}
	}
	f.Fuzz(func(t *testing.T, name, value string) {
		opts := Defaults()
		pod := model.Pod{Namespace: "shop", Name: "front", Labels: label("enabled"), Annotations: map[string]string{model.Prefix + name: value}}
		d, err := Capture(pod, model.Namespace{}, opts)
		if err != nil {
			var failure *attachpb.Failure
			if !errors.As(err, &failure) || failure.Code != attachpb.InvalidRequest {
				t.Fatalf("not an invalid request: %v", err)
			}
			return
		}
		for _, r := range append(d.Spec.IncludeInboundPorts, d.Spec.IncludeOutboundPorts...) {
			if own, covers := ownPort(r); covers {
				t.Errorf("%s includes the proxy's port %d", r, own)
			}
		}
		if l := d.Proxy.MemoryLimit; l != 0 && (l < MinMemoryLimit || l > MaxMemoryLimit) {
			t.Errorf("memory limit %d", l)
		}
		if d.Proxy.CPUWeight > maxCPUWeight {
			t.Errorf("CPU weight %d", d.Proxy.CPUWeight)
		}
		d.Spec.OutboundPort, d.Spec.InboundPort = capture.DefaultOutboundPort, capture.DefaultInboundPort
		d.Spec.Bypass = capture.Bypass{Path: "weir", ID: 1, Level: 1}
		back, err := attachpb.FromSpec(d.Spec).ToSpec()
		if err != nil {
			t.Fatalf("the spec does not survive the wire: %v", err)
		}
		if diff := cmp.Diff(d.Spec, back, prefixes, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("the wire changes the spec:\n%s", diff)
		}
	})
}
