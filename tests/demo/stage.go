package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"strings"
	"time"

	"github.com/weirmesh/weir/tests/netns"
	"github.com/weirmesh/weir/tests/pod"
)

// namespace is where everything is.
const namespace = "demo"

// podNames are the pods, in the order in which they are made: whoever is called
// comes first, and back's and front's EndpointSlices come with the ingress.
var podNames = []string{"back-v2", "back-1", "back-2", "front", "ingress"}

// Ports of the applications.
const (
	ingressPort = 80
	appPort     = 8080
)

var (
	front = service("front", 10)
	back  = service("back", 20)
	// backV2 is called only where a route says so.
	backV2 = service("back-v2", 30)
)

func service(name string, host byte) pod.Service {
	return pod.Service{Namespace: namespace, Name: name, Port: 80, ClusterIPs: []netip.Addr{
		netip.AddrFrom4([4]byte{10, 96, 0, host}), netip.AddrFrom16([16]byte{0xfd, 0, 0, 0x10, 0, 0x96, 15: host}),
	}}
}

// stage is the node with its pods.
type stage struct {
	node     *pod.Node
	binaries pod.Binaries
	chain    *pod.Chain
	records  *records
	agent    *pod.Agent
	v6       bool
	pods     map[string]*pod.Pod
	took     map[string]birth
	ran      []pod.Ran // plugins of the ADD under way
}

// birth is how long a pod's ADD took.
type birth struct{ chain, weir time.Duration }

// newStage starts the agent, makes the pods and starts their applications.
func newStage(ctx context.Context, f flags, node *pod.Node) (*stage, error) {
	var binaries pod.Binaries
	var err error
	if f.bin != "" {
		binaries, err = pod.Find(f.bin)
	} else {
		binaries, err = pod.FindBuilt()
	}
	if err != nil {
		return nil, err
	}
	s := &stage{node: node, binaries: binaries, records: newRecords(), v6: f.v6, pods: map[string]*pod.Pod{}, took: map[string]birth{}}
	s.chain, err = node.NewChain(binaries.Folders(), func(command string, r pod.Ran) {
		if command == "ADD" {
			s.ran = append(s.ran, r)
		}
	})
	if err != nil {
		return nil, err
	}
	if err := s.write(); err != nil {
		return nil, err
	}
	var flags []string
	if len(f.delete) > 0 {
		flags = []string{"--repair=false"} // or the rule would be there again before it is missed
	}
	if s.agent, err = node.StartAgent(ctx, binaries, s.records, flags...); err != nil {
		return nil, err
	}
	for _, name := range podNames {
		if name == "ingress" {
			if err := s.writeEndpoints(); err != nil {
				return nil, err
			}
		}
		if err := s.birth(ctx, name); err != nil {
			return nil, fmt.Errorf("%w\nthe agent's log:\n%s", err, s.agent.Log())
		}
	}
	return s, nil
}

// write writes what there is of the cluster before any pod runs.
func (s *stage) write() error {
	objects := []any{pod.CapturedNamespace(namespace), front.Manifest(), back.Manifest(), backV2.Manifest()}
	for _, name := range podNames {
		app := appOf(name)
		s.pods[name] = &pod.Pod{Namespace: namespace, Name: name, ContainerID: "demo-" + name, App: app, Account: app}
		if name != "ingress" {
			objects = append(objects, s.pods[name].Manifest())
		}
	}
	return errors.Join(s.node.Write("policies.yaml", policyFile...), s.node.Write("demo.yaml", objects...))
}

// appOf is whose replica, or version, a pod is.
func appOf(name string) string {
	app, _, _ := strings.Cut(name, "-")
	return app
}

// writeEndpoints writes the EndpointSlices, now that front and back have
// addresses, and after them the ingress: the agent, which waits for the manifest
// of a pod that is being made, knows by then where the Services lead.
func (s *stage) writeEndpoints() error {
	slices := append(front.Slices(appPort, s.pods["front"]), back.Slices(appPort, s.pods["back-1"], s.pods["back-2"])...)
	slices = append(slices, backV2.Slices(appPort, s.pods["back-v2"])...)
	if err := s.node.Write("endpoints.yaml", slices...); err != nil {
		return err
	}
	return s.node.Write("ingress.yaml", s.pods["ingress"].Manifest())
}

// birth makes a pod: its namespace, its ADD, its application.
func (s *stage) birth(ctx context.Context, name string) error {
	p := s.pods[name]
	var err error
	if p.Netns, err = s.node.NewNamespace(p.ContainerID); err != nil {
		return err
	}
	s.ran = nil
	began := time.Now()
	if err := s.chain.Add(ctx, p); err != nil {
		return err
	}
	b := birth{chain: time.Since(began)}
	for _, r := range s.ran {
		if r.Plugin == "weir-cni" {
			b.weir = r.Took
		}
	}
	s.took[name] = b
	return s.startApp(ctx, name)
}

// startApp starts a pod's application in its namespace and waits until it
// listens.
func (s *stage) startApp(ctx context.Context, name string) error {
	args := []string{appCommand, "-name", name}
	switch name {
	case "ingress":
		args = append(args, "-listen", fmt.Sprintf(":%d", ingressPort), "-host", userHost, "-next", s.url(front))
	case "front":
		args = append(args, "-next", s.url(back))
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	var said strings.Builder
	cmd.Stderr = &said
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := pod.In(s.pods[name].Netns, cmd.Start); err != nil {
		return fmt.Errorf("application of %s: %w", name, err)
	}
	// It ends with the node.
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if strings.TrimSpace(line) != appReady {
		return fmt.Errorf("application of %s: %w", name, errors.Join(cmd.Wait(), ignoreEOF(err), errors.New(said.String())))
	}
	return nil
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// url is where a Service is called.
func (s *stage) url(svc pod.Service) string { return "http://" + s.address(svc).String() + "/" }

// address is a Service's, of the demo's family.
func (s *stage) address(svc pod.Service) netip.AddrPort {
	for _, ip := range svc.ClusterIPs {
		if ip.Is6() == s.v6 {
			return netip.AddrPortFrom(ip, svc.Port)
		}
	}
	return netip.AddrPort{}
}

// getFrom asks for a path as a pod's application does.
func (s *stage) getFrom(ctx context.Context, p *pod.Pod, to netip.AddrPort, path string) answered {
	var a answered
	if err := pod.In(p.Netns, func() error {
		a = get(ctx, to, path, "")
		return nil
	}); err != nil {
		a.err = err
	}
	return a
}

// deleteRules breaks what the command line says.
func (s *stage) deleteRules(rules broken) error {
	for _, r := range rules {
		for _, name := range r.pods {
			if err := netns.DeleteRule(s.pods[name].Netns, r.counter); err != nil {
				return err
			}
		}
	}
	return nil
}

// rules reads the rules and counters of all pods.
func (s *stage) rules(ctx context.Context) (map[string]pod.Rules, error) {
	out := map[string]pod.Rules{}
	for _, p := range s.pods {
		r, err := p.ShowRules(ctx, s.binaries)
		if err != nil {
			return nil, err
		}
		out[p.ID()] = r
	}
	return out, nil
}

// show makes the stage and plays on it.
func show(ctx context.Context, f flags, node *pod.Node, stdout io.Writer) error {
	out := newPrinter(stdout)
	s, err := newStage(ctx, f, node)
	if err != nil {
		return err
	}
	out.stage(s)
	err = play(ctx, s, f, out)
	if f.agent {
		out.log(s.agent.Log())
	}
	return err
}

// play sends the user's request and tells its life.
func play(ctx context.Context, s *stage, f flags, out *printer) error {
	before, err := s.rules(ctx)
	if err != nil {
		return err
	}
	if err := s.deleteRules(f.delete); err != nil {
		return err
	}
	ingress := netip.AddrPortFrom(s.pods["ingress"].Address(s.v6), ingressPort)
	r := request(ctx, ingress, "")
	after, err := s.rules(ctx)
	if err != nil {
		return err
	}
	steps := s.life(ctx, trace{
		request: r, ingress: ingress, before: before, after: after,
		endpoints: map[string]int{namespace + "/front": 1, namespace + "/back": 2},
	})
	out.request(r)
	out.steps(steps)
	for _, st := range steps {
		if st.err != nil {
			return fmt.Errorf("failed at step %d, %s: %w", st.number, st.title, st.err)
		}
	}
	picks, err := s.balance(ctx, ingress)
	if err != nil {
		return err
	}
	out.balanced(picks)
	if err := s.routes(ctx, ingress, out); err != nil {
		return err
	}
	if err := s.policies(ctx, ingress, out); err != nil {
		return err
	}
	out.summary(r, steps)
	return nil
}

// life tells the request's life, as soon as all records are there, or as far as
// they go.
func (s *stage) life(ctx context.Context, t trace) []step {
	deadline := time.Now().Add(recordTimeout)
	for {
		t.records = s.records.all()
		steps := life(t)
		last := steps[len(steps)-1]
		if !errors.Is(last.err, errNoRecord) || !s.records.waitMore(ctx, len(t.records), deadline) {
			return steps
		}
	}
}

// moreRequests are sent to see both replicas of back chosen. That one of them is
// left out by chance: 1 in 500,000.
const moreRequests = 20

// balance sends more requests and counts which replica of back front's proxy
// chose.
func (s *stage) balance(ctx context.Context, ingress netip.AddrPort) (map[string]int, error) {
	calls, err := s.callsToBack(ctx, ingress, moreRequests, "")
	if err != nil {
		return nil, err
	}
	if picks := picked(calls); len(picks) > 1 {
		return picks, nil
	}
	return nil, fmt.Errorf("%d requests all went to one replica of back: %v", moreRequests, picked(calls))
}
