package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/tests/bench/report"
	"github.com/weirmesh/weir/tests/pod"
)

// addFlags are the command line of the benchmark of ADD.
type addFlags struct {
	iterations int
	burst      int
	bin        string
	smoke      bool
}

// smokeRuns are how many iterations and pods show that the benchmark works.
const smokeRuns = 3

func parseAdd(args []string, stderr io.Writer) (addFlags, error) {
	var f addFlags
	fs := flag.NewFlagSet("bench add", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, "bench add measures the making of a pod, side by side with what else there is:\n"+
			"weir-cni with its proxy ready, the program alone, our rules alone, the same purpose by\n"+
			"iptables rule by rule and by iptables-restore, another chained plugin (portmap), and the\n"+
			"rest of the chain; then pods that are made all at once.\n\n  bench add [flags]\n\n")
		fs.PrintDefaults()
	}
	fs.IntVar(&f.iterations, "n", 200, "iterations")
	fs.IntVar(&f.burst, "burst", 110, "pods that are made all at once")
	fs.StringVar(&f.bin, "bin", "", "`folder` of built programs; empty: build them into out/bin")
	fs.BoolVar(&f.smoke, "smoke", false, "only show that it works, in seconds: no targets are judged")
	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return addFlags{}, err
	case err != nil:
		return addFlags{}, errUsage
	case fs.NArg() > 0 || f.iterations < 1 || f.burst < 1:
		fs.Usage()
		return addFlags{}, errUsage
	}
	if f.smoke {
		f.iterations, f.burst = smokeRuns, smokeRuns
	}
	return f, nil
}

// runAdd is the benchmark of ADD: outside it builds, and runs again on a node of
// its own.
func runAdd(ctx context.Context, args []string, stdout, stderr io.Writer) (int, error) {
	f, err := parseAdd(args, stderr)
	if err != nil {
		return 0, err
	}
	return onNode(ctx, "bench", f.bin, checkIPTables, func(node *pod.Node) error {
		return measureAdd(ctx, f, node, stdout, stderr)
	})
}

// measureAdd measures, and publishes the report.
func measureAdd(ctx context.Context, f addFlags, node *pod.Node, stdout, stderr io.Writer) error {
	b, err := newAddBench(ctx, f, node)
	if err != nil {
		return err
	}
	if err := b.iterate(ctx, stderr); err != nil {
		return fmt.Errorf("%w\nthe end of the agent's log:\n%s", err, tail(b.agent.Log()))
	}
	launch, err := launchTimes(b.agent.Log(), "add-")
	if err != nil {
		return err
	}
	fmt.Fprintf(stderr, "%d pods at once\n", f.burst)
	atOnce, err := b.atOnce(ctx, f.burst)
	if err != nil {
		return fmt.Errorf("%w\nthe end of the agent's log:\n%s", err, tail(b.agent.Log()))
	}
	r, err := report.New("add", "What capture adds to a pod's ADD")
	if err != nil {
		return err
	}
	r.Series = append(b.series(), report.Series{Name: "proxy: launch to first config acknowledged", Unit: "ms", Samples: launch})
	r.Series = append(r.Series, atOnce...)
	if f.smoke {
		r.Notes = append(r.Notes, "A smoke run: targets are not judged.")
	} else {
		judge(r)
	}
	return r.Publish(stdout, os.Getenv("OUT"))
}

// judge adds what is to be held.
func judge(r *report.Report) {
	find := func(name string) report.Series {
		for _, s := range r.Series {
			if s.Name == name {
				return s
			}
		}
		panic("no series " + name)
	}
	each := find(nameEach("nft"))
	if legacy := find(nameEach("legacy")); legacy.Quantile(0.5) > each.Quantile(0.5) {
		each = legacy
	}
	add := find(nameADD)
	r.AtLeast("rules alone, times faster than 30 executions, p50", each.Quantile(0.5)/find(nameRules).Quantile(0.5), 20, "×")
	r.AtMost("weir-cni ADD, proxy ready, p50, as a share of 30 executions", add.Quantile(0.5)/each.Quantile(0.5), 0.45, "×")
	r.AtMost("the same, p99", add.Quantile(0.99)/each.Quantile(0.99), 0.8, "×")
	r.AtMost("weir-cni alone, ADD of an exempt pod, p50", find(nameExempt).Quantile(0.5), 8, "ms")
	r.AtMost("weir-cni alone, VERSION, p50", find(nameVersion).Quantile(0.5), 8, "ms")
	r.AtMost("weir-cni DEL, its proxy ended, p99", find(nameDEL).Quantile(0.99), 50, "ms")
	r.AtMost("weir-cni ADD of pods all at once, p99", find(nameBurst).Quantile(0.99), 1000, "ms")
	r.AtMost("proxy, launch to first config acknowledged, p50", find(nameLaunch).Quantile(0.5), 12, "ms")
	r.Notes = append(r.Notes, "The slower flavour of iptables counts: "+each.Name+".")
}

// Names of the series.
const (
	nameADD      = "weir-cni ADD, its proxy ready"
	nameDEL      = "weir-cni DEL, its proxy ended"
	nameExempt   = "weir-cni alone: ADD of a pod in an exempt namespace"
	nameVersion  = "weir-cni alone: VERSION"
	nameBurst    = "weir-cni ADD of pods all at once"
	nameBurstDEL = "weir-cni DEL of pods all at once"
	nameRules    = "our rules alone (nftables, both families)"
	nameChain    = "the chain without us (bridge, host-local)"
	nameLaunch   = "proxy: launch to first config acknowledged"
)

func nameEach(flavour string) string    { return "30 rules by 30 executions, iptables-" + flavour }
func nameRestore(flavour string) string { return "30 rules by iptables-restore, " + flavour }

// addBench is what the iterations share.
type addBench struct {
	node     *pod.Node
	binaries pod.Binaries
	chain    *pod.Chain
	agent    *pod.Agent
	rules    capture.Ruleset
	n        int
	made     int                   // namespaces so far
	costs    map[string][]cost     // by series
	ran      func(string, pod.Ran) // told of the plugins of the ADD under way
	cases    []func(context.Context) error
}

func newAddBench(ctx context.Context, f addFlags, node *pod.Node) (*addBench, error) {
	b := &addBench{node: node, n: f.iterations, costs: map[string][]cost{}}
	var err error
	if b.binaries, err = findBinaries(f.bin); err != nil {
		return nil, err
	}
	b.chain, err = node.NewChain(b.binaries.Folders(), func(command string, r pod.Ran) {
		if b.ran != nil {
			b.ran(command, r)
		}
	})
	if err != nil {
		return nil, err
	}
	objects := []any{pod.CapturedNamespace(namespace), (&pod.Pod{Namespace: namespace, Name: "pod"}).Manifest()}
	for i := range f.burst {
		objects = append(objects, burstPod(i).Manifest())
	}
	if err := node.Write("bench.yaml", objects...); err != nil {
		return nil, err
	}
	if b.agent, err = node.StartAgent(ctx, b.binaries, io.Discard); err != nil {
		return nil, err
	}
	bypass, err := node.Bypass()
	if err != nil {
		return nil, err
	}
	b.rules = capture.Rules(capture.Spec{
		OutboundPort: capture.DefaultOutboundPort, InboundPort: capture.DefaultInboundPort, Bypass: bypass,
	})
	b.cases = []func(context.Context) error{b.add, b.alone, b.rulesAlone, b.peer}
	for _, flavour := range flavours {
		b.cases = append(b.cases,
			b.inThread(nameEach(flavour), func(ctx context.Context) (cost, error) { return execEach(ctx, flavour) }),
			b.inThread(nameRestore(flavour), func(ctx context.Context) (cost, error) { return restore(ctx, flavour) }))
	}
	return b, nil
}

// settle is how long the kernel is left to take down what an iteration leaves,
// before the next is measured.
const settle = 50 * time.Millisecond

// iterate runs every case once an iteration, each time beginning with another, so
// that what disturbs the machine disturbs them alike.
func (b *addBench) iterate(ctx context.Context, progress io.Writer) error {
	for i := range b.n {
		if i%50 == 0 {
			fmt.Fprintf(progress, "iteration %d of %d\n", i+1, b.n)
		}
		for j := range b.cases {
			if err := b.cases[(i+j)%len(b.cases)](ctx); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(settle):
		}
	}
	return nil
}

// fresh runs f on a new network namespace.
func (b *addBench) fresh(f func(path string) error) error {
	b.made++
	path, err := b.node.NewNamespace(fmt.Sprintf("bench-%d", b.made))
	if err != nil {
		return err
	}
	return errors.Join(f(path), b.node.RemoveNamespace(path))
}

// add takes a pod through the whole chain, and out again. What is not of the
// plugin's own process, the agent's share and the proxy's, is added to its CPU
// time.
func (b *addBench) add(ctx context.Context) error {
	return b.fresh(func(path string) error {
		p := &pod.Pod{Namespace: namespace, Name: "pod", ContainerID: fmt.Sprintf("add-%d", b.made), Netns: path}
		agentBefore, err := pod.CPUTime(b.agent.PID())
		if err != nil {
			return err
		}
		ran := map[string]pod.Ran{}
		b.ran = func(command string, r pod.Ran) { ran[command+" "+r.Plugin] = r }
		defer func() { b.ran = nil }()
		if err := b.chain.Add(ctx, p); err != nil {
			return err
		}
		others, err := b.othersCPU(p, agentBefore)
		if err != nil {
			return err
		}
		b.note(nameADD, cost{ran["ADD weir-cni"].Took, ran["ADD weir-cni"].CPU + others})
		b.note(nameChain, cost{ran["ADD bridge"].Took, ran["ADD bridge"].CPU})
		if err := b.chain.Del(ctx, p); err != nil {
			return err
		}
		b.note(nameDEL, cost{ran["DEL weir-cni"].Took, ran["DEL weir-cni"].CPU})
		return nil
	})
}

// othersCPU is what the agent, since then, and the pod's proxy, altogether, have
// used.
func (b *addBench) othersCPU(p *pod.Pod, agentBefore time.Duration) (time.Duration, error) {
	total, err := pod.CPUTime(b.agent.PID())
	if err != nil {
		return 0, err
	}
	total -= agentBefore
	proxies, err := b.node.CgroupPIDs(p.ContainerID)
	if err != nil {
		return 0, err
	}
	for _, pid := range proxies {
		t, err := pod.CPUTime(pid)
		if err != nil {
			return 0, err
		}
		total += t
	}
	return total, nil
}

// rulesAlone puts our rules into a namespace from within this process.
func (b *addBench) rulesAlone(ctx context.Context) error {
	return b.inThread(nameRules, func(context.Context) (cost, error) { return applyRules(b.rules) })(ctx)
}

// inThread is the case of f, run on a thread in a new namespace.
func (b *addBench) inThread(name string, f func(context.Context) (cost, error)) func(context.Context) error {
	return func(ctx context.Context) error {
		return b.fresh(func(path string) error {
			return pod.In(path, func() error {
				c, err := f(ctx)
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				b.note(name, c)
				return nil
			})
		})
	}
}

func (b *addBench) note(name string, c cost) { b.costs[name] = append(b.costs[name], c) }

// series are the results, in the order of the report.
func (b *addBench) series() []report.Series {
	names := []string{nameADD, nameDEL, nameExempt, nameVersion, nameRules}
	for _, flavour := range flavours {
		names = append(names, nameEach(flavour))
	}
	for _, flavour := range flavours {
		names = append(names, nameRestore(flavour))
	}
	for _, backend := range portmapBackends {
		names = append(names, namePeer(backend))
	}
	var out []report.Series
	for _, name := range append(names, nameChain) {
		s := report.Series{Name: name, Unit: "ms"}
		for _, c := range b.costs[name] {
			s.Samples = append(s.Samples, millis(c.took))
			s.CPU = append(s.CPU, millis(c.cpu))
		}
		out = append(out, s)
	}
	return out
}

func millis(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }

// tail is the end of a log.
func tail(log string) string {
	lines := strings.Split(log, "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

var proxyMillis = regexp.MustCompile(`msg="pod captured".* container=(\S+) .*\bproxy_ms=([0-9.]+)`)

// launchTimes reads from the agent's log how long proxies took, in ms, of
// containers whose ID begins with prefix.
func launchTimes(log, prefix string) ([]float64, error) {
	var out []float64
	for line := range strings.Lines(log) {
		m := proxyMillis.FindStringSubmatch(line)
		if m == nil || !strings.HasPrefix(m[1], prefix) {
			continue
		}
		ms, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return nil, fmt.Errorf("agent's log: %w", err)
		}
		out = append(out, ms)
	}
	if len(out) == 0 {
		return nil, errors.New("the agent's log tells of no proxy")
	}
	return out, nil
}
