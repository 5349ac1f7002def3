package decide

import (
	"slices"

	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/plugin/capture"
)

// Identity is the SPIFFE ID that a pod has to show to the proxies of others that connect
// to a port of it: it is captured there, so that its own proxy answers. Empty: it is
// spoken to in plain.
//
// What cannot be read says nothing: the pod's proxy got what there was before.
func Identity(p model.Peer, port uint16, opts Options) string {
	if !p.Captured || p.ServiceAccount == "" || !capturedAt(p, port, opts) {
		return ""
	}
	domain, err := identity.TrustDomain(opts.TrustDomain)
	if err != nil {
		return ""
	}
	id, err := identity.Of(domain, p.Namespace, p.ServiceAccount)
	if err != nil {
		return ""
	}
	return id.String()
}

// capturedAt reports whether connections to a port go through the pod's proxy.
func capturedAt(p model.Peer, port uint16, opts Options) bool {
	own := model.InboundPorts{}
	if p.Ports != nil {
		own = *p.Ports
	}
	exclude, excludes := ports(own.Exclude, opts.Annotations[ExcludeInboundAnnotation])
	if excludes && has(exclude, port) {
		return false
	}
	include, includes := ports(own.Include, opts.Annotations[IncludeInboundAnnotation])
	return !includes || has(include, port)
}

// ports reads an annotation, or the mesh's default; it is false if there is none.
func ports(own, mesh string) ([]capture.PortRange, bool) {
	if own == "" {
		own = mesh
	}
	list, err := capture.ParsePorts(own)
	return list, own != "" && err == nil
}

func has(list []capture.PortRange, port uint16) bool {
	return slices.ContainsFunc(list, func(r capture.PortRange) bool { return r.First <= port && port <= r.Last })
}
