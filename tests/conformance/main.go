// conformance runs the Gateway API's mesh conformance suite against Weir, on a real
// Kubernetes (package cluster) that it brings up and takes down again.
//
// The suite is upstream's own test, unchanged: the nested module suite pins it, and
// options.yaml says what Weir claims. The applications of its manifests are Istio's
// echo (the nested module build/echo), for no registry is within reach. Weir is
// installed as its README says. What the suite's tests expect and do not compare is
// looked at beside it (letter.go).
//
// It fails unless every mesh test ran and passed. If so, there are, in the layout of
// upstream's conformance/reports: the suite's report as it wrote it, the README that
// belongs to it, and which tests ran (report.go). To iterate, keep a cluster running
// and name its state folder; Weir is then installed anew and left there:
//
//	go run ./tests/cluster/cmd/weir-cluster up -name dev
//	WEIR_CLUSTER=/var/tmp/weir-cluster/dev go run ./tests/conformance -test MeshPorts
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/weirmesh/weir/tests/cluster"
)

const (
	// clusterEnv names the state folder of a running cluster to use.
	clusterEnv = "WEIR_CLUSTER"
	// home is where this program's files are, from the repository's root.
	home = "tests/conformance"
	// timeLimit bounds a run, but for programs that are built for the first time.
	timeLimit = 15 * time.Minute
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

// job is one run.
type job struct {
	test    string // the one test to run; empty: all
	reports string // folder of the reports
	raw     string // the file of all that the suite says

	work string // folder of what is needed only meanwhile
	step func(string)
	out  io.Writer
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	began := time.Now()
	j := job{out: stdout, step: func(line string) {
		fmt.Fprintf(stderr, "%5.1fs %s\n", time.Since(began).Seconds(), line)
	}}
	flags := flag.NewFlagSet("conformance", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&j.test, "test", "", "the one test to run, by its short name such as MeshPorts; there is no report then")
	flags.StringVar(&j.reports, "reports", home+"/reports", "folder of the reports")
	flags.StringVar(&j.raw, "log", "out/conformance.log", "file of all that the suite says")
	if err := flags.Parse(args); err != nil {
		return flag.ErrHelp
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("no arguments are taken, got %q", flags.Args())
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root, to run a Kubernetes of its own: sudo make conformance")
	}
	if _, err := os.Stat(filepath.Join(home, "options.yaml")); err != nil {
		return fmt.Errorf("run it in the root of Weir's repository: %w", err)
	}
	work, err := os.MkdirTemp("", "weir-conformance-")
	if err != nil {
		return err
	}
	j.work = work
	defer os.RemoveAll(work)
	return j.run(ctx)
}

// run brings everything up, runs the suite, and takes everything down.
func (j *job) run(ctx context.Context) error {
	programs, err := j.build(ctx)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeLimit, fmt.Errorf("not done after %s", timeLimit))
	defer cancel()
	c, down, err := j.openCluster(ctx)
	if err != nil {
		return err
	}
	err = j.runOn(ctx, c, programs)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = errors.Join(cause, err)
	}
	j.step("cleaning up")
	return errors.Join(err, down())
}

func (j *job) runOn(ctx context.Context, c *cluster.Cluster, p programs) error {
	if err := j.install(ctx, c, p); err != nil {
		said, _ := c.Kubectl(context.WithoutCancel(ctx), "-n", weirNamespace, "get", "pods,events") // to see why
		return fmt.Errorf("%w\n%s", err, said)
	}
	return j.runSuite(ctx, c, p)
}

// openCluster finds the cluster to use, or brings one up; what it returns beside it
// removes what is ours.
func (j *job) openCluster(ctx context.Context) (*cluster.Cluster, func() error, error) {
	if dir := os.Getenv(clusterEnv); dir != "" {
		c, err := cluster.Attach(dir)
		return c, func() error {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			_, err := c.Kubectl(ctx, "delete", "namespace", "--ignore-not-found", meshNamespace, meshNamespace+"-consumer")
			return err
		}, err
	}
	c, lock, err := cluster.Fresh(ctx, home, cluster.Options{Name: "conform", Progress: j.step})
	if errors.Is(err, cluster.ErrBusy) {
		return nil, nil, fmt.Errorf("%w; name a cluster of your own in %s", err, clusterEnv)
	}
	if err != nil {
		return nil, nil, err
	}
	return c, func() error {
		defer lock.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		return c.Down(ctx)
	}, nil
}
