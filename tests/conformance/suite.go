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

// runSuite runs the suite, and what is ours beside it, and keeps what came of it.
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
		// Its applications are used again.
		args = append(args, "-report-output="+report, "-cleanup-base-resources=false")
	}
	j.step("running the suite: " + j.raw + " has all it says")
	began := time.Now()
	suiteErr := j.say(ctx, c, p.suite, args)
	if ctx.Err() != nil {
		return errors.New("the suite was interrupted")
	}
	log, err := os.ReadFile(j.raw)
	if err != nil {
		return err
	}
	o := outcomeOf(string(log), j.test)
	o.version, o.began, o.took = version, began, time.Since(began)
	var letterErr error
	if j.test == "" && len(o.passed) > 0 {
		j.step("holding routes and answers to the letter")
		o.letters, letterErr = byTheLetter(ctx, c, p.manifests)
	}
	fmt.Fprint(j.out, o.summary())
	if err := errors.Join(o.judge(suiteErr), letterErr); err != nil || j.test != "" {
		return err
	}
	document, err := os.ReadFile(report)
	if err != nil {
		return err
	}
	return keep(j.reports, document, o.summary())
}

// say runs a program against the cluster; all it says goes to the raw log.
func (j *job) say(ctx context.Context, c *cluster.Cluster, program string, args []string) error {
	if err := os.MkdirAll(filepath.Dir(j.raw), 0o755); err != nil {
		return err
	}
	raw, err := os.Create(j.raw)
	if err != nil {
		return err
	}
	defer raw.Close()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig)
	cmd.Stdout, cmd.Stderr = raw, raw
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	return cmd.Run()
}
