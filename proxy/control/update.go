package control

import (
	"errors"
	"fmt"
	"math"
	"net/netip"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/identity"
	"github.com/weirmesh/weir/proxy/route"
)

var errSuperseded = errors.New("a newer session has begun")

// update is a proxypb.Update that was found good.
type update struct {
	config       *proxyConfig // nil: unchanged
	trust        *trust       // nil: unchanged
	destinations []answer     // if one is there twice, the last one counts
	removed      []netip.AddrPort
}

type answer struct {
	addr    netip.AddrPort
	version string
	value   route.Destination
}

// trust is what is said of identities.
type trust struct {
	version string
	value   identity.Trust
}

// parse checks all of an Update.
func parse(msg *proxypb.Update) (update, error) {
	var out update
	for _, r := range msg.GetResources() {
		if err := out.add(r); err != nil {
			return update{}, fmt.Errorf("resource %q: %w", r.GetName(), err)
		}
	}
	for _, name := range msg.GetRemoved() {
		if name == proxypb.ProxyResource {
			return update{}, errors.New("the pod's own config cannot be removed")
		}
		if name == proxypb.IdentityResource {
			continue // an agent that knows of none; what it is does not go
		}
		addr, err := proxypb.ParseDestinationName(name)
		if err != nil {
			return update{}, fmt.Errorf("removed: %w", err)
		}
		out.removed = append(out.removed, addr)
	}
	return out, nil
}

func (u *update) add(r *proxypb.Resource) error {
	if r.GetVersion() == "" {
		return errors.New("no version")
	}
	switch body := r.GetBody().(type) {
	case *proxypb.Resource_Proxy:
		if r.GetName() != proxypb.ProxyResource {
			return fmt.Errorf("a ProxyConfig is named %q", proxypb.ProxyResource)
		}
		config, err := parseConfig(body.Proxy)
		if err != nil {
			return err
		}
		config.version = r.GetVersion()
		u.config = config
	case *proxypb.Resource_Identity:
		if r.GetName() != proxypb.IdentityResource {
			return fmt.Errorf("an Identity is named %q", proxypb.IdentityResource)
		}
		value, err := identity.ParseTrust(body.Identity)
		if err != nil {
			return err
		}
		u.trust = &trust{r.GetVersion(), value}
	case *proxypb.Resource_Destination:
		addr, err := proxypb.ParseDestinationName(r.GetName())
		if err != nil {
			return err
		}
		value, err := body.Destination.ToDestination()
		if err != nil {
			return err
		}
		u.destinations = append(u.destinations, answer{addr, r.GetVersion(), value})
	default:
		return errors.New("neither a ProxyConfig, an Identity nor a Destination")
	}
	return nil
}

func parseConfig(msg *proxypb.ProxyConfig) (*proxyConfig, error) {
	out := &proxyConfig{own: map[netip.Addr]struct{}{}, classic: msg.GetClassicKeyExchange()}
	for _, s := range msg.GetOwnAddresses() {
		addr, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fmt.Errorf("own address: %w", err)
		}
		out.own[addr.Unmap()] = struct{}{}
	}
	for _, s := range msg.GetMeshRanges() {
		prefix, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("mesh range: %w", err)
		}
		out.mesh = append(out.mesh, prefix)
	}
	for _, r := range msg.GetOpaquePorts() {
		if r.GetFirst() == 0 || r.GetFirst() > r.GetLast() || r.GetLast() > math.MaxUint16 {
			return nil, fmt.Errorf("opaque ports: %d to %d is no range of ports", r.GetFirst(), r.GetLast())
		}
		out.opaque = append(out.opaque, portRange{uint16(r.GetFirst()), uint16(r.GetLast())})
	}
	inbound, err := msg.ToInbound()
	if err != nil {
		return nil, fmt.Errorf("inbound: %w", err)
	}
	out.inbound = inbound
	if out.authz, err = msg.GetAuthorization().ToSet(); err != nil {
		return nil, fmt.Errorf("authorization: %w", err)
	}
	if out.peers, out.byPort, err = msg.ToPeers(); err != nil {
		return nil, fmt.Errorf("peers: %w", err)
	}
	if out.probes, err = msg.ToProbes(); err != nil {
		return nil, fmt.Errorf("probes: %w", err)
	}
	return out, nil
}

// apply takes an Update over, all of it at once, or returns why not and changes
// nothing. Destinations that are not held (any more) are skipped. An Update of any
// session but the newest is refused.
func (s *Store) apply(session uint64, msg *proxypb.Update) error {
	u, err := parse(msg)
	if err != nil {
		return err
	}
	if err := s.take(session, u); err != nil {
		return err
	}
	if u.config != nil || u.trust != nil {
		s.tell()
	}
	return nil
}

// tell has looked what goes on still may.
func (s *Store) tell() {
	if s.Changed != nil {
		s.Changed()
	}
}

func (s *Store) take(session uint64, u update) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if session != s.session {
		return errSuperseded
	}
	if u.config != nil {
		if s.config.Swap(u.config) == nil {
			close(s.configured)
		}
	}
	if u.trust != nil {
		s.trusted = u.trust.version
		s.identity.Told(u.trust.value)
	}
	for _, a := range u.destinations {
		h := s.destinations[a.addr]
		if h == nil {
			continue
		}
		first := h.version == ""
		h.version, h.value = a.version, a.value
		if first {
			close(h.answered)
		}
	}
	for _, addr := range u.removed {
		if h := s.destinations[addr]; h != nil {
			s.forget(h)
		}
	}
	return nil
}
