package control

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/agent/journal"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/identity"
	"github.com/weirmesh/weir/proxy/telemetry"
)

// service is proxypb.Control. Of its sessions the newest counts.
type service struct {
	proxypb.UnimplementedControlServer
	store    *Store
	identity *identity.Holder
	journal  *journal.Writer
	meter    *telemetry.Meter
	version  string
	draining <-chan struct{} // closed when the proxy takes no new connections
	done     <-chan struct{} // closed when the server ends

	mu    sync.Mutex
	newer chan struct{} // closed when another session begins
}

// stream is a session's.
type stream = grpc.BidiStreamingServer[proxypb.ToProxy, proxypb.FromProxy]

// session is one life with one agent.
type session struct {
	*service
	stream stream
	number uint64
	newer  <-chan struct{}
}

// Session serves an agent until the stream breaks or another session begins.
func (s *service) Session(stream stream) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	messages, broken := make(chan *proxypb.ToProxy), make(chan error, 1)
	go receive(ctx, stream, messages, broken)

	current, first := s.begin(stream)
	// What this session was woken for and did not do is the next one's.
	defer s.store.wake()
	defer s.identity.Wake()
	if err := current.subscribe(first); err != nil {
		return err
	}
	if err := current.measure(s.meter.Resume()); err != nil {
		return err
	}
	due := newTimer() // for metrics
	defer due.Stop()
	measured, draining := s.meter.Ready(), s.draining
	for {
		// One goroutine applies, answers and asks, so an Ack is always ahead of
		// anything that was asked after its update.
		var err error
		select {
		case <-current.newer:
			return status.Error(codes.Aborted, errSuperseded.Error())
		case <-s.done:
			return current.measure(s.meter.Last())
		case <-draining:
			draining = nil
			err = stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_Draining{Draining: &proxypb.Draining{}}})
		case err = <-broken:
			return err
		case msg := <-messages:
			err = current.answer(msg)
		case <-s.store.dirty:
			err = current.ask()
		case <-s.identity.Woken():
			err = current.identify()
		case <-s.journal.Waiting():
			err = stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_RecordsWaiting{RecordsWaiting: &proxypb.RecordsWaiting{}}})
		case <-measured:
			measured = nil
			due.Reset(measureEvery)
		case <-due.C:
			measured, err = s.meter.Ready(), current.measure(s.meter.Take())
			s.journal.Trim()
		}
		if err != nil {
			return err
		}
	}
}

// begin makes a session the newest.
func (s *service) begin(stream stream) (*session, *proxypb.Subscribe) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.newer != nil {
		close(s.newer)
	}
	s.newer = make(chan struct{})
	number, first := s.store.begin()
	first.ProxyVersion = s.version
	s.identity.Resume(number)
	return &session{service: s, stream: stream, number: number, newer: s.newer}, first
}

// receive hands on what the agent says until the stream breaks. It ends with its
// session: that cancels the stream.
func receive(ctx context.Context, stream stream, messages chan<- *proxypb.ToProxy, broken chan<- error) {
	for {
		msg, err := stream.Recv()
		if err != nil {
			broken <- err
			return
		}
		select {
		case messages <- msg:
		case <-ctx.Done():
			return
		}
	}
}

// answer applies an update and says whether it was taken.
func (s *session) answer(msg *proxypb.ToProxy) error {
	if ack := msg.GetMetricsAck(); ack != nil {
		s.meter.Acknowledged(ack.GetNumber())
		return nil
	}
	if c := msg.GetCertificate(); c != nil {
		s.identity.Answered(c)
		s.store.tell() // roots came with it
		return nil
	}
	u := msg.GetUpdate()
	if u == nil {
		return nil // something of an agent newer than this proxy
	}
	if err := s.store.apply(s.number, u); err != nil {
		return s.stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_Nack{
			Nack: &proxypb.Nack{Nonce: u.GetNonce(), Error: err.Error()},
		}})
	}
	s.meter.Refresh()
	return s.stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_Ack{
		Ack: &proxypb.Ack{Nonce: u.GetNonce()},
	}})
}

// ask subscribes to what is new and unsubscribes from what is held no more.
func (s *session) ask() error {
	sub, unsub := s.store.changes(s.number)
	if sub != nil {
		if err := s.subscribe(sub); err != nil {
			return err
		}
	}
	if unsub != nil {
		return s.stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_Unsubscribe{Unsubscribe: unsub}})
	}
	return nil
}

// identify says what there is to say of the pod's certificate.
func (s *session) identify() error {
	for msg := s.identity.Next(s.number); msg != nil; msg = s.identity.Next(s.number) {
		if err := s.stream.Send(msg); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) subscribe(m *proxypb.Subscribe) error {
	return s.stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_Subscribe{Subscribe: m}})
}

// measureEvery is how long counts wait for each other.
const measureEvery = 5 * time.Second

// newTimer returns one that is not running.
func newTimer() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}

// measure sends metrics, if there are any.
func (s *session) measure(m *proxypb.Metrics) error {
	if m == nil {
		return nil
	}
	return s.stream.Send(&proxypb.FromProxy{Message: &proxypb.FromProxy_Metrics{Metrics: m}})
}
