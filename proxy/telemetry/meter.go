package telemetry

import (
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/reason"
	"github.com/weirmesh/weir/proxy/route"
)

// How many sets of labels there are at a time. From clientSets on callers are not
// told apart, from allSets on the rest is one.
const (
	clientSets = 384
	allSets    = 512
)

// Meter counts records for the agent's metrics, and tells it what was added since it
// was told before. Make it with NewMeter.
//
// A message is taken to be counted when it is acknowledged. Until then what comes in
// is added up for the next one, and a new session is sent the same message again: by
// its number the agent knows whether it has counted it.
type Meter struct {
	ready        chan struct{}
	destinations func() []route.Destination

	mu        sync.Mutex
	number    uint64
	pending   *proxypb.Metrics // sent, not acknowledged
	changed   bool             // since the last message
	traffic   map[trafficKey]*traffic
	last      trafficKey // that was counted, most often the next one, too
	lastOf    *traffic   // nil: none was
	opens     map[peers]*open
	overhead  [2]histogram // outbound, inbound
	ejections map[peers]uint64
	decisions map[decisionKey]uint64
	failures  map[failureKey]uint64
	ejected   map[endpointKey]time.Time // until when
}

// NewMeter returns one without a count. destinations are those in use.
func NewMeter(destinations func() []route.Destination) *Meter {
	m := &Meter{
		ready: make(chan struct{}, 1), destinations: destinations,
		// A proxy that follows another one must not repeat its numbers.
		number:  uint64(time.Now().UnixNano()),
		opens:   map[peers]*open{},
		ejected: map[endpointKey]time.Time{},
	}
	m.clear()
	return m
}

func (m *Meter) clear() {
	m.changed, m.lastOf = false, nil
	m.traffic, m.ejections, m.overhead = map[trafficKey]*traffic{}, map[peers]uint64{}, [2]histogram{}
	m.decisions, m.failures = map[decisionKey]uint64{}, map[failureKey]uint64{}
}

// peers are both ends, as proxypb.Peers has them.
type peers struct {
	direction         listen.Direction
	service, workload string
	client            netip.Addr
	namespace         string
	other             bool
}

type trafficKey struct {
	peers
	protocol, route string
	secure          bool // requests
	status          uint16
	grpcStatus      string
	reason          reason.Reason
}

type traffic struct {
	duration                                histogram
	sent, received, retries, opened, closed uint64
}

// open is how many requests, or connections, go on between two peers.
type open struct {
	peers
	requests, connections uint64
}

type decisionKey struct {
	peers
	policy  string
	verdict proxypb.Decisions_Verdict
}

type failureKey struct {
	peers
	reason reason.Reason
}

type endpointKey struct {
	service string
	addr    netip.AddrPort
}

func peersOf(r *Record) peers {
	if r.Direction == listen.Inbound {
		return peers{direction: r.Direction, client: r.Client.Addr().Unmap().WithZone(""), namespace: r.PeerNamespace}
	}
	return peers{direction: r.Direction, service: r.Service, workload: r.Workload}
}

// Begin counts a record as going on until End, between the peers that it names now.
// It may be called again when they are others.
func (m *Meter) Begin(r *Record) {
	p := peersOf(r)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.decide(r)
	again := r.open != nil
	if again && r.open.peers == p {
		return
	}
	r.leave()
	r.open = m.opened(p)
	if r.Protocol != "" {
		r.open.requests++
	} else {
		r.open.connections++
		if !again {
			m.count(trafficKey{peers: p}).opened++
		}
	}
	m.touch()
}

// leave ends what Begin counted.
func (r *Record) leave() {
	switch {
	case r.open == nil:
	case r.Protocol != "":
		r.open.requests--
	default:
		r.open.connections--
	}
}

// End counts a record that is complete.
func (m *Meter) End(r *Record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.decide(r)
	k := trafficKey{peers: peersOf(r), reason: r.Reason}
	if r.Protocol == "" {
		if r.open == nil {
			m.count(trafficKey{peers: k.peers}).opened++
		}
		t := m.count(k)
		t.closed++
		t.sent += r.Sent
		t.received += r.Received
	} else {
		k.secure = r.Secure
		k.protocol, k.route, k.status, k.grpcStatus = r.Protocol, r.RouteName, r.Status, knownStatus(r.GRPCStatus)
		t := m.count(k)
		t.duration.observe(r.Total)
		t.sent += r.RequestBody
		t.received += r.ResponseBody
		t.retries += uint64(max(r.Attempts, 1) - 1)
		m.overhead[r.Direction-listen.Outbound].observe(r.Overhead)
	}
	r.leave()
	r.open = nil
	m.touch()
}

// decide counts what was decided of what came in, once.
func (m *Meter) decide(r *Record) {
	if r.decided != uncounted || r.Direction != listen.Inbound {
		return
	}
	r.decided = counted
	verdict := proxypb.Decisions_ALLOW
	if !r.Authorization.Allowed {
		verdict = proxypb.Decisions_DENY
	}
	k := decisionKey{peersOf(r), r.Authorization.Policy, verdict}
	m.countDecision(k)
	for _, k.policy = range r.Authorization.Audited {
		k.verdict = proxypb.Decisions_AUDIT_DENY
		m.countDecision(k)
	}
	m.touch()
}

// countDecision is count for decisions. The policies are as many as govern the pod.
func (m *Meter) countDecision(k decisionKey) {
	if _, ok := m.decisions[k]; !ok && len(m.decisions) >= clientSets {
		k.peers = peers{direction: k.direction, other: true}
	}
	m.decisions[k]++
}

// knownStatus is a status of gRPC; what is none counts as UNKNOWN, or else
// applications could make as many labels as they like.
func knownStatus(text string) string {
	if text == "" { // most of them: of no gRPC
		return text
	}
	if n, err := strconv.Atoi(text); err == nil && 0 <= n && n <= 16 && strconv.Itoa(n) == text {
		return text
	}
	return "2"
}

// Ejected counts an endpoint that is set aside.
func (m *Meter) Ejected(backend *route.Backend, addr netip.AddrPort, how time.Duration) {
	p := peers{direction: listen.Outbound, service: backend.Service}
	for i := range backend.Endpoints {
		if backend.Endpoints[i].Addr == addr {
			p.workload = backend.Endpoints[i].Workload
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.ejections[p]; !ok && len(m.ejections) >= allSets {
		p = peers{direction: listen.Outbound, other: true}
	}
	m.ejections[p]++
	m.ejected[endpointKey{backend.Service, addr}] = time.Now().Add(how)
	m.touch()
}

// Failed counts an attempt at the endpoint that a record names now.
func (m *Meter) Failed(r *Record, why reason.Reason) {
	k := failureKey{peersOf(r), why}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.failures[k]; !ok && len(m.failures) >= allSets {
		k.peers = peers{direction: k.direction, other: true}
	}
	m.failures[k]++
	m.touch()
}

// count is what is counted under a key, or under a coarser one when there are too
// many.
func (m *Meter) count(k trafficKey) *traffic {
	if m.lastOf == nil || m.last != k {
		m.last, m.lastOf = k, m.find(k)
	}
	return m.lastOf
}

// find is count by the map.
func (m *Meter) find(k trafficKey) *traffic {
	if t := m.traffic[k]; t != nil {
		return t
	}
	if n := len(m.traffic); n >= clientSets {
		k.client = netip.Addr{}
		if n >= allSets && m.traffic[k] == nil {
			// Protocols are few: the metrics of both kinds stay what they are.
			k = trafficKey{peers: peers{direction: k.direction, other: true}, protocol: k.protocol}
		}
		if t := m.traffic[k]; t != nil {
			return t
		}
	}
	t := &traffic{}
	m.traffic[k] = t
	return t
}

// opened is count for what goes on.
func (m *Meter) opened(p peers) *open {
	if o := m.opens[p]; o != nil {
		return o
	}
	if n := len(m.opens); n >= clientSets {
		p.client = netip.Addr{}
		if n >= allSets && m.opens[p] == nil {
			p = peers{direction: p.direction, other: true}
		}
		if o := m.opens[p]; o != nil {
			return o
		}
	}
	o := &open{peers: p}
	m.opens[p] = o
	return o
}

// touch says that there is something to tell.
func (m *Meter) touch() {
	if m.changed {
		return
	}
	m.changed = true
	if m.pending == nil {
		m.signal()
	}
}

func (m *Meter) signal() {
	select {
	case m.ready <- struct{}{}:
	default:
	}
}

// Ready has a value when there is something to tell, and nothing unacknowledged.
// One reader.
func (m *Meter) Ready() <-chan struct{} { return m.ready }

// Refresh has the gauges told: the destinations are others.
func (m *Meter) Refresh() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.touch()
}

// Resume is for the beginning of a session. It returns what another session has sent
// and nobody acknowledged, or else all there is; nil: there is nothing.
func (m *Meter) Resume() *proxypb.Metrics {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pending != nil {
		m.changed = true // the gauges may be others by now
		return m.pending
	}
	if !m.changed && len(m.opens) == 0 && len(m.destinations()) == 0 {
		return nil
	}
	return m.send()
}

// Take returns what is to be sent now, or nil: nothing has changed, or a message is
// unacknowledged.
func (m *Meter) Take() *proxypb.Metrics {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pending != nil || !m.changed {
		return nil
	}
	return m.send()
}

// Last returns the last message of this proxy, which nobody can acknowledge; nil:
// there is nothing to say.
func (m *Meter) Last() *proxypb.Metrics {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.changed {
		return nil
	}
	return m.send()
}

// Acknowledged says that the agent has counted a message.
func (m *Meter) Acknowledged(number uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pending == nil || m.pending.GetNumber() != number {
		return
	}
	m.pending = nil
	if m.changed {
		m.signal()
	}
}

// send makes a message of what was counted, and begins anew.
func (m *Meter) send() *proxypb.Metrics {
	m.number++
	out := &proxypb.Metrics{Number: m.number, OutboundOverhead: m.overhead[0].message(), InboundOverhead: m.overhead[1].message()}
	for k, t := range m.traffic {
		out.Traffic = append(out.Traffic, &proxypb.Traffic{
			Peers: k.message(), Protocol: k.protocol, Route: k.route, Status: uint32(k.status), GrpcStatus: k.grpcStatus,
			Reason: k.reason.String(), Duration: t.duration.message(), SentBytes: t.sent, ReceivedBytes: t.received,
			Retries: t.retries, Opened: t.opened, Closed: t.closed, MutualTls: k.secure,
		})
	}
	for p, o := range m.opens {
		if o.requests+o.connections == 0 {
			delete(m.opens, p)
			continue
		}
		out.Open = append(out.Open, &proxypb.Open{Peers: p.message(), Requests: o.requests, Connections: o.connections})
	}
	for p, n := range m.ejections {
		out.Ejections = append(out.Ejections, &proxypb.Ejections{Peers: p.message(), Count: n})
	}
	for k, n := range m.decisions {
		out.Decisions = append(out.Decisions, &proxypb.Decisions{Peers: k.message(), Policy: k.policy, Verdict: k.verdict, Count: n})
	}
	for k, n := range m.failures {
		out.Failures = append(out.Failures, &proxypb.Failures{Peers: k.message(), Reason: k.reason.String(), Count: n})
	}
	out.Endpoints = m.endpoints(time.Now())
	m.clear()
	if len(m.ejected) > 0 {
		m.changed = true // until they are back
	}
	m.pending = out
	return out
}

// endpoints are those of the destinations in use, by what they are of.
func (m *Meter) endpoints(now time.Time) []*proxypb.Endpoints {
	for k, until := range m.ejected {
		if !now.Before(until) {
			delete(m.ejected, k)
		}
	}
	destinations := m.destinations()
	seen, byPeers := make(map[endpointKey]bool, len(destinations)), map[peers]*proxypb.Endpoints{}
	var out []*proxypb.Endpoints
	add := func(service string, endpoints []route.Endpoint) {
		for i := range endpoints {
			k := endpointKey{service, endpoints[i].Addr}
			if service == "" || seen[k] {
				continue
			}
			seen[k] = true
			p := peers{direction: listen.Outbound, service: service, workload: endpoints[i].Workload}
			e := byPeers[p]
			if e == nil && len(byPeers) >= allSets {
				p = peers{direction: listen.Outbound, other: true}
				e = byPeers[p]
			}
			if e == nil {
				e = &proxypb.Endpoints{Peers: p.message()}
				byPeers[p] = e
				out = append(out, e)
			}
			if _, aside := m.ejected[k]; aside {
				e.Ejected++
			} else {
				e.Ready++
			}
		}
	}
	for _, d := range destinations {
		add(d.Service, d.Endpoints)
		if d.Routes == nil {
			continue
		}
		for i := range d.Routes.Rules {
			for _, b := range d.Routes.Rules[i].Backends {
				add(b.Backend.Service, b.Backend.Endpoints)
			}
		}
	}
	return out
}

func (p peers) message() *proxypb.Peers {
	out := &proxypb.Peers{Direction: direction(p.direction), Service: p.service, Workload: p.workload, Namespace: p.namespace, Other: p.other}
	if p.client.IsValid() {
		out.Client = p.client.String()
	}
	return out
}
