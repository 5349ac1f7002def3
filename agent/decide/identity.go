package decide

import (
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/plugin/capture"
)

// Reach is how pods are to be reached by the proxies of others, as far as the mesh's
// options say it. The zero value has all of them spoken to in plain.
type Reach struct {
	domain           spiffeid.TrustDomain
	exclude, include listedPorts // where a pod says nothing
}

// listedPorts are the ports that an annotation lists.
type listedPorts struct {
	ranges []capture.PortRange
	given  bool // it is there, and can be read
}

// NewReach reads the options. What cannot be read says nothing: proxies got what there was
// before.
func NewReach(opts Options) Reach {
	domain, err := identity.TrustDomain(opts.TrustDomain)
	if err != nil {
		return Reach{}
	}
	return Reach{domain, readPorts(opts.Annotations[ExcludeInboundAnnotation]), readPorts(opts.Annotations[IncludeInboundAnnotation])}
}

// Identity is the SPIFFE ID that a pod has to show to the proxies of others that connect
// to a port of it: it is captured there, so that its own proxy answers. Empty: it is
// spoken to in plain.
func (r Reach) Identity(p model.Peer, port uint16) string {
	if !p.Captured || p.ServiceAccount == "" || r.domain.IsZero() || !r.captured(p, port) {
		return ""
	}
	id, err := identity.Of(r.domain, p.Namespace, p.ServiceAccount)
	if err != nil {
		return ""
	}
	return id.String()
}

// captured reports whether connections to a port go through the pod's proxy.
func (r Reach) captured(p model.Peer, port uint16) bool {
	exclude, include := r.exclude, r.include
	if own := p.Ports; own != nil {
		exclude, include = exclude.unless(own.Exclude), include.unless(own.Include)
	}
	return !exclude.has(port) && (!include.given || include.has(port))
}

// unless is what a pod's own annotation says, if it has one.
func (l listedPorts) unless(own string) listedPorts {
	if own == "" {
		return l
	}
	return readPorts(own)
}

func (l listedPorts) has(port uint16) bool {
	return slices.ContainsFunc(l.ranges, func(r capture.PortRange) bool { return r.First <= port && port <= r.Last })
}

func readPorts(annotation string) listedPorts {
	ranges, err := capture.ParsePorts(annotation)
	if annotation == "" || err != nil {
		return listedPorts{}
	}
	return listedPorts{ranges, true}
}
