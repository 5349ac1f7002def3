package control

import (
	"container/list"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/identity"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
)

const (
	// answerTimeout is how long a connection waits for what the agent has to say.
	answerTimeout = 5 * time.Second
	// idleTimeout is how long a destination is held that nothing connects to.
	idleTimeout = 10 * time.Minute
	// maxHeld bounds the destinations held; the least recently used give way, so
	// that a port scan costs its own connections some time and nobody memory.
	maxHeld = 4096
)

// Store holds what the agent has told this proxy, and what it has yet to be asked.
// It survives the agent. Make it with NewStore.
type Store struct {
	// Changed is called when the policies that govern the pod may be others, or the roots
	// that are trusted, before that is acknowledged; nil: nobody is. Set it before the
	// Store is used.
	Changed func()

	dirty    chan struct{}               // buffered: changed has entries
	config   atomic.Pointer[proxyConfig] // nil: not told yet; set with mu, read for every request
	identity *identity.Holder            // told what the agent says of it

	mu           sync.Mutex
	trusted      string        // the version of what identity was told; "": nothing
	configured   chan struct{} // closed once config is there
	destinations map[netip.AddrPort]*held
	used         list.List // of *held, most recently used first
	changed      map[string]struct{}
	session      uint64 // counts sessions
	janitor      *time.Timer
}

// held is one destination that is subscribed to.
type held struct {
	addr     netip.AddrPort
	version  string        // "": the agent has not answered yet
	answered chan struct{} // closed when it has, or when it is given up
	value    route.Destination
	lastUsed time.Time
	element  *list.Element
	told     bool   // the session knows that it is subscribed to
	waitedIn uint64 // the session count in which somebody waited in vain, plus one
}

// proxyConfig is the pod's own config.
type proxyConfig struct {
	version string
	own     map[netip.Addr]struct{}
	mesh    []netip.Prefix
	opaque  []portRange
	inbound map[uint16]*route.Policy // by the application's port
	authz   *authz.Set
	peers   route.PeerMode
	byPort  map[uint16]route.PeerMode // where it is not peers
	probes  route.Probes
	classic bool
}

// portRange is first to last, both included.
type portRange struct{ first, last uint16 }

// NewStore returns one that holds nothing and wants the pod's own config. It tells i
// what the agent says of identities.
func NewStore(i *identity.Holder) *Store {
	return &Store{
		identity:     i,
		dirty:        make(chan struct{}, 1),
		configured:   make(chan struct{}),
		destinations: map[netip.AddrPort]*held{},
		changed:      map[string]struct{}{},
	}
}

// Ready returns when the pod's own config is there; a *reason.Error
// (config_unavailable) after 5 s.
func (s *Store) Ready(ctx context.Context) error {
	select {
	case <-s.configured:
		return nil
	default:
	}
	if err := wait(ctx, s.configured, answerTimeout); err != nil {
		return &reason.Error{Reason: reason.ConfigUnavailable, Err: err}
	}
	return nil
}

// Own reports whether an address is the pod's.
func (s *Store) Own(addr netip.Addr) bool {
	config := s.config.Load()
	if config == nil {
		return false
	}
	_, ok := config.own[addr]
	return ok
}

// Opaque reports whether the pod has it that what goes to a port, of the pod or
// dialled by it, is not to be looked into.
func (s *Store) Opaque(port uint16) bool {
	config := s.config.Load()
	return config != nil && slices.ContainsFunc(config.opaque, func(r portRange) bool {
		return r.first <= port && port <= r.last
	})
}

// Inbound is the policy that holds for callers of the application's port; nil: none.
func (s *Store) Inbound(port uint16) *route.Policy {
	if config := s.config.Load(); config != nil {
		return config.inbound[port]
	}
	return nil
}

// Authorization are the policies that govern the pod; nil: none.
func (s *Store) Authorization() *authz.Set {
	if config := s.config.Load(); config != nil {
		return config.authz
	}
	return nil
}

// Probes are what the kubelet asks of the pod.
func (s *Store) Probes() route.Probes {
	if config := s.config.Load(); config != nil {
		return config.probes
	}
	return route.Probes{}
}

// ClassicKeyExchange reports whether handshakes go without a post-quantum key exchange.
func (s *Store) ClassicKeyExchange() bool {
	config := s.config.Load()
	return config != nil && config.classic
}

// Peers is what the application's port demands of its callers.
func (s *Store) Peers(port uint16) route.PeerMode {
	config := s.config.Load()
	if config == nil {
		return route.Strict
	}
	if mode, ok := config.byPort[port]; ok {
		return mode
	}
	return config.peers
}

// Destination says what addr stands for. The first to ask subscribes to it; all
// wait together, at most 5 s. Without an answer an address outside the mesh's
// ranges goes where it was going, as the zero Destination; one inside is a
// *reason.Error (destination_unknown).
func (s *Store) Destination(ctx context.Context, addr netip.AddrPort) (route.Destination, error) {
	s.mu.Lock()
	h := s.use(addr)
	if h.version != "" {
		value := h.value
		s.mu.Unlock()
		return value, nil
	}
	passes := !s.inMesh(addr.Addr())
	waited := h.waitedIn == s.session+1
	s.mu.Unlock()

	if passes && waited {
		// Somebody has waited for this answer, and no agent has come since.
		return route.Destination{}, nil
	}
	err := wait(ctx, h.answered, answerTimeout)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case h.version != "":
		return h.value, nil
	case ctx.Err() != nil:
		return route.Destination{}, &reason.Error{Reason: reason.Shutdown, Err: ctx.Err()}
	case !passes:
		return route.Destination{}, &reason.Error{Reason: reason.DestinationUnknown, Err: err}
	}
	h.waitedIn = s.session + 1
	return route.Destination{}, nil
}

// Known is Destination where the answer is there.
func (s *Store) Known(addr netip.AddrPort) (route.Destination, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.use(addr)
	return h.value, h.version != ""
}

// Destinations are those held that the agent has answered.
func (s *Store) Destinations() []route.Destination {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []route.Destination
	for _, h := range s.destinations {
		if h.version != "" {
			out = append(out, h.value)
		}
	}
	return out
}

// wait returns nil when done is closed in time.
func wait(ctx context.Context, done <-chan struct{}, limit time.Duration) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
		return nil
	case <-timer.C:
		return fmt.Errorf("no answer from the agent within %s", limit)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// use returns what is held of addr, which is now the most recently used.
func (s *Store) use(addr netip.AddrPort) *held {
	h := s.destinations[addr]
	if h != nil {
		h.lastUsed = h.lastUsed.Add(time.Since(h.lastUsed)) // for half of what time.Now takes
		s.used.MoveToFront(h.element)
		return h
	}
	if len(s.destinations) >= maxHeld {
		s.forget(s.used.Back().Value.(*held))
	}
	name := proxypb.DestinationName(addr)
	h = &held{addr: addr, answered: make(chan struct{}), lastUsed: time.Now()}
	_, h.told = s.changed[name] // forgotten, and the session has not heard of that
	h.element = s.used.PushFront(h)
	s.destinations[addr] = h
	s.mark(name)
	if s.janitor == nil {
		s.janitor = time.AfterFunc(idleTimeout, s.expire)
	}
	return h
}

// forget lets go of a destination. Whoever waits for it waits no longer.
func (s *Store) forget(h *held) {
	delete(s.destinations, h.addr)
	s.used.Remove(h.element)
	if h.version == "" {
		close(h.answered)
	}
	name := proxypb.DestinationName(h.addr)
	if !h.told {
		// Else a port scan would pile up names while no agent takes them.
		delete(s.changed, name)
		return
	}
	s.mark(name)
}

// expire forgets what nothing has connected to for idleTimeout, and runs again
// when the next one is due.
func (s *Store) expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.janitor = nil
	for back := s.used.Back(); back != nil; back = s.used.Back() {
		h := back.Value.(*held)
		if left := idleTimeout - time.Since(h.lastUsed); left > 0 {
			s.janitor = time.AfterFunc(left, s.expire)
			return
		}
		s.forget(h)
	}
}

// Close stops the timer that forgets idle destinations.
func (s *Store) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.janitor != nil {
		s.janitor.Stop()
	}
}

// mark notes that the agent has to be told about a name.
func (s *Store) mark(name string) {
	s.changed[name] = struct{}{}
	s.wake()
}

// wake has the session look for changes.
func (s *Store) wake() {
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}

func (s *Store) inMesh(addr netip.Addr) bool {
	config := s.config.Load()
	if config == nil {
		return true
	}
	for _, p := range config.mesh {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

// begin is the start of a session, which from now on is the one that counts. It
// returns the session's number and everything held, with versions. What was
// marked before is in it, except what is held no more, of which the new session
// has not heard.
func (s *Store) begin() (uint64, *proxypb.Subscribe) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.session++
	clear(s.changed)
	out := &proxypb.Subscribe{Versions: map[string]string{proxypb.ProxyResource: "", proxypb.IdentityResource: s.trusted}}
	if config := s.config.Load(); config != nil {
		out.Versions[proxypb.ProxyResource] = config.version
	}
	for addr, h := range s.destinations {
		out.Versions[proxypb.DestinationName(addr)] = h.version
		h.told = true
	}
	return s.session, out
}

// changes are the names to subscribe to and to unsubscribe from since the last
// call; nil for none, or when there is a newer session, which gets them.
func (s *Store) changes(session uint64) (*proxypb.Subscribe, *proxypb.Unsubscribe) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if session != s.session {
		return nil, nil
	}
	var sub *proxypb.Subscribe
	var unsub *proxypb.Unsubscribe
	for name := range s.changed {
		// Only what is held now counts, so one that came, went and came again in
		// between is subscribed to, with the version it has now.
		addr, err := proxypb.ParseDestinationName(name)
		if h := s.destinations[addr]; err == nil && h != nil {
			if sub == nil {
				sub = &proxypb.Subscribe{Versions: map[string]string{}}
			}
			sub.Versions[name] = h.version
			h.told = true
			continue
		}
		if unsub == nil {
			unsub = &proxypb.Unsubscribe{}
		}
		unsub.Names = append(unsub.Names, name)
	}
	clear(s.changed)
	return sub, unsub
}
