package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/tests/bench/report"
	"github.com/weirmesh/weir/tests/pod"
)

// dataplaneFlags are the command line of the benchmark of the data plane.
type dataplaneFlags struct {
	rounds int
	length time.Duration
	bin    string
	only   string // what is measured; empty: everything
	smoke  bool
}

// What the benchmark can be limited to.
const (
	onlyThroughput = "throughput"
	onlyStreams    = "http2"
	onlyBulk       = "tcp"
	onlyLatency    = "latency"
)

func parseDataplane(args []string, stderr io.Writer) (dataplaneFlags, error) {
	var f dataplaneFlags
	fs := flag.NewFlagSet("bench dataplane", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, "bench dataplane measures requests through a pair of proxies, the caller's and the\n"+
			"callee's, side by side with a pair that uses one processor, and pairs of nginx, HAProxy\n"+
			"and net/http's ReverseProxy in namespaces like the pods', and a relay that parses\n"+
			"nothing: CPU for a request, throughput, latency.\n\n  bench dataplane [flags]\n\n")
		fs.PrintDefaults()
	}
	fs.IntVar(&f.rounds, "rounds", 9, "rounds, of which the median counts")
	fs.DurationVar(&f.length, "length", time.Second, "how long each lane is measured in a round")
	fs.StringVar(&f.bin, "bin", "", "`folder` of built programs; empty: build them into out/bin")
	fs.StringVar(&f.only, "only", "", "measure `one` thing only: throughput, http2, tcp or latency")
	fs.BoolVar(&f.smoke, "smoke", false, "only show that it works, in seconds: no targets are judged")
	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return dataplaneFlags{}, err
	case err != nil:
		return dataplaneFlags{}, errUsage
	case fs.NArg() > 0 || f.rounds < 1 || f.length < 100*time.Millisecond ||
		!slices.Contains([]string{"", onlyThroughput, onlyStreams, onlyBulk, onlyLatency}, f.only):
		fs.Usage()
		return dataplaneFlags{}, errUsage
	}
	if f.smoke {
		f.rounds, f.length = 1, 300*time.Millisecond
	}
	return f, nil
}

// runDataplane is the benchmark of the data plane: outside it builds, and runs
// again on a node of its own.
func runDataplane(ctx context.Context, args []string, stdout, stderr io.Writer) (int, error) {
	if len(args) > 0 {
		switch args[0] {
		case reverseCommand:
			return 0, reverseProxy(ctx, args[1:])
		case floorCommand:
			return 0, floor(args[1:])
		case bulkCommand:
			return 0, bulk(ctx)
		}
	}
	f, err := parseDataplane(args, stderr)
	if err != nil {
		return 0, err
	}
	kernel, err := findSoftirqs()
	if err != nil {
		return 0, err
	}
	defer kernel.close()
	return onNode(ctx, "dataplane", f.bin, checkPeers, func(node *pod.Node) error {
		return measureDataplane(ctx, f, node, kernel, stdout, stderr)
	})
}

// checkPeers refuses a machine without the programs that are measured against.
func checkPeers() error {
	for _, program := range []string{nginx, haproxy, wrk, h2load} {
		if _, err := os.Stat(program); err != nil {
			return fmt.Errorf("%w; run `apt-get install --no-install-recommends nginx-light haproxy wrk nghttp2-client`", err)
		}
	}
	return nil
}

// dataplane is what the measurements share.
type dataplane struct {
	node     *pod.Node
	lanes    []lane
	dir      string // of the peers' files
	softirqs softirqs
}

// lane is one way from a client to the applications.
type lane struct {
	name                  string
	client                string                // network namespace of the client
	target                netip.AddrPort        // HTTP/1; zero, as the others: not by this lane
	streams, source, sink netip.AddrPort        // HTTP/2, and bytes without end either way
	pids                  func() ([]int, error) // of the proxies
}

// Names of the lanes.
const (
	laneWeir    = "Weir"
	laneOne     = "Weir with GOMAXPROCS=1"
	laneNginx   = "nginx"
	laneHAProxy = "HAProxy"
	// The same, where what goes to the application is turned aside to them by the rules
	// of a captured pod, as it is to Weir.
	laneNginxTurned   = "nginx, captured"
	laneHAProxyTurned = "HAProxy, captured"
	laneFloor         = "a relay that parses nothing, captured"
	// TLS 1.3 between the two, which know each other by their certificates.
	laneWeirTLS    = "Weir, mTLS"
	laneNginxTLS   = "nginx, mTLS"
	laneHAProxyTLS = "HAProxy, mTLS"
	// And behind the rules.
	laneNginxTLSTurned   = "nginx, mTLS, captured"
	laneHAProxyTLSTurned = "HAProxy, mTLS, captured"
	laneReverse          = "net/http ReverseProxy"
	laneDirect           = "no proxy"
)

// oneService is what the caller calls whose proxies use one processor.
var oneService = backService("one", 5, "http")

// backServices are what the other captured caller calls: back by HTTP/1, by HTTP/2,
// and for bytes either way.
var backServices = []struct {
	pod.Service
	port uint16 // of the application
}{
	{backService("back", 1, "http"), appPort},
	{backService("streams", 2, "kubernetes.io/h2c"), streamsPort},
	{backService("source", 3, "tcp"), sourcePort},
	{backService("sink", 4, "tcp"), sinkPort},
}

// secureNamespace is of pods that call each other by mTLS, as all do that nobody says
// anything about. Those of namespace do not.
const secureNamespace = "secure"

// secureServices are the same in secureNamespace.
var secureServices = []pod.Service{
	serviceOf(secureNamespace, "back", 11, "http"), serviceOf(secureNamespace, "streams", 12, "kubernetes.io/h2c"),
	serviceOf(secureNamespace, "source", 13, "tcp"), serviceOf(secureNamespace, "sink", 14, "tcp"),
}

func backService(name string, host byte, protocol string) pod.Service {
	return serviceOf(namespace, name, host, protocol)
}

func serviceOf(namespace, name string, host byte, protocol string) pod.Service {
	return pod.Service{Namespace: namespace, Name: name, Port: 80, AppProtocol: protocol,
		ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 2, host})}}
}

// connections are at how many the throughput is measured, rates at how many
// requests a second the latency.
var (
	connections = []int{16, 64}
	rates       = []int{1000, 5000}
)

func measureDataplane(ctx context.Context, f dataplaneFlags, node *pod.Node, kernel softirqs, stdout, stderr io.Writer) error {
	binaries, err := findBinaries(f.bin)
	if err != nil {
		return err
	}
	// As on a node, all but the proxies is pods: the clients, which are started here.
	if err := node.BeLikePod("clients"); err != nil {
		return err
	}
	d := &dataplane{node: node, dir: pod.NodeDir + "/peers", softirqs: kernel}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := d.build(ctx, binaries); err != nil {
		return err
	}
	results := results{}
	for round := range f.rounds {
		for _, m := range d.measurements() {
			if f.only != "" && f.only != m.kind {
				continue
			}
			fmt.Fprintf(stderr, "round %d of %d: %s\n", round+1, f.rounds, m.what)
			lanes := slices.DeleteFunc(rotate(d.lanes, round), func(l lane) bool { return !m.at(l).IsValid() })
			if err := m.run(ctx, lanes, f.length, results); err != nil {
				return fmt.Errorf("%s: %w", m.what, err)
			}
		}
	}
	r, err := report.New("dataplane", "Requests and bytes through a pair of proxies: 1 KB answers, keep-alive")
	if err != nil {
		return err
	}
	r.Series = results.series()
	if len(kernel) == 0 {
		r.Notes = append(r.Notes, "Of this PID namespace the kernel's threads are not seen: what ksoftirqd does in proxies' place is in no figure.")
	}
	switch {
	case f.smoke:
		r.Notes = append(r.Notes, "A smoke run: targets are not judged.")
	case f.only != "":
		r.Notes = append(r.Notes, "Only "+f.only+": targets are not judged.")
	default:
		results.judge(r)
	}
	return r.Publish(stdout, os.Getenv("OUT"))
}

// measurement is what lanes are put to.
type measurement struct {
	kind, what string
	at         func(lane) netip.AddrPort
	// run has each lane work for that long.
	run func(ctx context.Context, lanes []lane, length time.Duration, out results) error
}

func (d *dataplane) measurements() []measurement {
	var all []measurement
	add := func(kind, what string, at func(lane) netip.AddrPort, run func(context.Context, []lane, time.Duration, results) error) {
		all = append(all, measurement{kind, what, at, run})
	}
	requests := func(l lane) netip.AddrPort { return l.target }
	for _, c := range connections {
		add(onlyThroughput, atConnections(c), requests, func(ctx context.Context, lanes []lane, length time.Duration, out results) error {
			return d.throughput(ctx, lanes, c, length, out)
		})
	}
	for _, c := range streams {
		add(onlyStreams, atStreams(c), func(l lane) netip.AddrPort { return l.streams }, func(ctx context.Context, lanes []lane, length time.Duration, out results) error {
			return d.streams(ctx, lanes, c, length, out)
		})
	}
	for _, w := range ways {
		add(onlyBulk, "TCP "+w, func(l lane) netip.AddrPort { return l.bulkAt(w) }, func(ctx context.Context, lanes []lane, length time.Duration, out results) error {
			return d.bulk(ctx, lanes, w, length, out)
		})
	}
	for _, rate := range rates {
		add(onlyLatency, atRate(rate), requests, func(ctx context.Context, lanes []lane, length time.Duration, out results) error {
			return d.latencies(ctx, lanes, rate, length, out)
		})
	}
	return all
}

func findBinaries(bin string) (pod.Binaries, error) {
	if bin != "" {
		return pod.Find(bin)
	}
	return pod.FindBuilt()
}

// rotate has each round begin with another lane.
func rotate(lanes []lane, by int) []lane {
	by %= len(lanes)
	return append(slices.Clone(lanes[by:]), lanes[:by]...)
}

// build makes the pods, with applications in two of them, and all proxies.
func (d *dataplane) build(ctx context.Context, binaries pod.Binaries) error {
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return err
	}
	caller, callee := &pod.Pod{Namespace: namespace, Name: "caller", ContainerID: "caller"}, &pod.Pod{Namespace: namespace, Name: "callee", ContainerID: "callee"}
	peerCaller, peerCallee := &pod.Pod{Namespace: "peers", Name: "caller", ContainerID: "peer-caller"}, &pod.Pod{Namespace: "peers", Name: "callee", ContainerID: "peer-callee"}
	oneCaller, oneCallee := &pod.Pod{Namespace: namespace, Name: "one-caller", ContainerID: "one-caller"}, &pod.Pod{Namespace: namespace, Name: "one-callee", ContainerID: "one-callee"}
	secureCaller := &pod.Pod{Namespace: secureNamespace, Name: "caller", ContainerID: "secure-caller"}
	secureCallee := &pod.Pod{Namespace: secureNamespace, Name: "callee", ContainerID: "secure-callee"}
	objects := []any{pod.CapturedNamespace(namespace), pod.Plaintext(namespace), pod.CapturedNamespace(secureNamespace), secureCaller.Manifest(), secureCallee.Manifest(), caller.Manifest(), callee.Manifest(), oneCaller.Manifest(), oneCallee.Manifest(), oneService.Manifest()}
	for i, s := range backServices {
		objects = append(objects, s.Manifest(), secureServices[i].Manifest())
	}
	if err := d.node.Write("dataplane.yaml", objects...); err != nil {
		return err
	}
	chain, err := d.node.NewChain(binaries.Folders(), nil)
	if err != nil {
		return err
	}
	bare, err := d.node.NewBareChain(binaries.Folders())
	if err != nil {
		return err
	}
	// A proxy stays as it was started, whichever agent looks after it.
	options := d.dir + "/one.yaml"
	if err := os.WriteFile(options, []byte("proxyMaxProcs: 1\n"), 0o644); err != nil {
		return err
	}
	agent, err := d.node.StartAgent(ctx, binaries, io.Discard, "--options", options)
	if err != nil {
		return err
	}
	if err := errors.Join(d.add(ctx, chain, oneCaller, oneCallee), agent.End(syscall.SIGTERM)); err != nil {
		return err
	}
	if _, err := d.node.StartAgent(ctx, binaries, io.Discard); err != nil {
		return err
	}
	if err := errors.Join(d.add(ctx, chain, caller, callee, secureCaller, secureCallee), d.add(ctx, bare, peerCaller, peerCallee)); err != nil {
		return err
	}
	objects = oneService.Slices(appPort, oneCallee)
	for i, s := range backServices {
		objects = append(append(objects, s.Slices(s.port, callee)...), secureServices[i].Slices(s.port, secureCallee)...)
	}
	if err := d.node.Write("slices.yaml", objects...); err != nil {
		return err
	}
	for _, p := range []*pod.Pod{callee, oneCallee, secureCallee, peerCallee} {
		if _, err := d.startNginx(ctx, p, "app", appConfig(), d.startApp); err != nil {
			return err
		}
		if err := d.startApp(p, exec.CommandContext(ctx, "/proc/self/exe", "dataplane", bulkCommand)); err != nil {
			return err
		}
	}
	called := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(backServices[i].ClusterIPs[0], backServices[i].Port)
	}
	secured := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(secureServices[i].ClusterIPs[0], secureServices[i].Port)
	}
	pair := func(pods ...*pod.Pod) func() ([]int, error) {
		return func() ([]int, error) {
			var pids []int
			for _, p := range pods {
				own, err := d.node.CgroupPIDs(p.ContainerID)
				if err != nil {
					return nil, err
				}
				pids = append(pids, own...)
			}
			return pids, nil
		}
	}
	d.lanes = []lane{
		{name: laneWeir, client: caller.Netns, target: called(0), streams: called(1), source: called(2), sink: called(3), pids: pair(caller, callee)},
		{name: laneWeirTLS, client: secureCaller.Netns, target: secured(0), streams: secured(1), source: secured(2), sink: secured(3), pids: pair(secureCaller, secureCallee)},
		{name: laneOne, client: oneCaller.Netns, target: netip.AddrPortFrom(oneService.ClusterIPs[0], oneService.Port), pids: pair(oneCaller, oneCallee)},
	}
	local := func(port uint16) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
	}
	c, err := d.newCredentials()
	if err != nil {
		return err
	}
	plain := func(start func(context.Context, *pod.Pod, uint16, nexts) (int, error)) startPeer {
		return func(ctx context.Context, p *pod.Pod, port uint16, to nexts, _ credentials, _ bool) (int, error) {
			return start(ctx, p, port, to)
		}
	}
	for _, peer := range []struct {
		name  string
		port  uint16
		start startPeer
		all   bool // also HTTP/2 and TCP
	}{
		{laneNginx, 7000, plain(d.nginxProxy), false}, {laneHAProxy, 7010, plain(d.haproxy), true}, {laneReverse, 7020, plain(d.reverse), false},
		{laneNginxTLS, 7030, d.secureNginx, false}, {laneHAProxyTLS, 7040, d.secureHAProxy, true},
	} {
		far := peerCallee.Address(false)
		near, err := peer.start(ctx, peerCaller, peer.port, nexts{
			netip.AddrPortFrom(far, peer.port), netip.AddrPortFrom(far, peer.port+1), netip.AddrPortFrom(far, peer.port+2), netip.AddrPortFrom(far, peer.port+3),
		}, c, true)
		if err != nil {
			return fmt.Errorf("%s: %w", peer.name, err)
		}
		behind, err := peer.start(ctx, peerCallee, peer.port, nexts{local(appPort), local(streamsPort), local(sourcePort), local(sinkPort)}, c, false)
		if err != nil {
			return fmt.Errorf("%s: %w", peer.name, err)
		}
		l := lane{name: peer.name, client: peerCaller.Netns, target: local(peer.port), pids: func() ([]int, error) { return []int{near, behind}, nil }}
		if peer.all {
			l.streams, l.source, l.sink = local(peer.port+1), local(peer.port+2), local(peer.port+3)
		}
		d.lanes = append(d.lanes, l)
	}
	for _, peer := range []struct {
		name  string
		start startPeer
		port  uint16 // of the application
	}{
		{laneNginxTurned, plain(d.nginxProxy), appPort}, {laneHAProxyTurned, plain(d.haproxy), appPort}, {laneFloor, plain(d.startFloor), appPort},
		{laneNginxTLSTurned, d.secureNginx, appPort}, {laneHAProxyTLSTurned, d.secureHAProxy, appPort},
		{laneHAProxyTurned, plain(d.haproxy), streamsPort}, {laneHAProxyTurned, plain(d.haproxy), sourcePort}, {laneHAProxyTurned, plain(d.haproxy), sinkPort},
	} {
		l, err := d.turned(ctx, bare, peer.name, peer.start, c, peer.port)
		if err != nil {
			return fmt.Errorf("%s: %w", peer.name, err)
		}
		d.lanes = append(d.lanes, l)
	}
	d.lanes = append(d.lanes, lane{name: laneDirect, client: peerCaller.Netns, pids: func() ([]int, error) { return nil, nil },
		target: netip.AddrPortFrom(peerCallee.Address(false), appPort)})
	for _, l := range d.lanes {
		if !l.target.IsValid() {
			continue
		}
		if err := awaitAnswer(ctx, l); err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
	}
	return nil
}

// startPeer starts one end of a pair: the caller's, if it is near.
type startPeer func(ctx context.Context, p *pod.Pod, port uint16, to nexts, c credentials, near bool) (int, error)

// turned makes a lane of two pods of its own, to one of the application's ports, with
// rules that turn what goes there aside to a peer's.
func (d *dataplane) turned(ctx context.Context, chain *pod.Chain, name string, start startPeer, c credentials, app uint16) (lane, error) {
	first := uint16(7000) // of the peer's four
	port := first + app - appPort
	bypass, err := d.node.Bypass()
	if err != nil {
		return lane{}, err
	}
	id := fmt.Sprint(strings.ToLower(strings.NewReplacer(", ", "-", " ", "-").Replace(name)), "-", app)
	caller := &pod.Pod{Namespace: "peers", Name: id + "-caller", ContainerID: id + "-caller"}
	callee := &pod.Pod{Namespace: "peers", Name: id + "-callee", ContainerID: id + "-callee"}
	if err := d.add(ctx, chain, caller, callee); err != nil {
		return lane{}, err
	}
	if _, err := d.startNginx(ctx, callee, "app", appConfig(), d.startApp); err != nil {
		return lane{}, err
	}
	if err := d.startApp(callee, exec.CommandContext(ctx, "/proc/self/exe", "dataplane", bulkCommand)); err != nil {
		return lane{}, err
	}
	local := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), app)
	called := netip.AddrPortFrom(callee.Address(false), app)
	pids := make([]int, 2)
	for i, side := range []struct {
		pod *pod.Pod
		to  netip.AddrPort
		capture.Spec
	}{
		{caller, called, capture.Spec{OutboundPort: port, InboundPort: port + 9}},
		{callee, local, capture.Spec{OutboundPort: port + 9, InboundPort: port}},
	} {
		if pids[i], err = start(ctx, side.pod, first, nexts{side.to, side.to, side.to, side.to}, c, i == 0); err != nil {
			return lane{}, err
		}
		side.Bypass = bypass
		if err := pod.In(side.pod.Netns, func() error {
			_, err := applyRules(capture.Rules(side.Spec))
			return err
		}); err != nil {
			return lane{}, err
		}
	}
	l := lane{name: name, client: caller.Netns, pids: func() ([]int, error) { return pids, nil }}
	*map[uint16]*netip.AddrPort{appPort: &l.target, streamsPort: &l.streams, sourcePort: &l.source, sinkPort: &l.sink}[app] = called
	return l, nil
}

// add makes pods' namespaces and runs a chain's ADD in them.
func (d *dataplane) add(ctx context.Context, chain *pod.Chain, pods ...*pod.Pod) error {
	for _, p := range pods {
		if err := d.node.Create(ctx, chain, p); err != nil {
			return err
		}
		if err := pod.In(p.Netns, loopbackUp); err != nil {
			return err
		}
	}
	return nil
}

// loopbackUp is what a container runtime does before the chain.
func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// startApp starts a pod's application: in its network namespace, and in cgroups like
// those of pods.
func (d *dataplane) startApp(p *pod.Pod, cmd *exec.Cmd) error {
	started, err := d.node.LikePod(cmd, p.ContainerID)
	if err != nil {
		return err
	}
	return startInNetns(p, cmd, started)
}

// startProxy starts a peer in a pod's network namespace, in cgroups like those of
// Weir's proxies: the rules, if there are any, let its connections by.
func (d *dataplane) startProxy(p *pod.Pod, cmd *exec.Cmd) error {
	started, err := d.node.LikeProxy(cmd, p.ContainerID)
	if err != nil {
		return err
	}
	return startInNetns(p, cmd, started)
}

func startInNetns(p *pod.Pod, cmd *exec.Cmd, started func() error) error {
	if err := pod.In(p.Netns, cmd.Start); err != nil {
		return err
	}
	return started()
}
