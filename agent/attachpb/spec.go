package attachpb

import (
	"fmt"
	"net/netip"

	"github.com/weirmesh/weir/plugin/capture"
)

// FromSpec renders a capture.Spec for the wire.
func FromSpec(s capture.Spec) *Spec {
	return &Spec{
		OutboundPort:         uint32(s.OutboundPort),
		InboundPort:          uint32(s.InboundPort),
		BypassPath:           s.Bypass.Path,
		BypassId:             s.Bypass.ID,
		BypassLevel:          uint32(s.Bypass.Level),
		KeepClient:           s.KeepClient,
		ExcludeInboundPorts:  fromPorts(s.ExcludeInboundPorts),
		IncludeInboundPorts:  fromPorts(s.IncludeInboundPorts),
		ExcludeOutboundPorts: fromPorts(s.ExcludeOutboundPorts),
		IncludeOutboundPorts: fromPorts(s.IncludeOutboundPorts),
		ExcludeOutboundCidrs: fromPrefixes(s.ExcludeOutboundCIDRs),
		IncludeOutboundCidrs: fromPrefixes(s.IncludeOutboundCIDRs),
		ExcludeOutboundUids:  fromIDs(s.ExcludeOutboundUIDs),
		ExcludeOutboundGids:  fromIDs(s.ExcludeOutboundGIDs),
		ExcludeInterfaces:    s.ExcludeInterfaces,
		RefuseQuic:           s.RefuseQUIC,
	}
}

// ToSpec reads a capture.Spec from the wire. An error names the field.
func (x *Spec) ToSpec() (capture.Spec, error) {
	var r reader
	s := capture.Spec{
		OutboundPort:         r.port("outbound_port", x.GetOutboundPort()),
		InboundPort:          r.port("inbound_port", x.GetInboundPort()),
		Bypass:               capture.Bypass{Path: x.GetBypassPath(), ID: x.GetBypassId(), Level: int(x.GetBypassLevel())},
		KeepClient:           x.GetKeepClient(),
		ExcludeInboundPorts:  r.ports("exclude_inbound_ports", x.GetExcludeInboundPorts()),
		IncludeInboundPorts:  r.ports("include_inbound_ports", x.GetIncludeInboundPorts()),
		ExcludeOutboundPorts: r.ports("exclude_outbound_ports", x.GetExcludeOutboundPorts()),
		IncludeOutboundPorts: r.ports("include_outbound_ports", x.GetIncludeOutboundPorts()),
		ExcludeOutboundCIDRs: r.prefixes("exclude_outbound_cidrs", x.GetExcludeOutboundCidrs()),
		IncludeOutboundCIDRs: r.prefixes("include_outbound_cidrs", x.GetIncludeOutboundCidrs()),
		ExcludeOutboundUIDs:  toIDs(x.GetExcludeOutboundUids()),
		ExcludeOutboundGIDs:  toIDs(x.GetExcludeOutboundGids()),
		ExcludeInterfaces:    x.GetExcludeInterfaces(),
		RefuseQUIC:           x.GetRefuseQuic(),
	}
	if r.err != nil {
		return capture.Spec{}, r.err
	}
	if err := s.Validate(); err != nil {
		return capture.Spec{}, err
	}
	return s, nil
}

// reader remembers the first field that does not read.
type reader struct{ err error }

func (r *reader) fail(field string, value any) {
	if r.err == nil {
		r.err = fmt.Errorf("attach: %s: %v is out of range", field, value)
	}
}

func (r *reader) port(field string, v uint32) uint16 {
	if v == 0 || v > 65535 {
		r.fail(field, v)
		return 0
	}
	return uint16(v)
}

func (r *reader) ports(field string, in []*PortRange) []capture.PortRange {
	var out []capture.PortRange
	for _, p := range in {
		rng := capture.PortRange{First: r.port(field, p.GetFirst()), Last: r.port(field, p.GetLast())}
		if rng.First > rng.Last {
			r.fail(field, rng)
		}
		out = append(out, rng)
	}
	return out
}

func (r *reader) prefixes(field string, in []string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range in {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			r.fail(field, s)
			continue
		}
		out = append(out, p)
	}
	return out
}

func fromPorts(in []capture.PortRange) []*PortRange {
	var out []*PortRange
	for _, p := range in {
		out = append(out, &PortRange{First: uint32(p.First), Last: uint32(p.Last)})
	}
	return out
}

func fromIDs(in []capture.IDRange) []*IDRange {
	var out []*IDRange
	for _, r := range in {
		out = append(out, &IDRange{First: r.First, Last: r.Last})
	}
	return out
}

// toIDs leaves the judging to Spec.Validate.
func toIDs(in []*IDRange) []capture.IDRange {
	var out []capture.IDRange
	for _, r := range in {
		out = append(out, capture.IDRange{First: r.GetFirst(), Last: r.GetLast()})
	}
	return out
}

func fromPrefixes(in []netip.Prefix) []string {
	var out []string
	for _, p := range in {
		out = append(out, p.String())
	}
	return out
}
