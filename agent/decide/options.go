package decide

import (
	"fmt"
	"slices"

	"github.com/weirmesh/weir/plugin/capture"
)

// Options are the mesh options that a decision depends on. Their zero value is
// not useful: start from Defaults.
type Options struct {
	// ExemptNamespaces are never captured, whatever their labels or their pods'
	// labels say, so that the cluster can always start.
	ExemptNamespaces []string `json:"exemptNamespaces"`
	// ExemptStaticPods leaves out the pods that a node makes from files. They have
	// no service account, hence no identity: captured, they match no source.
	ExemptStaticPods bool `json:"exemptStaticPods"`
	// AllowRuntimeClasses are the runtimeClassNames whose pods can be captured: all
	// their packets pass through the rules of the pod's network namespace. With
	// gVisor or Kata they do not, so a class that is not listed is refused. A pod
	// without a class is always fine.
	AllowRuntimeClasses []string `json:"allowRuntimeClasses"`
	// OutboundPort and InboundPort are the proxy's own ports in every pod.
	OutboundPort uint16 `json:"outboundPort"`
	InboundPort  uint16 `json:"inboundPort"`
	// KeepClientAddress has the application see its callers' addresses, for which
	// the proxy gets CAP_NET_RAW. Without it, or where a node's rules are iptables',
	// the application sees the pod's own address.
	KeepClientAddress bool `json:"keepClientAddress"`
}

// Defaults are the options of a mesh that sets none.
func Defaults() Options {
	return Options{
		ExemptNamespaces:  []string{"kube-system", "weir-system"},
		OutboundPort:      capture.DefaultOutboundPort,
		InboundPort:       capture.DefaultInboundPort,
		KeepClientAddress: true,
	}
}

// Validate reports the first option that cannot be meant.
func (o Options) Validate() error {
	switch {
	case slices.Contains(o.ExemptNamespaces, ""):
		return fmt.Errorf("exemptNamespaces: an entry is empty")
	case slices.Contains(o.AllowRuntimeClasses, ""):
		return fmt.Errorf("allowRuntimeClasses: an entry is empty; pods without a class are always allowed")
	case o.OutboundPort == 0:
		return fmt.Errorf("outboundPort: must be between 1 and 65535")
	case o.InboundPort == 0:
		return fmt.Errorf("inboundPort: must be between 1 and 65535")
	case o.OutboundPort == o.InboundPort:
		return fmt.Errorf("inboundPort: %d is the outboundPort too", o.InboundPort)
	}
	return nil
}

// ownPort returns a port of the proxy that r covers.
func (o Options) ownPort(r capture.PortRange) (uint16, bool) {
	for _, p := range []uint16{o.OutboundPort, o.InboundPort} {
		if r.First <= p && p <= r.Last {
			return p, true
		}
	}
	return 0, false
}
