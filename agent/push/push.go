// Package push tells the node's proxies what they need to know, and hears from
// them. For each proxy there is one session on its control socket: resources go
// down, versioned and only those it subscribed to; acknowledgements and metrics come
// up. So does its request for a certificate, which an Issuer answers.
//
// A change of the cluster wakes every session; each computes those of its resources
// again that may be others now, and sends those whose version differs. Changes that come while an update
// is on its way are sent together after it: coalesced, never delayed.
//
// What a destination is, is decided elsewhere (agent/decide, through View).
package push

import (
	"context"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/authz"
	"github.com/weirmesh/weir/proxy/route"
)

// View is what of the cluster the proxies are told.
type View interface {
	// Destination says what an original destination stands for to the pods of a
	// namespace, and which routes and policies are part of that.
	Destination(addr netip.AddrPort, clientNamespace string) (route.Destination, []model.Governing)
	// Inbound is what holds for callers of a pod with these addresses, by the port that
	// they reach, and which policies are part of that.
	Inbound(addrs []netip.Addr) (map[uint16]*route.Policy, []model.Governing)
	// Authorization are the policies that govern a pod, and which these are. Labels are
	// those that it had when it was captured, nil if they are not known.
	Authorization(namespace, name, uid string, labels map[string]string) ([]authz.Policy, []model.Governing)
	// Peers is what is demanded of the callers of a pod, on any port and by port where that
	// is something else, and which policies say so. Labels are as for Authorization.
	Peers(namespace, name, uid string, labels map[string]string) (route.PeerMode, map[uint16]route.PeerMode, []model.Governing)
	// Probes are those that kubelet asks a pod, and the addresses that it asks from.
	Probes(namespace, name, uid string) ([]route.Probe, []netip.Addr)
	// Revision is another whenever Destination may be another, and never 0.
	Revision(addr netip.AddrPort) uint64
	// Known are all routes and policies, by their full name, with their generation.
	Known() map[string]int64
}

// Metrics is what is counted of sessions, and in them.
type Metrics interface {
	// Report counts what a proxy says, unless it has said so before.
	Report(*launch.Instance, *proxypb.Metrics)
	// Forget says that there will be no other session with that proxy.
	Forget(*launch.Instance)
	// Converged is told how long it took from a change to a proxy's acknowledgement;
	// kind is "proxy", "identity" or "destination".
	Converged(kind string, took time.Duration)
	// Rejected is told of each resource that a proxy refused.
	Rejected(kind string)
	// Certificate is told when the certificate that a proxy has ends.
	Certificate(i *launch.Instance, notAfter time.Time)
}

// AccessLog reads the proxies' records, which are in no message.
type AccessLog interface {
	// Follow says that a proxy has a journal, Leave that the proxy has ended.
	Follow(*launch.Instance)
	Leave(*launch.Instance)
	// Hurry says that a proxy's records are not to wait.
	Hurry()
}

// Pusher holds the sessions of all proxies of the node.
type Pusher struct {
	View       View
	WaitSynced func(context.Context) error // returns when View is complete; nothing is sent before
	MeshRanges []netip.Prefix              // addresses in here must be asked for, they may be Services
	// TrustDomain is the pods' own; while it is empty, no service account is anybody's.
	TrustDomain string
	// ClassicKeyExchange leaves the post-quantum one out (ProxyConfig).
	ClassicKeyExchange bool
	Issuer             Issuer // nil: no pod has an identity
	AccessLog          AccessLog
	Refused            func(a launch.Attachment, reason string) // told of pods that are denied a certificate; may be nil
	Metrics            Metrics
	Log                *slog.Logger

	mu       sync.Mutex
	sessions map[*session]struct{}
	// heard are the last sessions in which a proxy said what it has: one that does not
	// answer any more has that still.
	heard map[*launch.Instance]*session
	// live are the proxies that Session speaks to, or tries to.
	live map[*launch.Instance]struct{}
	// unissued says why a proxy was not given a certificate when it asked last.
	unissued map[*launch.Instance]string
}

// Changed wakes all sessions: the View is another.
func (p *Pusher) Changed() {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for s := range p.sessions {
		s.changed(now)
	}
}

// window is how many bytes a proxy may say without being heard.
const window = 256 << 10

// Session speaks to one proxy until ctx is done, and again whenever the stream
// breaks.
func (p *Pusher) Session(ctx context.Context, i *launch.Instance) {
	conn, err := grpc.NewClient("unix:"+i.Socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the path says who it is, folder 0700
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		// Windows that stay as they are need no looking for better ones, which is a ping and its
		// answer for each message.
		grpc.WithReadBufferSize(4<<10), grpc.WithWriteBufferSize(4<<10),
		grpc.WithStaticStreamWindowSize(window), grpc.WithStaticConnWindowSize(window),
		grpc.WithDisableServiceConfig(),
	)
	if err != nil {
		p.Log.Error("no session", "socket", i.Socket, "error", err)
		return
	}
	defer conn.Close()
	defer p.Metrics.Forget(i)
	p.AccessLog.Follow(i)
	defer p.AccessLog.Leave(i)
	p.expect(i)
	defer p.forget(i)
	for ctx.Err() == nil {
		err := p.stream(ctx, i, proxypb.NewControlClient(conn))
		if ctx.Err() == nil {
			p.Log.Warn("session broke", "pod", i.Attachment.PodNamespace+"/"+i.Attachment.PodName, "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
}

// stream is one stream of a session, from its beginning to its end.
func (p *Pusher) stream(ctx context.Context, i *launch.Instance, client proxypb.ControlClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.Session(ctx, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	s := &session{
		pusher:   p,
		instance: i,
		stream:   stream,
		woken:    make(chan struct{}, 1),
		requests: make(chan *proxypb.CertificateRequest, 1),
		held:     map[string]held{},
		refused:  map[string]string{},
	}
	p.add(s)
	defer p.remove(s)

	received := make(chan error, 1)
	go func() {
		received <- s.receive()
		cancel()
	}()
	var issuing sync.WaitGroup
	issuing.Go(func() { s.issue(ctx) })
	err = s.send(ctx)
	cancel()
	issuing.Wait()
	if rerr := <-received; err == nil || ctx.Err() != nil {
		err = rerr
	}
	return err
}

// Versions counts the proxies that there are sessions with, by what they say their
// version is.
func (p *Pusher) Versions() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := map[string]int{}
	for s := range p.sessions {
		if v := s.proxyVersion(); v != "" {
			out[v]++
		}
	}
	return out
}

func (p *Pusher) add(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sessions == nil {
		p.sessions = map[*session]struct{}{}
	}
	p.sessions[s] = struct{}{}
}

func (p *Pusher) hear(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.heard == nil {
		p.heard = map[*launch.Instance]*session{}
	}
	p.heard[s.instance] = s
}

// expect notes that there is a proxy, before anything is heard of it.
func (p *Pusher) expect(i *launch.Instance) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.live == nil {
		p.live = map[*launch.Instance]struct{}{}
	}
	p.live[i] = struct{}{}
}

func (p *Pusher) forget(i *launch.Instance) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.heard, i)
	delete(p.live, i)
	delete(p.unissued, i)
}

func (p *Pusher) remove(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.sessions, s)
}

// revision is another whenever resource may be another; 0: that is not known.
func (p *Pusher) revision(name string) uint64 {
	addr, err := proxypb.ParseDestinationName(name)
	if err != nil {
		return 0
	}
	return p.View.Revision(addr)
}

// resource computes one resource as it is now, and what routes and policies are part of
// it.
// An unknown name gives nil.
func (p *Pusher) resource(i *launch.Instance, name string) (*proxypb.Resource, []model.Governing) {
	r := &proxypb.Resource{Name: name}
	var governing []model.Governing
	switch name {
	case proxypb.IdentityResource:
		if r = p.identityResource(i); r == nil {
			return nil, nil
		}
	case proxypb.ProxyResource:
		config := &proxypb.ProxyConfig{ClassicKeyExchange: p.ClassicKeyExchange}
		for _, a := range i.Attachment.Addresses {
			config.OwnAddresses = append(config.OwnAddresses, a.String())
		}
		for _, m := range p.MeshRanges {
			config.MeshRanges = append(config.MeshRanges, m.String())
		}
		for _, p := range i.Attachment.OpaquePorts {
			config.OpaquePorts = append(config.OpaquePorts, &proxypb.PortRange{First: uint32(p.First), Last: uint32(p.Last)})
		}
		var inbound map[uint16]*route.Policy
		inbound, governing = p.View.Inbound(i.Attachment.Addresses)
		config.Inbound = proxypb.FromInbound(inbound)
		a := i.Attachment
		policies, authorizing := p.View.Authorization(a.PodNamespace, a.PodName, a.PodUID, a.PodLabels)
		config.Authorization = proxypb.FromAuthorization(p.TrustDomain, policies)
		mode, byPort, demanding := p.View.Peers(a.PodNamespace, a.PodName, a.PodUID, a.PodLabels)
		config.Peers, config.PeersByPort = proxypb.FromPeers(mode, byPort)
		probes, node := p.View.Probes(a.PodNamespace, a.PodName, a.PodUID)
		config.Probes = proxypb.FromProbes(probes)
		if len(probes) > 0 { // else nobody cares where they come from
			for _, addr := range node {
				config.NodeAddresses = append(config.NodeAddresses, addr.String())
			}
		}
		governing = slices.Concat(governing, authorizing, demanding)
		r.Body = &proxypb.Resource_Proxy{Proxy: config}
	default:
		addr, err := proxypb.ParseDestinationName(name)
		if err != nil {
			return nil, nil
		}
		var d route.Destination
		d, governing = p.View.Destination(addr, i.Attachment.PodNamespace)
		r.Body = &proxypb.Resource_Destination{Destination: proxypb.FromDestination(d)}
	}
	r.Version = version(r)
	return r, governing
}

// version is a digest of a resource's content.
func version(r *proxypb.Resource) string {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
	if err != nil {
		panic(fmt.Sprintf("a resource of our own making does not marshal: %v", err))
	}
	h := fnv.New64a()
	_, _ = h.Write(b)
	return strconv.FormatUint(h.Sum64(), 36)
}
