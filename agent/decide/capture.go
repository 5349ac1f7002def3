// Package decide turns what the agent knows of the cluster into what it tells
// plugins and proxies: whether a pod is captured and which of its traffic, what a
// destination address stands for and how it is routed; and into what it says of
// routes, to those who wrote them.
//
// Everything here is a pure function of model values and Options: no clock, no
// network, no cache, and nothing that depends on whether the model came from an
// API server or from a directory. It does not say how traffic is captured (that
// is plugin/capture) nor picks an endpoint (proxy/balance).
package decide

import (
	"fmt"
	"regexp"
	"slices"

	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/plugin/capture"
)

// CaptureLabel, on a pod or else on its namespace, says whether the pod is
// captured: Enabled or Disabled.
const (
	CaptureLabel = model.Prefix + "capture"
	Enabled      = "enabled"
	Disabled     = "disabled"
)

// Annotations of a pod that others have to know of, to reach it.
const (
	ExcludeInboundAnnotation = model.Prefix + "exclude-inbound-ports"
	IncludeInboundAnnotation = model.Prefix + "include-inbound-ports"
)

// Decision says whether a pod is captured, and why.
type Decision struct {
	Captured bool
	Reason   string // one clause, for logs and events
	// Warning is set when the pod asks for what it does not get although nothing
	// fails: worth an event on the pod.
	Warning string
	// Spec has only the traffic fields set; the proxy's ports and the bypass are
	// the node's to fill in. The zero Spec captures all TCP.
	Spec capture.Spec
	// Proxy is what the pod wants of its proxy.
	Proxy Proxy
}

// Proxy is what a pod may ask of its proxy. Zeros leave it to the node.
type Proxy struct {
	MemoryLimit int64  // bytes, MinMemoryLimit to MaxMemoryLimit
	CPUWeight   uint32 // as cgroup v2's cpu.weight, 1 to 10000
	// OpaquePorts, the pod's or dialled by it, carry what is not to be looked into.
	OpaquePorts []capture.PortRange
}

// Bounds of a proxy's memory, in bytes, and what it gets without a wish.
const (
	MinMemoryLimit     = 32 << 20
	MaxMemoryLimit     = 16 << 30
	DefaultMemoryLimit = 128 << 20
)

// DefaultCPUWeight is what a proxy gets without a wish, and what the kernel gives
// to a cgroup.
const (
	DefaultCPUWeight = 100
	maxCPUWeight     = 10000
)

// Capture decides on one pod. In order of weight: an exempt namespace, the host's
// network and, if so configured, a static pod are never captured; then the pod's
// label counts, then the namespace's; without a label a pod is not captured.
//
// Errors are *attachpb.Failure: InvalidRequest for a label or annotation that
// means nothing, Unsupported for a runtime class that cannot be captured. The
// annotations of a pod that is not captured are not looked at.
func Capture(pod model.Pod, ns model.Namespace, opts Options) (Decision, error) {
	if reason, exempt := exemption(pod, opts); exempt {
		return Decision{Reason: reason, Warning: ignored(pod, ns, reason)}, nil
	}
	enabled, reason, err := wanted(pod, ns)
	if err != nil {
		return Decision{}, err
	}
	if !enabled {
		return Decision{Reason: reason}, nil
	}
	if pod.RuntimeClass != "" && !slices.Contains(opts.AllowRuntimeClasses, pod.RuntimeClass) {
		return Decision{}, attachpb.Unsupported.Fail(
			"pod %s has runtimeClassName %q, whose traffic may never meet the capture rules; allowRuntimeClasses lists those that are fine",
			pod.ID(), pod.RuntimeClass)
	}
	d, err := wishes(pod, opts)
	if err != nil {
		return Decision{}, err
	}
	d.Spec.KeepClient = opts.KeepClientAddress
	d.Captured, d.Reason = true, reason
	return d, nil
}

// exemption says why no label can have this pod captured.
func exemption(pod model.Pod, opts Options) (string, bool) {
	switch {
	case slices.Contains(opts.ExemptNamespaces, pod.Namespace):
		return fmt.Sprintf("namespace %s is exempt", pod.Namespace), true
	case pod.HostNetwork:
		return "the pod is on the host's network", true
	case pod.Static() && opts.ExemptStaticPods:
		return staticExempt, true
	}
	return "", false
}

const staticExempt = "static pods are exempt"

// Unseen decides on a pod of which nothing but the UID is known yet, the one the
// container runtime names, if that is enough: it is false otherwise. Where
// static pods are exempt they need no API server, which may be one of them.
func Unseen(uid string, opts Options) (Decision, bool) {
	if opts.ExemptStaticPods && staticUID.MatchString(uid) {
		return Decision{Reason: staticExempt}, true
	}
	return Decision{}, false
}

// staticUID is the form of the UIDs that kubelet makes for the pods of its files:
// an MD5 sum (applyDefaults in kubelet's pkg/kubelet/config/common.go). The API
// server's are UUIDs, with hyphens.
var staticUID = regexp.MustCompile(`^[0-9a-f]{32}$`)

// ignored is the warning for a label that an exemption overrules. A namespace's
// label says nothing about its pods that are on the host's network or static.
func ignored(pod model.Pod, ns model.Namespace, reason string) string {
	if v, ok := pod.Labels[CaptureLabel]; ok && v != Disabled {
		return fmt.Sprintf("label %s=%s on the pod has no effect: %s", CaptureLabel, v, reason)
	}
	if pod.HostNetwork || pod.Static() {
		return ""
	}
	if v, ok := ns.Labels[CaptureLabel]; ok && v != Disabled {
		return fmt.Sprintf("label %s=%s on namespace %s has no effect: %s", CaptureLabel, v, pod.Namespace, reason)
	}
	return ""
}

// wanted reads the label that counts: the pod's if it has one, else the
// namespace's.
func wanted(pod model.Pod, ns model.Namespace) (bool, string, error) {
	value, ok := pod.Labels[CaptureLabel]
	where := "pod " + pod.ID()
	if !ok {
		value, ok = ns.Labels[CaptureLabel]
		where = "namespace " + pod.Namespace
	}
	if !ok {
		return false, fmt.Sprintf("neither pod nor namespace has the label %s", CaptureLabel), nil
	}
	reason := fmt.Sprintf("label %s=%s on %s", CaptureLabel, value, where)
	switch value {
	case Enabled:
		return true, reason, nil
	case Disabled:
		return false, reason, nil
	}
	return false, "", attachpb.InvalidRequest.Fail("label %s on %s is %q, which is neither %q nor %q",
		CaptureLabel, where, value, Enabled, Disabled)
}
