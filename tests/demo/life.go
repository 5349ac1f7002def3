package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/telemetry"
	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/tests/pod"
)

// trace is all that is known of a request: what the user saw, what the plugin
// shows of each pod's rules before and after, and what the proxies recorded.
type trace struct {
	request       answered
	ingress       netip.AddrPort       // where the user connected to
	before, after map[string]pod.Rules // by pod, "namespace/name"
	endpoints     map[string]int       // how many are ready, by service, "namespace/name"
	records       []telemetry.Record
}

// step is one of the seven steps of a request's life. If it failed, it is the
// last one told.
type step struct {
	number int
	title  string
	facts  []fact
	err    error
}

// fact is one line of a step.
type fact struct{ label, text string }

func (s *step) say(label, format string, args ...any) {
	s.facts = append(s.facts, fact{label, fmt.Sprintf(format, args...)})
}

// begin says what the step began with: the connection as it was asked for, which
// is known from the record of the proxy that took it.
func (s *step) begin(label, format string, args ...any) {
	s.facts = append([]fact{{label, fmt.Sprintf(format, args...)}}, s.facts...)
}

// errNoRecord says that a record is missing: it may be on its way.
var errNoRecord = errors.New("no record")

// life finds a request's seven steps in its trace. Each hop leads to the next by
// addresses: the sender's own end of its connection is the client that the
// receiver saw.
func life(t trace) []step {
	const (
		ingressPod = namespace + "/ingress"
		frontPod   = namespace + "/front"
	)
	var toIngress, toFront, inFront, toBack, inBack telemetry.Record
	tell := []struct {
		title string
		find  func(*step) error
	}{
		{"the user's request reaches the ingress pod", func(s *step) error {
			if err := t.turned(s, ingressPod, capture.InTurned); err != nil {
				return err
			}
			var err error
			toIngress, err = t.accepted(s, ingressPod, t.request.local, t.ingress.String())
			if err != nil {
				return err
			}
			return handedOver(s, toIngress)
		}},
		{"the ingress calls front, and its own proxy decides", func(s *step) error {
			var err error
			toFront, err = t.called(s, ingressPod, namespace+"/front", toIngress)
			return err
		}},
		{"the ingress's proxy calls the chosen front pod, whose proxy takes it in", func(s *step) error {
			var err error
			inFront, err = t.crossed(s, toFront)
			return err
		}},
		{"front's proxy forwards it to the front application", func(s *step) error {
			return t.delivered(s, inFront)
		}},
		{"front calls back, and its own proxy decides", func(s *step) error {
			var err error
			toBack, err = t.called(s, frontPod, namespace+"/back", inFront)
			return err
		}},
		{"front's proxy calls the chosen back pod, whose proxy takes it in", func(s *step) error {
			var err error
			inBack, err = t.crossed(s, toBack)
			return err
		}},
		{"back's proxy forwards it to the back application", func(s *step) error {
			return errors.Join(t.delivered(s, inBack), t.request.err)
		}},
	}
	var steps []step
	for i, one := range tell {
		s := step{number: i + 1, title: one.title}
		s.err = one.find(&s)
		steps = append(steps, s)
		if s.err != nil {
			break
		}
	}
	return steps
}

// called finds the connection that the pod's application made to a service while
// it answered cause, and tells what its proxy decided.
func (t trace) called(s *step, podID, service string, cause telemetry.Record) (telemetry.Record, error) {
	if err := t.turned(s, podID, capture.OutTurned); err != nil {
		return telemetry.Record{}, err
	}
	r, ok := t.find(func(r telemetry.Record) bool {
		return r.Pod == podID && r.Direction == outbound && r.Service == service && within(r, cause)
	})
	if !ok {
		return r, fmt.Errorf("%w of %s's proxy of a call to %s", errNoRecord, podID, service)
	}
	s.begin("asked for", "%s → %s, the Service %s", r.Client, r.Server, r.Service)
	s.say("taken by", "the proxy of %s, outbound", r.Pod)
	if r.UpstreamPod == "" {
		return r, fmt.Errorf("the proxy chose no endpoint: %s: %s", r.Reason, r.Detail)
	}
	s.say("decided", "%s at %s, one of %d ready, in %s", r.UpstreamPod, r.Upstream, t.endpoints[service], seconds(r.TimeRoute))
	return r, nil
}

// crossed finds the connection of a sender's proxy at the pod that it chose.
func (t trace) crossed(s *step, sent telemetry.Record) (telemetry.Record, error) {
	if err := t.counted(s, "let by", sent.Pod, capture.OutOwn); err != nil {
		return telemetry.Record{}, err
	}
	if err := t.turned(s, sent.UpstreamPod, capture.InTurned); err != nil {
		return telemetry.Record{}, err
	}
	if sent.Reason != "" {
		return telemetry.Record{}, fmt.Errorf("the proxy of %s: %s: %s", sent.Pod, sent.Reason, sent.Detail)
	}
	from, err := netip.ParseAddrPort(sent.UpstreamLocal)
	if err != nil {
		return telemetry.Record{}, fmt.Errorf("the record of %s's proxy lacks its own end of the connection: %w", sent.Pod, err)
	}
	r, err := t.accepted(s, sent.UpstreamPod, from, sent.Upstream)
	if err != nil {
		return r, err
	}
	s.say("took", "%s to connect; open for %s", seconds(sent.TimeConnect), seconds(sent.TimeTotal))
	return r, validated(s, sent, r)
}

// validated tells who the two proxies have shown to be to each other, and what the
// receiver's decided. TLS 1.3 is all that they speak.
func validated(s *step, sent, r telemetry.Record) error {
	s.say("mTLS", "TLS 1.3, a handshake of %s", seconds(r.TimeTLS))
	for _, one := range []struct{ who, shown, want string }{
		{"caller", r.PeerIdentity, identity(sent.Pod)},
		{"callee", sent.PeerIdentity, identity(sent.UpstreamPod)},
	} {
		if one.shown != one.want {
			return fmt.Errorf("the %s has shown the identity %q; it is %s", one.who, one.shown, one.want)
		}
		s.say(one.who, "%s", one.shown)
	}
	switch {
	case r.Reason == policyDenied:
		return fmt.Errorf("the proxy of %s: %s: %s", r.Pod, r.Reason, r.Detail)
	case r.Policy == "":
		return fmt.Errorf("the proxy of %s names no AuthorizationPolicy that allowed it", r.Pod)
	}
	s.say("allowed", "by the AuthorizationPolicy %s", r.Policy)
	return nil
}

// delivered is handedOver, and tells what the application learned of its caller.
func (t trace) delivered(s *step, r telemetry.Record) error {
	if err := handedOver(s, r); err != nil || t.request.err != nil {
		return err
	}
	saw, want := t.request.saw[strings.TrimPrefix(r.Pod, namespace+"/")], "URI="+r.PeerIdentity
	if saw != want {
		return fmt.Errorf("the application saw %s: %q; its caller is %s", callerField, saw, want)
	}
	s.say("saw", "%s: %s", callerField, saw)
	return nil
}

// accepted finds the connection that came to a pod from an address, and was
// going to another.
func (t trace) accepted(s *step, podID string, from netip.AddrPort, to string) (telemetry.Record, error) {
	r, ok := t.find(func(r telemetry.Record) bool {
		return r.Pod == podID && r.Direction == inbound && r.Client == from.String()
	})
	if !ok {
		return r, fmt.Errorf("%w of %s's proxy of a connection from %s", errNoRecord, podID, from)
	}
	if r.Server != to {
		return r, fmt.Errorf("the proxy of %s took the connection from %s for one to %s; it was to %s", podID, from, r.Server, to)
	}
	s.begin("asked for", "%s → %s", r.Client, r.Server)
	s.say("taken by", "the proxy of %s, inbound", r.Pod)
	return r, nil
}

// handedOver tells how an inbound connection went on to the application.
func handedOver(s *step, r telemetry.Record) error {
	switch {
	case r.Reason != "":
		return fmt.Errorf("the proxy of %s: %s: %s", r.Pod, r.Reason, r.Detail)
	case r.Upstream == "" || r.Sent == 0 || r.Received == 0:
		return fmt.Errorf("the proxy of %s passed %d bytes on to %q, and %d back", r.Pod, r.Sent, r.Upstream, r.Received)
	}
	s.say("went to", "%s → %s, the application", r.UpstreamLocal, r.Upstream)
	s.say("took", "%s to connect; %d bytes there, %d back; open for %s", seconds(r.TimeConnect), r.Sent, r.Received, seconds(r.TimeTotal))
	return nil
}

// turned tells which rule turned a connection aside.
func (t trace) turned(s *step, podID, counter string) error {
	return t.counted(s, "turned by", podID, counter)
}

// counted tells the rule of a counter, which must have counted.
func (t trace) counted(s *step, label, podID, counter string) error {
	before, after := t.before[podID], t.after[podID]
	rule := after.Counting(counter)
	if rule == "" {
		return fmt.Errorf("%s has no rule that steps the counter %s", podID, counter)
	}
	had, has := before.Counters[counter].Packets, after.Counters[counter].Packets
	if has <= had {
		return fmt.Errorf("the rule of %s that steps the counter %s let the request pass unseen: still %d", podID, counter, has)
	}
	s.say(label, "%s", rule)
	s.say("", "%s of %s: %d → %d", counter, podID, had, has)
	return nil
}

func (t trace) find(match func(telemetry.Record) bool) (telemetry.Record, bool) {
	for _, r := range t.records {
		if match(r) {
			return r, true
		}
	}
	return telemetry.Record{}, false
}

// within reports whether r began while cause was open.
func within(r, cause telemetry.Record) bool {
	end := cause.Timestamp.Add(time.Duration(cause.TimeTotal * float64(time.Second)))
	return !r.Timestamp.Before(cause.Timestamp) && !r.Timestamp.After(end)
}

// seconds renders a time in seconds.
func seconds(s float64) string {
	return time.Duration(s * float64(time.Second)).Round(10 * time.Microsecond).String()
}
