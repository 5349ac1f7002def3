package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/weirmesh/weir/tests/bench/report"
	"github.com/weirmesh/weir/tests/pod"
)

// overloadFlags are the command line of the benchmark of overload.
type overloadFlags struct {
	rounds int
	length time.Duration
	slow   int
	bin    string
	smoke  bool
}

func parseOverload(args []string, stderr io.Writer) (overloadFlags, error) {
	var f overloadFlags
	fs := flag.NewFlagSet("bench overload", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, "bench overload measures a captured pair in trouble: what is left of an application's\n"+
			"goodput when five times as much is asked of it as it can do, behind a TrafficPolicy's\n"+
			"circuit breaker; and what slow and idle clients are to the others.\n\n  bench overload [flags]\n\n")
		fs.PrintDefaults()
	}
	fs.IntVar(&f.rounds, "rounds", 3, "rounds, of which the median counts")
	fs.DurationVar(&f.length, "length", 3*time.Second, "how long each measurement of a round takes, 10s at most")
	fs.IntVar(&f.slow, "slow", 300, "clients that send a byte a second, and as many that send nothing")
	fs.StringVar(&f.bin, "bin", "", "`folder` of built programs; empty: build them into out/bin")
	fs.BoolVar(&f.smoke, "smoke", false, "only show that it works, in seconds: no targets are judged")
	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return overloadFlags{}, err
	case err != nil:
		return overloadFlags{}, errUsage
	case fs.NArg() > 0 || f.rounds < 1 || f.slow < 1 || f.length < 100*time.Millisecond || f.length > 10*time.Second:
		fs.Usage()
		return overloadFlags{}, errUsage
	}
	if f.smoke {
		f.rounds, f.length, f.slow = 1, 500*time.Millisecond, 10*smokeRuns
	}
	return f, nil
}

// runOverload is the benchmark of overload: outside it builds, and runs again on a
// node of its own.
func runOverload(ctx context.Context, args []string, stdout, stderr io.Writer) (int, error) {
	f, err := parseOverload(args, stderr)
	if err != nil {
		return 0, err
	}
	return onNode(ctx, "overload", f.bin, nil, func(node *pod.Node) error {
		return measureOverload(ctx, f, node, stdout, stderr)
	})
}

// overloadFactor is how many times its peak is asked of the application.
const overloadFactor = 5

// Names of the series.
const (
	namePeak    = "peak: answers a second, closed loop"
	nameOffered = "overload: requests a second, open loop"
	nameGoodput = "overload: goodput, answers a second"
	nameShare   = "overload: goodput, of the peak"
	nameServed  = "overload: latency of what is served"
	nameRefused = "overload: latency of what is refused"
)

func nameSteady(q string) string {
	return fmt.Sprintf("latency %s at %d requests a second", q, steadyRate)
}
func nameBeside(q string, slow int) string {
	return fmt.Sprintf("%s, beside %d slow clients and %d idle ones", nameSteady(q), slow, slow)
}

func measureOverload(ctx context.Context, f overloadFlags, node *pod.Node, stdout, stderr io.Writer) error {
	binaries, err := findBinaries(f.bin)
	if err != nil {
		return err
	}
	limited, free, end, err := overloadWorld(ctx, node, binaries)
	if err != nil {
		return err
	}
	defer end()
	results := results{}
	reasons := map[string]int{}
	for round := range f.rounds {
		fmt.Fprintf(stderr, "round %d of %d: the peak, and %d times as much\n", round+1, f.rounds, overloadFactor)
		if err := overload(ctx, limited, f.length, results, reasons); err != nil {
			return fmt.Errorf("overload: %w", err)
		}
		fmt.Fprintf(stderr, "round %d of %d: %d requests a second, alone and beside slow clients\n", round+1, f.rounds, steadyRate)
		if err := besideSlow(ctx, free, f.length, f.slow, results); err != nil {
			return fmt.Errorf("slow clients: %w", err)
		}
	}
	r, err := report.New("overload", "A captured pair in trouble")
	if err != nil {
		return err
	}
	for _, s := range []report.Series{
		{Name: namePeak, Unit: "/s"}, {Name: nameOffered, Unit: "/s"}, {Name: nameGoodput, Unit: "/s"}, {Name: nameShare, Unit: "%"},
		{Name: nameServed, Unit: "ms"}, {Name: nameRefused, Unit: "ms"},
		{Name: nameSteady("p50"), Unit: "µs"}, {Name: nameSteady("p99"), Unit: "µs"},
		{Name: nameBeside("p50", f.slow), Unit: "µs"}, {Name: nameBeside("p99", f.slow), Unit: "µs"},
	} {
		s.Samples = results[s.Name]
		r.Series = append(r.Series, s)
	}
	r.Notes = append(r.Notes, fmt.Sprintf("The application does %d requests at a time, each in %s; the policy allows %d under way. Goodput is what is answered 200 within %s of when it was to be sent.",
		workers, work, parallelRequests, inTime))
	for _, reason := range slices.Sorted(maps.Keys(reasons)) {
		r.Notes = append(r.Notes, fmt.Sprintf("Refused as %s: %d.", reason, reasons[reason]))
	}
	if f.smoke {
		r.Notes = append(r.Notes, "A smoke run: targets are not judged.")
	} else {
		r.AtLeast(fmt.Sprintf("goodput at %d times the peak, relative to it", overloadFactor), results.median(nameShare), 90, "%")
		r.AtMost("latency p99 beside slow and idle clients, relative to that without",
			results.median(nameBeside("p99", f.slow))/results.median(nameSteady("p99")), 2, "×")
	}
	return r.Publish(stdout, os.Getenv("OUT"))
}

// Ports of the callee's applications.
const (
	limitedPort = 8080
	freePort    = 8081
)

// parallelRequests is what the TrafficPolicy allows: the application is always busy, and
// what waits for it waits for one other.
const parallelRequests = 2 * workers

// overloadWorld makes a captured pair, and returns the lanes to an application behind a
// circuit breaker and to one that does nothing; and what ends them.
func overloadWorld(ctx context.Context, node *pod.Node, binaries pod.Binaries) (lane, lane, func(), error) {
	caller := &pod.Pod{Namespace: namespace, Name: "caller", ContainerID: "caller"}
	callee := &pod.Pod{Namespace: namespace, Name: "callee", ContainerID: "callee"}
	limited, free := backService("limited", 1, "http"), backService("free", 2, "http")
	err := node.Write("overload.yaml", pod.CapturedNamespace(namespace), caller.Manifest(), callee.Manifest(),
		limited.Manifest(), free.Manifest(), circuitBreaker(limited, parallelRequests))
	if err != nil {
		return lane{}, lane{}, nil, err
	}
	if _, err := node.StartAgent(ctx, binaries, io.Discard); err != nil {
		return lane{}, lane{}, nil, err
	}
	chain, err := node.NewChain(binaries.Folders(), nil)
	if err != nil {
		return lane{}, lane{}, nil, err
	}
	for _, p := range []*pod.Pod{caller, callee} {
		if err := node.Create(ctx, chain, p); err != nil {
			return lane{}, lane{}, nil, err
		}
	}
	if err := node.Write("slices.yaml", append(limited.Slices(limitedPort, callee), free.Slices(freePort, callee)...)...); err != nil {
		return lane{}, lane{}, nil, err
	}
	busy, err := serveIn(callee, limitedPort, worker())
	if err != nil {
		return lane{}, lane{}, nil, err
	}
	quick, err := serveIn(callee, freePort, answer)
	if err != nil {
		busy.Close()
		return lane{}, lane{}, nil, err
	}
	end := func() {
		busy.Close()
		quick.Close()
	}
	to := func(s pod.Service) lane {
		return lane{name: laneWeir, client: caller.Netns, target: netip.AddrPortFrom(s.ClusterIPs[0], s.Port)}
	}
	for _, s := range []pod.Service{limited, free} {
		if err := awaitAnswer(ctx, to(s)); err != nil {
			end()
			return lane{}, lane{}, nil, err
		}
	}
	return to(limited), to(free), end, nil
}

// circuitBreaker is a TrafficPolicy that allows so many requests under way to a Service.
func circuitBreaker(s pod.Service, requests int) any {
	return map[string]any{
		"apiVersion": "policy.weirmesh.io/v1alpha1", "kind": "TrafficPolicy",
		"metadata": map[string]any{"namespace": s.Namespace, "name": s.Name},
		"spec": map[string]any{
			"targetRef":      map[string]any{"name": s.Name},
			"circuitBreaker": map[string]any{"maxParallelRequests": requests},
		},
	}
}
