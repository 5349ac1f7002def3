package decide

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/plugin/capture"
)

// annotation is one annotation this version understands. Where a pod gives both
// the include and the exclude list of one kind, what is captured is the include
// list without the exclude list.
type annotation struct {
	name string // without model.Prefix
	set  func(spec *capture.Spec, value string, opts Options) error
}

// annotations are all that this version understands.
var annotations = []annotation{
	{"exclude-inbound-ports", func(s *capture.Spec, v string, _ Options) error {
		return setPorts(&s.ExcludeInboundPorts, v)
	}},
	{"include-inbound-ports", func(s *capture.Spec, v string, opts Options) error {
		return setForeignPorts(&s.IncludeInboundPorts, v, opts)
	}},
	{"exclude-outbound-ports", func(s *capture.Spec, v string, _ Options) error {
		return setPorts(&s.ExcludeOutboundPorts, v)
	}},
	{"include-outbound-ports", func(s *capture.Spec, v string, opts Options) error {
		return setForeignPorts(&s.IncludeOutboundPorts, v, opts)
	}},
	{"exclude-outbound-cidrs", func(s *capture.Spec, v string, _ Options) error {
		return setPrefixes(&s.ExcludeOutboundCIDRs, v)
	}},
	{"include-outbound-cidrs", func(s *capture.Spec, v string, _ Options) error {
		return setPrefixes(&s.IncludeOutboundCIDRs, v)
	}},
}

// unsupported are annotations with a meaning that this version does not give
// them. Ignoring one would capture what its pod asked to leave alone.
var unsupported = []string{
	"exclude-outbound-uids", "exclude-outbound-gids", "exclude-interfaces", "opaque-ports", "quic",
	"proxy-memory-limit", "proxy-cpu-weight",
}

// traffic reads the annotations of a captured pod. The first bad one in order of
// name is the error, so that a pod's event is the same at every retry.
func traffic(pod model.Pod, opts Options) (capture.Spec, error) {
	var spec capture.Spec
	for _, key := range slices.Sorted(maps.Keys(pod.Annotations)) {
		name, ours := strings.CutPrefix(key, model.Prefix)
		if !ours {
			continue
		}
		value := pod.Annotations[key]
		i := slices.IndexFunc(annotations, func(a annotation) bool { return a.name == name })
		if i < 0 {
			return capture.Spec{}, unknown(pod, name, value)
		}
		if err := annotations[i].set(&spec, value, opts); err != nil {
			return capture.Spec{}, attachpb.InvalidRequest.Fail("annotation %s on pod %s is %q: %v", key, pod.ID(), value, err)
		}
	}
	return spec, nil
}

// unknown is the failure for an annotation that is not in annotations.
func unknown(pod model.Pod, name, value string) error {
	subject := fmt.Sprintf("annotation %s%s=%q on pod %s", model.Prefix, name, value, pod.ID())
	if slices.Contains(unsupported, name) {
		return attachpb.InvalidRequest.Fail("%s is not supported by this version", subject)
	}
	if model.Prefix+name == CaptureLabel {
		return attachpb.InvalidRequest.Fail("%s means nothing: %s is a label", subject, CaptureLabel)
	}
	if near := nearest(name); near != "" {
		return attachpb.InvalidRequest.Fail("unknown %s; did you mean %s%s?", subject, model.Prefix, near)
	}
	return attachpb.InvalidRequest.Fail("unknown %s", subject)
}

func setPorts(list *[]capture.PortRange, value string) error {
	ports, err := capture.ParsePorts(value)
	if err != nil {
		return err
	}
	*list = ports
	return nil
}

// setForeignPorts is setPorts for include lists, which must not name a port of
// the proxy: it would be asked to take in connections to itself.
func setForeignPorts(list *[]capture.PortRange, value string, opts Options) error {
	if err := setPorts(list, value); err != nil {
		return err
	}
	for _, r := range *list {
		if own, covers := opts.ownPort(r); covers {
			return fmt.Errorf("\"%s\": includes %d, a port of the proxy itself", r, own)
		}
	}
	return nil
}

// setPrefixes reads a comma-separated list of prefixes, "10.0.0.0/8,fd00::/8".
// Blanks around items are allowed. A prefix with bits set behind its length is
// refused rather than masked: either the address or the length is a mistake.
func setPrefixes(list *[]netip.Prefix, value string) error {
	var out []netip.Prefix
	for item := range strings.SplitSeq(value, ",") {
		prefix, err := parsePrefix(strings.TrimSpace(item))
		if err != nil {
			return err
		}
		out = append(out, prefix)
	}
	*list = out
	return nil
}

func parsePrefix(item string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(item); err == nil && addr.Zone() == "" {
		addr = addr.Unmap()
		return netip.Prefix{}, fmt.Errorf("%q: write %s", item, netip.PrefixFrom(addr, addr.BitLen()))
	}
	prefix, err := netip.ParsePrefix(item)
	switch {
	case err != nil:
		return netip.Prefix{}, fmt.Errorf("%q: not an address range like 10.0.0.0/8 or fd00::/8", item)
	case prefix.Addr().Is4In6():
		return netip.Prefix{}, fmt.Errorf("%q: write IPv4 ranges as IPv4", item)
	case prefix != prefix.Masked():
		return netip.Prefix{}, fmt.Errorf("%q: has bits behind its length; the range is %s", item, prefix.Masked())
	}
	return prefix, nil
}
