package push

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/proxypb"
)

var errSilent = errors.New("the proxy does not answer an update")

// ackTimeout is how long a proxy may take to answer an update before the session
// is begun anew.
const ackTimeout = 10 * time.Second

// session is one stream with one proxy.
type session struct {
	pusher   *Pusher
	instance *launch.Instance
	stream   grpc.BidiStreamingClient[proxypb.ToProxy, proxypb.FromProxy]
	woken    chan struct{}                    // buffered: something may differ
	requests chan *proxypb.CertificateRequest // buffered: to be answered

	mu      sync.Mutex
	held    map[string]held   // by subscribed name
	refused map[string]string // name → version the proxy refused; not sent again
	pending *proxypb.Update   // sent, not answered
	nonce   uint64
	since   time.Time // the first change that was not looked at; zero: there is none
	began   time.Time // that of pending; zero: it is not for a change
	counted uint64    // the number of metrics to acknowledge; 0: none
	version string    // the proxy's own; empty: it has not said

	certificate *proxypb.Certificate // the answer to its request; nil: none
}

// held is a resource as the proxy has it.
type held struct {
	version   string            // "" for none
	looked    uint64            // the revision in which it was last compared to version; 0: it was not
	governing []model.Governing // what was part of it then
	acked     []model.Governing // what is part of what the proxy has
}

// changed says that the view is another since then.
func (s *session) changed(then time.Time) {
	s.mu.Lock()
	if s.since.IsZero() {
		s.since = then
	}
	s.mu.Unlock()
	s.wake()
}

func (s *session) wake() {
	select {
	case s.woken <- struct{}{}:
	default:
	}
}

// send writes updates until ctx is done or the proxy stays silent.
func (s *session) send(ctx context.Context) error {
	if err := s.pusher.WaitSynced(ctx); err != nil {
		return err
	}
	silent := time.NewTimer(0)
	defer silent.Stop()
	<-silent.C
	for {
		if number := s.takeCounted(); number != 0 {
			if err := s.stream.Send(&proxypb.ToProxy{Message: &proxypb.ToProxy_MetricsAck{MetricsAck: &proxypb.MetricsAck{Number: number}}}); err != nil {
				return err
			}
		}
		if c := s.takeCertificate(); c != nil {
			if err := s.stream.Send(&proxypb.ToProxy{Message: &proxypb.ToProxy_Certificate{Certificate: c}}); err != nil {
				return err
			}
		}
		if update := s.next(); update != nil {
			if err := s.stream.Send(&proxypb.ToProxy{Message: &proxypb.ToProxy_Update{Update: update}}); err != nil {
				return err
			}
			silent.Reset(ackTimeout)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.woken:
		case <-silent.C:
			if s.waiting() {
				return errSilent
			}
		}
	}
}

// next returns what the proxy lacks, or nil: nothing, or an update is on its way.
func (s *session) next() *proxypb.Update {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pending != nil {
		return nil
	}
	since := s.since
	s.since = time.Time{}
	update := &proxypb.Update{}
	for name, h := range s.held {
		revision := s.pusher.revision(name) // before it is computed: it may change meanwhile
		if revision != 0 && revision == h.looked {
			continue
		}
		r, governing := s.pusher.resource(s.instance, name)
		h.looked, h.governing = revision, governing
		if s.refused[name] != r.GetVersion() {
			delete(s.refused, name) // it has changed since
		}
		switch {
		case r == nil && name == proxypb.IdentityResource: // not known yet
		case r == nil:
			update.Removed = append(update.Removed, name)
		case r.GetVersion() == h.version:
			h.acked = governing
		case s.refused[name] == "":
			update.Resources = append(update.Resources, r)
		}
		s.held[name] = h
	}
	if len(update.GetResources())+len(update.GetRemoved()) == 0 {
		return nil
	}
	slices.Sort(update.GetRemoved())
	s.nonce++
	update.Nonce = s.nonce
	s.pending, s.began = update, since
	return update
}

// takeCounted returns the number of metrics to acknowledge, once; 0: there are none.
func (s *session) takeCounted() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	number := s.counted
	s.counted = 0
	return number
}

// measure has a proxy's metrics counted, and acknowledged.
func (s *session) measure(m *proxypb.Metrics) {
	s.pusher.Metrics.Report(s.instance, m)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counted = m.GetNumber()
}

func (s *session) proxyVersion() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.version
}

// kindOf is what a resource is, for metrics.
func kindOf(name string) string {
	switch name {
	case proxypb.ProxyResource, proxypb.IdentityResource:
		return name
	}
	return "destination"
}

func (s *session) waiting() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pending != nil
}

// receive reads what the proxy says until the stream ends.
func (s *session) receive() error {
	for {
		msg, err := s.stream.Recv()
		if err != nil {
			return err
		}
		switch m := msg.GetMessage().(type) {
		case *proxypb.FromProxy_RecordsWaiting:
			s.pusher.AccessLog.Hurry()
			continue
		case *proxypb.FromProxy_Metrics:
			s.measure(m.Metrics)
		case *proxypb.FromProxy_Subscribe:
			s.subscribe(m.Subscribe)
			s.pusher.hear(s)
		case *proxypb.FromProxy_Unsubscribe:
			s.unsubscribe(m.Unsubscribe)
		case *proxypb.FromProxy_Ack:
			s.answered(m.Ack.GetNonce(), "")
		case *proxypb.FromProxy_Draining:
			s.instance.Draining()
			continue
		case *proxypb.FromProxy_CertificateRequest:
			s.ask(m.CertificateRequest)
			continue
		case *proxypb.FromProxy_CertificateKept:
			s.keep(m.CertificateKept)
			continue
		case *proxypb.FromProxy_Nack:
			s.answered(m.Nack.GetNonce(), m.Nack.GetError())
		}
		s.wake()
	}
}

func (s *session) subscribe(m *proxypb.Subscribe) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, version := range m.GetVersions() {
		s.held[name] = held{version: version}
	}
	s.version = cmp.Or(m.GetProxyVersion(), s.version)
	if v := m.GetVersions()[proxypb.ProxyResource]; v != "" {
		// An adopted proxy: it took its first config from an agent before us.
		s.instance.Acknowledged()
	}
}

func (s *session) unsubscribe(m *proxypb.Unsubscribe) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range m.GetNames() {
		delete(s.held, name)
		delete(s.refused, name)
	}
}

// answered takes the proxy's Ack, or its Nack when cause is not empty. After a
// Nack the proxy keeps what it had; what it refused is not sent again until it
// changes.
func (s *session) answered(nonce uint64, cause string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pending == nil || s.pending.GetNonce() != nonce {
		return
	}
	update := s.pending
	s.pending = nil
	if cause != "" {
		s.pusher.Log.Error("proxy refused its config", "pod", s.instance.Attachment.PodNamespace+"/"+s.instance.Attachment.PodName,
			"resources", len(update.GetResources()), "error", cause)
	}
	converged := map[string]bool{}
	for _, r := range update.GetResources() {
		name := r.GetName()
		if cause != "" {
			s.pusher.Metrics.Rejected(kindOf(name))
			s.refused[name] = r.GetVersion()
			continue
		}
		if kind := kindOf(name); !s.began.IsZero() && !converged[kind] {
			converged[kind] = true
			s.pusher.Metrics.Converged(kind, time.Since(s.began))
		}
		delete(s.refused, name)
		if h, subscribed := s.held[name]; subscribed {
			h.version, h.acked = r.GetVersion(), h.governing
			s.held[name] = h
		}
		if name == proxypb.ProxyResource {
			s.instance.Acknowledged()
		}
	}
	if cause == "" {
		for _, name := range update.GetRemoved() {
			delete(s.held, name)
		}
	}
}
