package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/weirmesh/weir/tests/bench/report"
	"github.com/weirmesh/weir/tests/cluster"
	"github.com/weirmesh/weir/tests/pod"
)

// configFlags are the command line of the benchmark of configuration.
type configFlags struct {
	services int
	grown    int
	proxies  int
	changes  int
	storm    int
	sampled  int
	calm     time.Duration // how long after its last connection a proxy counts as idle
	bin      string
	smoke    bool
}

// What shows that the benchmark works.
const (
	smokeServices, smokeGrown = 4 * used, 8 * used
	smokeChanges              = 2
)

func parseConfig(args []string, stderr io.Writer) (configFlags, error) {
	var f configFlags
	fs := flag.NewFlagSet("bench config", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, "bench config measures how long a change in a real API server takes until requests\n"+
			"through every proxy of a node are answered accordingly, at rest and while much else\n"+
			"changes, and the memory that the node's agent and its proxies take for it.\n\n  bench config [flags]\n\n")
		fs.PrintDefaults()
	}
	fs.IntVar(&f.services, "services", 1000, fmt.Sprintf("Services, each with %d endpoints", endpointsEach))
	fs.IntVar(&f.grown, "grown", 10000, "Services that there are in the end, for the memory of a proxy")
	fs.IntVar(&f.proxies, "proxies", 50, "captured pods, all on the node")
	fs.IntVar(&f.changes, "changes", 40, "changes of each kind that are measured, at rest and again in the storm")
	fs.IntVar(&f.storm, "storm", 100, "other changes in each second of the storm")
	fs.IntVar(&f.sampled, "sampled", 10, "fresh proxies whose memory is measured")
	fs.StringVar(&f.bin, "bin", "", "`folder` of built programs; empty: build them into out/bin")
	fs.BoolVar(&f.smoke, "smoke", false, "only show that it works, in seconds: no targets are judged")
	err := fs.Parse(args)
	f.calm = calm
	if f.smoke {
		f.calm = 100 * time.Millisecond
		f.services, f.grown, f.proxies, f.changes, f.storm, f.sampled = smokeServices, smokeGrown, smokeRuns, smokeChanges, 50, 1
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		return configFlags{}, err
	case err != nil:
		return configFlags{}, errUsage
	case fs.NArg() > 0 || f.services < used || f.grown < f.services || f.grown > maxServices || f.proxies < 1 ||
		f.proxies+f.sampled > 250 || f.changes < 1 || f.storm < 1 || f.sampled < 1:
		fs.Usage()
		return configFlags{}, errUsage
	}
	return f, nil
}

// runConfig is the benchmark of configuration: outside it builds, and runs again on
// a node of its own.
func runConfig(ctx context.Context, args []string, stdout, stderr io.Writer) (int, error) {
	f, err := parseConfig(args, stderr)
	if err != nil {
		return 0, err
	}
	return onNode(ctx, "config", f.bin, checkCluster, func(node *pod.Node) error {
		return measureConfig(ctx, f, node, stdout, stderr)
	})
}

// checkCluster refuses a machine on which no API server can run.
func checkCluster() error {
	if _, err := cluster.FindBinaries(""); err != nil {
		return err
	}
	return cluster.CheckHost()
}

// Names of the series.
const (
	nameSlices        = "an EndpointSlice, at rest"
	nameRoutes        = "an HTTPRoute, at rest"
	namePolicies      = "an AuthorizationPolicy, at rest"
	namePeerings      = "a PeerAuthentication, at rest"
	nameStormSlices   = "an EndpointSlice, in the storm"
	nameStormRoutes   = "an HTTPRoute, in the storm"
	nameStormPolicies = "an AuthorizationPolicy, in the storm"
	nameStormPeerings = "a PeerAuthentication, in the storm"
	nameAgentCPURest  = "agent: CPU for a change and all its proxies, at rest"
	nameAgentCPU      = "agent: share of a core, in the storm"
	nameAgentPSS      = "agent: memory (PSS)"
	nameAgentRSS      = "agent: memory (RSS)"
	nameAgentPeak     = "agent: memory (RSS), the most since its start"
	nameGrownRSS      = "agent: memory (RSS), after growth"
)

// nameProxy is the memory of a proxy that uses some of all Services.
func nameProxy(uses, of int) string {
	return fmt.Sprintf("proxy: memory (PSS), it uses %d of %d Services", uses, of)
}

// manyUsed is how many Services a proxy uses that uses many.
func (f configFlags) manyUsed() int { return min(20*used, f.grown) }

// measureConfig measures, and publishes the report.
func measureConfig(ctx context.Context, f configFlags, node *pod.Node, stdout, stderr io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c, err := newConfigBench(ctx, f, node, stderr)
	if err != nil {
		return err
	}
	series, notes, err := c.measure(ctx)
	if err != nil {
		return fmt.Errorf("%w\nthe end of the agent's log:\n%s", err, tail(c.agent.Log()))
	}
	r, err := report.New("config", fmt.Sprintf("From the API server into %d proxies: %d Services, %d endpoints", f.proxies, f.services, f.services*endpointsEach))
	if err != nil {
		return err
	}
	r.Series, r.Notes = series, notes
	if f.smoke {
		r.Notes = append(r.Notes, "A smoke run: targets are not judged.")
	} else {
		judgeConfig(r, f)
	}
	return r.Publish(stdout, os.Getenv("OUT"))
}

// judgeConfig adds what is to be held.
func judgeConfig(r *report.Report, f configFlags) {
	find := func(name string) report.Series {
		for _, s := range r.Series {
			if s.Name == name {
				return s
			}
		}
		panic("no series " + name)
	}
	for _, name := range []string{
		nameSlices, nameRoutes, namePolicies, namePeerings,
		nameStormSlices, nameStormRoutes, nameStormPolicies, nameStormPeerings,
	} {
		r.AtMost(name+", p99", find(name).Quantile(0.99), 1000, "ms")
	}
	// A wait of a fixed length would show in these.
	for _, name := range []string{nameSlices, nameRoutes, namePolicies, namePeerings} {
		r.AtMost(name+", p50", find(name).Quantile(0.5), 100, "ms")
	}
	r.AtMost(nameAgentPeak, find(nameAgentPeak).Quantile(0.5), 150, "MB")
	few, many := find(nameProxy(used, f.services)).Quantile(0.5), find(nameProxy(used, f.grown)).Quantile(0.5)
	r.AtMost(fmt.Sprintf("a proxy's memory at %d Services, as a share of that at %d, p50", f.grown, f.services), many/few, 1.05, "×")
}

// measure takes all samples, in order: at rest, in the storm, and the memory before
// and after the cluster has grown.
func (c *configBench) measure(ctx context.Context) ([]report.Series, []string, error) {
	watched := c.watchMemory(ctx)
	rest, err := c.changes(ctx, "at rest")
	if err != nil {
		return nil, nil, err
	}
	before, err := pod.CPUTime(c.agent.PID())
	if err != nil {
		return nil, nil, err
	}
	began, storm := time.Now(), c.startStorm(ctx)
	stormy, err := c.changes(ctx, "in the storm")
	written, stormErr := storm()
	if err := errors.Join(err, stormErr); err != nil {
		return nil, nil, err
	}
	lasted := time.Since(began)
	after, err := pod.CPUTime(c.agent.PID())
	if err != nil {
		return nil, nil, err
	}
	few, err := c.freshProxies(ctx, used, c.f.services)
	if err != nil {
		return nil, nil, err
	}
	agentPSS, agentRSS, err := watched()
	if err != nil {
		return nil, nil, err
	}
	agentPeak, err := peakRSS(c.agent.PID())
	if err != nil {
		return nil, nil, err
	}
	fmt.Fprintf(c.progress, "%d Services instead of %d\n", c.f.grown, c.f.services)
	if err := c.createServices(ctx, c.f.services, c.f.grown); err != nil {
		return nil, nil, err
	}
	grown, err := c.freshProxies(ctx, used, c.f.grown)
	if err != nil {
		return nil, nil, err
	}
	many, err := c.freshProxies(ctx, c.f.manyUsed(), c.f.grown)
	if err != nil {
		return nil, nil, err
	}
	grownRSS, err := rss(c.agent.PID())
	if err != nil {
		return nil, nil, err
	}
	ms := func(name string, samples []float64) report.Series {
		return report.Series{Name: name, Unit: "ms", Samples: samples}
	}
	return []report.Series{
			ms(nameSlices, rest.slices), ms(nameRoutes, rest.routes), ms(namePolicies, rest.authorizations), ms(namePeerings, rest.peers),
			ms(nameStormSlices, stormy.slices), ms(nameStormRoutes, stormy.routes),
			ms(nameStormPolicies, stormy.authorizations), ms(nameStormPeerings, stormy.peers),
			ms(nameAgentCPURest, rest.cpu),
			{Name: nameAgentCPU, Unit: "×", Samples: []float64{(after - before).Seconds() / lasted.Seconds()}},
			{Name: nameAgentPSS, Unit: "MB", Samples: agentPSS},
			{Name: nameAgentRSS, Unit: "MB", Samples: agentRSS},
			{Name: nameAgentPeak, Unit: "MB", Samples: []float64{agentPeak}},
			{Name: nameGrownRSS, Unit: "MB", Samples: []float64{grownRSS}},
			few, grown, many,
		}, []string{
			fmt.Sprintf("Times are from the API server's answer to the write until the answer to a request, in each of %d pods, shows the change: "+
				"the first endpoint that is new, or the header that the route's new rule sets. Each pod asks every %v from the write on, on one connection.", c.f.proxies, askEvery),
			"Policies are of the namespace of all pods. Theirs are from the write until the node, which asks each pod just so, is refused what is forbidden now; " +
				"and until its connection is reset, as mTLS is demanded, and until it is answered again, as it is not any more.",
			fmt.Sprintf("In the storm %.0f other changes a second were written, nine of ten to EndpointSlices, the rest to HTTPRoutes.", float64(written)/lasted.Seconds()),
		}, nil
}
