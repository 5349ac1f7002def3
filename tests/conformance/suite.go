package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/weirmesh/weir/tests/cluster"
)

const (
	// weirOverlay is Weir as the e2e tests install it, which says where the test
	// bed's nodes have their cgroups.
	weirOverlay   = "tests/e2e/weir/install"
	weirNamespace = "weir-system"
	optionsFile   = home + "/options.yaml"
)

// install puts the Gateway API and Weir on the cluster. On one that is reused, a Weir
// that is there is replaced: its image may be a new one of the same name.
func (j *job) install(ctx context.Context, c *cluster.Cluster, p programs) error {
	j.step("loading images")
	for _, archive := range []string{p.echo, weirImage} {
		if err := c.LoadImage(ctx, archive); err != nil {
			return err
		}
	}
	j.step("installing the Gateway API and Weir")
	steps := [][]string{
		// Server-side: what kubectl would note in an annotation is too long for one.
		{"apply", "--server-side", "-f", p.crds},
		{"wait", "--for=condition=Established", "--timeout=1m", "-f", p.crds + "/gateway.networking.k8s.io_httproutes.yaml", "-f", p.crds + "/gateway.networking.k8s.io_grpcroutes.yaml"},
		{"apply", "-k", weirOverlay},
	}
	if os.Getenv(clusterEnv) != "" {
		steps = append(steps, []string{"-n", weirNamespace, "rollout", "restart", "daemonset/weir-agent", "deployment/weir-controller"})
	}
	steps = append(steps,
		[]string{"-n", weirNamespace, "rollout", "status", "--timeout=2m", "daemonset/weir-agent"},
		[]string{"-n", weirNamespace, "rollout", "status", "--timeout=1m", "deployment/weir-controller"})
	for _, args := range steps {
		if _, err := c.Kubectl(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// runSuite runs the suite, and says what it said.
func (j *job) runSuite(ctx context.Context, c *cluster.Cluster, p programs) error {
	version, err := weirVersion(ctx)
	if err != nil {
		return err
	}
	report := filepath.Join(j.work, "report.yaml")
	args := []string{"-test.v", "-test.run=^TestConformance$", "-conformance-options-file=" + optionsFile, "-version=" + version}
	if j.test != "" {
		args = append(args, "-run-test="+j.test)
	} else {
		args = append(args, "-report-output="+report)
	}
	j.step("running the suite: " + j.raw + " has all it says")
	if err := os.MkdirAll(filepath.Dir(j.raw), 0o755); err != nil {
		return err
	}
	raw, err := os.Create(j.raw)
	if err != nil {
		return err
	}
	defer raw.Close()
	cmd := exec.CommandContext(ctx, p.suite, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig)
	cmd.Stdout, cmd.Stderr = raw, raw
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	began := time.Now()
	suiteErr := cmd.Run()
	if ctx.Err() != nil {
		return errors.New("the suite was interrupted")
	}
	return j.conclude(suiteErr, conditions{version: version, began: began, took: time.Since(began)}, report)
}

// conclude says what came of it, and keeps it.
func (j *job) conclude(suiteErr error, c conditions, report string) error {
	log, err := os.ReadFile(j.raw)
	if err != nil {
		return err
	}
	o := outcomeOf(string(log), j.test)
	fmt.Fprint(j.out, o.summary(c))
	if j.test != "" {
		return o.judge(suiteErr)
	}
	document, err := os.ReadFile(report)
	if err != nil {
		return errors.Join(suiteErr, fmt.Errorf("the suite wrote no report: %w", err))
	}
	if err := keep(j.reports, document, o.summary(c)); err != nil {
		return fmt.Errorf("the report: %w", err)
	}
	return o.judge(suiteErr)
}
