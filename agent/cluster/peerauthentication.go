package cluster

import (
	"fmt"

	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// PeerAuthentication cuts an object down to the model. The error names the field; it is
// about what the CRD lets no object have. With it comes what is in force in place of the
// policy: something that demands mTLS of all that the policy may be about.
func PeerAuthentication(p *v1alpha1.PeerAuthentication) (model.PeerAuthentication, error) {
	out := model.PeerAuthentication{
		Namespace: shared(p.Namespace), Name: p.Name, Created: p.CreationTimestamp.UTC(), Generation: p.Generation,
	}
	v := &validator{}
	if v.podSelector(p.Spec.PodSelector); v.err == nil {
		out.Selector = toSelector(p.Spec.PodSelector)
	}
	v.peers(&p.Spec)
	if v.err != nil {
		out.Closed = true
		return out, v.err
	}
	if p.Spec.Mode != nil {
		mode := peerModes[*p.Spec.Mode]
		out.Mode = &mode
	}
	for _, one := range p.Spec.Ports {
		if out.Ports == nil {
			out.Ports = map[uint16]route.PeerMode{}
		}
		out.Ports[uint16(one.Port)] = peerModes[one.Mode]
	}
	return out, nil
}

// closedPeers is PeerAuthentication as closedPolicy is AuthorizationPolicy.
func closedPeers(p *v1alpha1.PeerAuthentication) (model.PeerAuthentication, error) {
	out, _ := PeerAuthentication(p)
	return out, nil
}

var peerModes = map[v1alpha1.PeerMode]route.PeerMode{
	v1alpha1.Permissive: route.Permissive, v1alpha1.Strict: route.Strict, v1alpha1.Disable: route.Disable,
}

// peers checks what the CRD does, in manifests/base/crds, but for the selector's own.
func (v *validator) peers(spec *v1alpha1.PeerAuthenticationSpec) {
	modes := []v1alpha1.PeerMode{v1alpha1.Permissive, v1alpha1.Strict, v1alpha1.Disable}
	if spec.Mode != nil {
		oneOf(v, "spec.mode", *spec.Mode, modes)
	}
	v.some("spec.ports: number of ports", spec.Ports == nil, len(spec.Ports), 32)
	seen := map[int32]bool{}
	for i, p := range spec.Ports {
		path := fmt.Sprintf("spec.ports[%d]", i)
		v.between(path+".port", int(p.Port), 1, 65535)
		oneOf(v, path+".mode", p.Mode, modes)
		if seen[p.Port] {
			v.fail(path, "port %d is there already", p.Port)
		}
		seen[p.Port] = true
	}
	if spec.Mode == nil && spec.Ports == nil {
		v.fail("spec", "neither mode nor ports: it says nothing")
	}
	if spec.Ports != nil && len(toSelector(spec.PodSelector)) == 0 {
		v.fail("spec", "ports are those of some pods: podSelector has to say of which")
	}
}
