package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"

	"github.com/weirmesh/weir/tests/bench/report"
	"github.com/weirmesh/weir/tests/pod"
)

// memoryFlags are the command line of the benchmark of memory.
type memoryFlags struct {
	proxies, destinations int
	rounds, connections   int
	bin                   string
	smoke                 bool
}

func parseMemory(args []string, stderr io.Writer) (memoryFlags, error) {
	var f memoryFlags
	fs := flag.NewFlagSet("bench memory", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, "bench memory measures what proxies hold while nothing happens: many that have been\n"+
			"asked for many destinations, and what one more idle connection takes.\n\n  bench memory [flags]\n\n")
		fs.PrintDefaults()
	}
	fs.IntVar(&f.proxies, "proxies", 50, "proxies that idle together")
	fs.IntVar(&f.destinations, "destinations", 100, "Services that each of them has been asked for, 255 at most")
	fs.IntVar(&f.rounds, "rounds", 3, "rounds of idle connections, each through new proxies, of which the median counts")
	fs.IntVar(&f.connections, "connections", 1000, "connections that idle through one proxy")
	fs.StringVar(&f.bin, "bin", "", "`folder` of built programs; empty: build them into out/bin")
	fs.BoolVar(&f.smoke, "smoke", false, "only show that it works, in seconds: no targets are judged")
	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return memoryFlags{}, err
	case err != nil:
		return memoryFlags{}, errUsage
	case fs.NArg() > 0 || f.proxies < 1 || f.destinations < 1 || f.destinations > 255 || f.rounds < 1 || f.connections < 1:
		fs.Usage()
		return memoryFlags{}, errUsage
	}
	if f.smoke {
		f.proxies, f.destinations, f.rounds, f.connections = smokeRuns, smokeRuns, 1, 10*smokeRuns
	}
	return f, nil
}

// runMemory is the benchmark of memory: outside it builds, and runs again on a node
// of its own.
func runMemory(ctx context.Context, args []string, stdout, stderr io.Writer) (int, error) {
	f, err := parseMemory(args, stderr)
	if err != nil {
		return 0, err
	}
	return onNode(ctx, "memory", f.bin, nil, func(node *pod.Node) error {
		return measureMemory(ctx, f, node, stdout, stderr)
	})
}

// memoryBench is what the measurements share.
type memoryBench struct {
	node    *pod.Node
	chain   *pod.Chain
	records lines
}

func measureMemory(ctx context.Context, f memoryFlags, node *pod.Node, stdout, stderr io.Writer) error {
	binaries, err := findBinaries(f.bin)
	if err != nil {
		return err
	}
	b := &memoryBench{node: node}
	if err := b.writeManifests(f); err != nil {
		return err
	}
	agent, err := node.StartAgent(ctx, binaries, &b.records)
	if err != nil {
		return err
	}
	if b.chain, err = node.NewChain(binaries.Folders(), nil); err != nil {
		return err
	}
	r, err := report.New("memory", "Memory of proxies while nothing happens")
	if err != nil {
		return err
	}
	fmt.Fprintf(stderr, "%d proxies that idle\n", f.proxies)
	idle, err := b.idle(ctx, f.proxies, f.destinations)
	if err != nil {
		return fmt.Errorf("%w\nthe end of the agent's log:\n%s", err, tail(agent.Log()))
	}
	kept, err := b.kept(ctx, f.rounds, f.connections, stderr)
	if err != nil {
		return fmt.Errorf("%w\nthe end of the agent's log:\n%s", err, tail(agent.Log()))
	}
	r.Series = append([]report.Series{idle}, kept...)
	r.Notes = append(r.Notes, "The kernel's memory is what is charged to the proxy's cgroup: sockets with their buffers, and all else.")
	if f.smoke {
		r.Notes = append(r.Notes, "A smoke run: targets are not judged.")
	} else {
		r.AtMost("memory of a proxy while idle (PSS), p50", idle.Quantile(0.5), 4, "MB")
		for _, s := range kept {
			if s.Name == nameKept(outbound) || s.Name == nameKept(inbound) {
				r.AtMost(s.Name+", p50", s.Quantile(0.5), 25, "KB")
			}
		}
	}
	return r.Publish(stdout, os.Getenv("OUT"))
}

// Names of the series.
func nameIdle(destinations int) string {
	return fmt.Sprintf("proxy: memory (PSS), %d destinations, idle", destinations)
}
func nameKept(direction string) string {
	return "memory (PSS) for one more idle HTTP/1 connection, " + direction
}
func nameKernel(direction string) string {
	return "the kernel's memory for it, " + direction
}

// writeManifests writes all pods and Services there will be, but for what is behind
// those of the rounds.
func (b *memoryBench) writeManifests(f memoryFlags) error {
	node := &pod.Pod{Addresses: []netip.Addr{pod.PodRange4.Masked().Addr().Next()}}
	objects := []any{pod.CapturedNamespace(namespace)}
	for i := range f.proxies {
		objects = append(objects, idlePod(i).Manifest())
	}
	for i, s := range services(f.destinations) {
		objects = append(append(objects, s.Manifest()), s.Slices(uint16(serverPort+i), node)...)
	}
	for i := range f.rounds {
		for _, p := range keptPods(i) {
			objects = append(objects, p.Manifest())
		}
		objects = append(objects, keptService(i).Manifest())
	}
	return b.node.Write("memory.yaml", objects...)
}
