// Package model holds the nouns the agent decides on: pods, namespaces, Services,
// their endpoints, their routes and their policies, each cut down to the fields that a
// decision looks at.
//
// cluster fills these structs, from an API server or from a directory; decide
// reads them. They are plain values with no reference to where they came from,
// so that a decision cannot depend on it. Nothing here validates or decides, and
// nothing here is a wire format.
package model

import (
	"net/netip"

	"github.com/weirmesh/weir/proxy/route"
)

// Prefix starts every label and annotation that is Weir's. No others are kept, but for
// pods' labels, which policies select them by.
const Prefix = "weirmesh.io/"

// Namespace is a Kubernetes namespace.
type Namespace struct {
	Name   string
	Labels map[string]string // those with Prefix; nil if there are none
}

// Phase is where a pod is in its life, as its status says.
type Phase string

// Phases of a pod. The empty phase, of a pod from a manifest, counts as pending.
const (
	PodPending   Phase = "Pending"
	PodRunning   Phase = "Running"
	PodSucceeded Phase = "Succeeded"
	PodFailed    Phase = "Failed"
	PodUnknown   Phase = "Unknown"
)

// Finished reports whether all containers have ended for good.
func (p Phase) Finished() bool { return p == PodSucceeded || p == PodFailed }

// Pod is a Kubernetes pod.
type Pod struct {
	UID, Namespace, Name string
	ServiceAccount       string
	Workload             string // name of what it is one of, in its namespace; its own if it is of nothing
	Node                 string
	RuntimeClass         string // spec.runtimeClassName; empty: the runtime's default

	// MirrorHash is the annotation kubernetes.io/config.mirror: this pod stands
	// for a static pod of its node, whose UID the runtime knows is this hash, not
	// UID. Empty on every other pod.
	MirrorHash string

	HostNetwork bool
	Phase       Phase
	Leaving     bool // it has a deletionTimestamp
	Captured    bool // its status says so: the agent of its node has published it

	Labels      map[string]string // all; nil if there are none
	Annotations map[string]string // those with Prefix; nil if there are none
	Addresses   []netip.Addr      // status.podIPs, none before the sandbox is up
	Probes      []route.Probe     // what kubelet asks it by the network
}

// Peer is a pod of any node, as those see it who call it or whom it calls.
type Peer struct {
	Namespace, Name string
	ServiceAccount  string        // empty: it has none, as a static pod
	Workload        string        // as Pod's
	Captured        bool          // the agent of its node says so
	Ports           *InboundPorts // nil: it says nothing of them

	Addresses []netip.Addr // none of a pod that is in its node's network, or has ended
}

// InboundPorts are annotations of a pod, empty: it has none of that name.
type InboundPorts struct{ Exclude, Include string }

// ID is "namespace/name".
func (p Peer) ID() string { return p.Namespace + "/" + p.Name }

// ID is "namespace/name".
func (p Pod) ID() string { return p.Namespace + "/" + p.Name }

// KnownLabels are its labels; none are not nil.
func (p Pod) KnownLabels() map[string]string {
	if p.Labels == nil {
		return map[string]string{}
	}
	return p.Labels
}

// Static reports whether the pod was made by its node, from a file.
func (p Pod) Static() bool { return p.MirrorHash != "" }

// HasUID reports whether the pod is the one a container runtime calls uid.
// Runtimes that name no UID and pods of manifests that have none match anything.
func (p Pod) HasUID(uid string) bool {
	return uid == "" || p.UID == "" || p.UID == uid || (p.Static() && p.MirrorHash == uid)
}
