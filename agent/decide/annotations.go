package decide

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/plugin/capture"
)

// annotation is one annotation this version understands. Where a pod gives both
// the include and the exclude list of one kind, what is captured is the include
// list without the exclude list. All but name and set is for the pod's owner to
// read: manifests/ANNOTATIONS.md is made of it.
type annotation struct {
	name   string // without model.Prefix
	value  string // what it may be
	absent string // what holds without it
	does   string
	set    func(d *Decision, value string) error
}

const (
	portList  = "ports and ranges of ports: `80,8000-8010`"
	cidrList  = "address ranges of both families: `10.0.0.0/8,fd00::/8`"
	ownerList = "numbers and ranges of numbers, 0 to 4294967294: `0,1000-1999`"
)

// annotations are all that this version understands.
var annotations = []annotation{
	{"exclude-inbound-ports", portList, "none", "TCP connections to these ports of the pod go past the proxy",
		func(d *Decision, v string) error { return setPorts(&d.Spec.ExcludeInboundPorts, v) }},
	{"include-inbound-ports", portList + ", none of them the proxy's", "all", "of the TCP connections to the pod, only those to these ports go through the proxy",
		func(d *Decision, v string) error { return setForeignPorts(&d.Spec.IncludeInboundPorts, v) }},
	{"exclude-outbound-ports", portList, "none", "TCP connections of the pod to these ports go past the proxy",
		func(d *Decision, v string) error { return setPorts(&d.Spec.ExcludeOutboundPorts, v) }},
	{"include-outbound-ports", portList + ", none of them the proxy's", "all", "of the pod's TCP connections, only those to these ports go through the proxy",
		func(d *Decision, v string) error { return setForeignPorts(&d.Spec.IncludeOutboundPorts, v) }},
	{"exclude-outbound-cidrs", cidrList, "none", "connections of the pod to these addresses go past the proxy",
		func(d *Decision, v string) error { return setPrefixes(&d.Spec.ExcludeOutboundCIDRs, v) }},
	{"include-outbound-cidrs", cidrList, "all", "of the pod's connections, only those to these addresses go through the proxy",
		func(d *Decision, v string) error { return setPrefixes(&d.Spec.IncludeOutboundCIDRs, v) }},
	{"exclude-outbound-uids", ownerList, "none", "connections of processes that run as these users go past the proxy; counted is the user that made the socket, as the pod's user namespace numbers it",
		func(d *Decision, v string) error { return setIDs(&d.Spec.ExcludeOutboundUIDs, v) }},
	{"exclude-outbound-gids", ownerList, "none", "the same for groups; supplementary groups do not count",
		func(d *Decision, v string) error { return setIDs(&d.Spec.ExcludeOutboundGIDs, v) }},
	{"exclude-interfaces", "names of interfaces, which need not exist: `net1,net2`", "none", "what enters or leaves the pod by these interfaces goes past the proxy, in both directions; the proxy's own ports stay closed there too",
		setInterfaces},
	{"opaque-ports", portList, "none", "what goes to these ports, of the pod or dialled by it, is passed on as it is, by connection: no route applies to it",
		func(d *Decision, v string) error { return setPorts(&d.Proxy.OpaquePorts, v) }},
	{"quic", "`pass` or `reject`", "`pass`", "`reject` answers UDP from the pod to port 443 with ICMP or ICMPv6 port unreachable, so that HTTP/3 clients go on over TCP at once; not for users, groups, interfaces and addresses that are not captured, nor on lo",
		setQUIC},
	{"proxy-memory-limit", "a quantity as Kubernetes writes them, from " + inMi(MinMemoryLimit) + " to " + inMi(MaxMemoryLimit) + ": `64Mi`", "`" + inMi(DefaultMemoryLimit) + "`", "memory that the pod's proxy may use, none of it swapped; Go's own limit (GOMEMLIMIT) is nine tenths of it",
		setMemoryLimit},
	{"proxy-cpu-weight", "a number from 1 to 10000", fmt.Sprintf("`%d`", DefaultCPUWeight), "share of the CPU that the pod's proxy gets among the node's proxies when there is not enough: `cpu.weight` of cgroup v2, converted to `cpu.shares` on v1. All of them together weigh what kubelet has all pods weigh",
		setCPUWeight},
}

// find is the annotation of a name without model.Prefix, or nil.
func find(name string) *annotation {
	i := slices.IndexFunc(annotations, func(a annotation) bool { return a.name == name })
	if i < 0 {
		return nil
	}
	return &annotations[i]
}

// wishes reads the annotations of a captured pod, and the mesh's where it has none
// of that name. The first bad one in order of name is the error, so that a pod's
// event is the same at every retry.
func wishes(pod model.Pod, opts Options) (Decision, error) {
	all := maps.Clone(opts.Annotations)
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, pod.Annotations)
	var d Decision
	for _, key := range slices.Sorted(maps.Keys(all)) {
		name, ours := strings.CutPrefix(key, model.Prefix)
		if !ours {
			continue
		}
		value := all[key]
		a := find(name)
		if a == nil {
			return Decision{}, unknown(pod, name, value)
		}
		if err := a.set(&d, value); err != nil {
			return Decision{}, attachpb.InvalidRequest.Fail("annotation %s on pod %s is %q: %v", key, pod.ID(), short(value), err)
		}
	}
	return d, nil
}

// unknown is the failure for an annotation that is not in annotations.
func unknown(pod model.Pod, name, value string) error {
	subject := fmt.Sprintf("annotation %s%s=%q on pod %s", model.Prefix, name, short(value), pod.ID())
	if model.Prefix+name == CaptureLabel {
		return attachpb.InvalidRequest.Fail("%s means nothing: %s is a label", subject, CaptureLabel)
	}
	if near := nearest(name); near != "" {
		return attachpb.InvalidRequest.Fail("unknown %s; did you mean %s%s?", subject, model.Prefix, near)
	}
	return attachpb.InvalidRequest.Fail("unknown %s", subject)
}

// short is as much of a value as a message should repeat.
func short(value string) string {
	const most = 100 // bytes
	if len(value) <= most {
		return value
	}
	return strings.ToValidUTF8(value[:most], "") + "…"
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
func setForeignPorts(list *[]capture.PortRange, value string) error {
	if err := setPorts(list, value); err != nil {
		return err
	}
	for _, r := range *list {
		if own, covers := ownPort(r); covers {
			return fmt.Errorf("\"%s\": includes %d, a port of the proxy itself", r, own)
		}
	}
	return nil
}

func setIDs(list *[]capture.IDRange, value string) error {
	ids, err := capture.ParseIDs(value)
	if err != nil {
		return err
	}
	*list = ids
	return nil
}

func setInterfaces(d *Decision, value string) error {
	names, err := capture.ParseInterfaces(value)
	if err != nil {
		return err
	}
	d.Spec.ExcludeInterfaces = names
	return nil
}

func setQUIC(d *Decision, value string) error {
	switch value {
	case "pass":
	case "reject":
		d.Spec.RefuseQUIC = true
	default:
		return fmt.Errorf(`neither "pass" nor "reject"`)
	}
	return nil
}

func setMemoryLimit(d *Decision, value string) error {
	limit, err := parseBytes(value, MinMemoryLimit, MaxMemoryLimit)
	if err != nil {
		return err
	}
	d.Proxy.MemoryLimit = limit
	return nil
}

func setCPUWeight(d *Decision, value string) error {
	weight, err := strconv.ParseUint(value, 10, 16)
	if err != nil || weight < 1 || weight > maxCPUWeight {
		return fmt.Errorf("not a number between 1 and %d", maxCPUWeight)
	}
	d.Proxy.CPUWeight = uint32(weight)
	return nil
}

// setPrefixes reads a comma-separated list of prefixes, "10.0.0.0/8,fd00::/8".
// Blanks around items are allowed. A prefix with bits set behind its length is
// refused rather than masked: either the address or the length is a mistake.
func setPrefixes(list *[]netip.Prefix, value string) error {
	items, err := capture.Items(value)
	if err != nil {
		return err
	}
	var out []netip.Prefix
	for _, item := range items {
		prefix, err := parsePrefix(item)
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
