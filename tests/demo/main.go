// demo shows the life of one request on a machine with nothing but Go and root:
// five pods (an ingress, front, back in two replicas and a version 2) go through a real CNI
// chain with weir-cni, weir-agent runs in standalone mode, and a user's request
// for app.example.com passes through all of it. What it prints of the request is
// what the plugin, the proxies and the applications saw, nothing else; a record that is
// missing, a rule that counted nothing, or a caller without an identity fails the demo
// at that step. Then it shows what a route, retries and policies do.
//
// This file builds and isolates (package pod); stage.go puts the pods on the
// node; request.go is the user; life.go, which is pure, finds the seven steps in
// the records; routes.go and policies.go are what comes after; print.go shows it. The
// pods' applications are this program again (app.go).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/weirmesh/weir/plugin/capture"
	"github.com/weirmesh/weir/tests/pod"
)

// timeout bounds the whole show, once built.
const timeout = 20 * time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// flags are the demo's command line.
type flags struct {
	bin    string
	v6     bool
	delete broken
	agent  bool
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 && args[0] == appCommand {
		return exitCode(stderr, runApp(ctx, args[1:], stdout, stderr))
	}
	f, err := parseFlags(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2 // the usage is on stderr
	}
	node, err := pod.Enter()
	if err != nil {
		return exitCode(stderr, err)
	}
	if node == nil {
		return outside(ctx, f, stderr)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err = show(ctx, f, node, stdout)
	return exitCode(stderr, errors.Join(err, node.Close()))
}

func exitCode(stderr io.Writer, err error) int {
	if err != nil {
		fmt.Fprintln(stderr, "demo:", err)
		return 1
	}
	return 0
}

// outside builds what the demo needs and runs it again on a node of its own.
func outside(ctx context.Context, f flags, stderr io.Writer) int {
	if os.Geteuid() != 0 {
		return exitCode(stderr, errors.New("needs root, for namespaces and cgroups: sudo make demo"))
	}
	if f.bin == "" {
		if _, err := pod.Build(ctx); err != nil {
			if ctx.Err() != nil {
				return pod.Interrupted
			}
			return exitCode(stderr, err)
		}
	}
	code, err := pod.Isolate(ctx, "demo")
	if err != nil {
		return exitCode(stderr, err)
	}
	if code == pod.Interrupted {
		fmt.Fprintln(stderr, "demo: interrupted; nothing of it is left")
	}
	return code
}

func parseFlags(args []string, stderr io.Writer) (flags, error) {
	var f flags
	fs := flag.NewFlagSet("demo", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, "demo shows the life of one request from an ingress through front to back, who showed\n"+
			"which identity and what was decided, from the records of Weir's plugin and proxies; then\n"+
			"a route, retries, and who may call whom. It needs root and leaves nothing behind.\n\n  demo [flags]\n\n")
		fs.PrintDefaults()
	}
	fs.StringVar(&f.bin, "bin", "", "`folder` of built programs; empty: build them into out/bin")
	fs.BoolVar(&f.v6, "6", false, "use IPv6 throughout")
	fs.BoolVar(&f.agent, "agent-log", false, "print the agent's log at the end")
	fs.Var(&f.delete, "delete-rule", "`pod/counter`: delete the rule that steps this counter before the request, as in front/out_turned; "+
		"back means both replicas; may be repeated")
	if err := fs.Parse(args); err != nil {
		return flags{}, err
	}
	if fs.NArg() > 0 {
		fmt.Fprintf(stderr, "unexpected argument %q\n", fs.Arg(0))
		fs.Usage()
		return flags{}, errors.New("usage")
	}
	return f, nil
}

// broken are the rules to delete.
type broken []brokenRule

type brokenRule struct {
	pods    []string // names
	counter string
}

// counters are those a rule can be deleted by.
var counters = []string{capture.InTurned, capture.OutTurned, capture.OutOwn}

func (b *broken) String() string { return "" }

// Set adds a rule, "front/out_turned".
func (b *broken) Set(value string) error {
	name, counter, _ := strings.Cut(value, "/")
	var pods []string
	for _, p := range podNames {
		if p == name || strings.HasPrefix(p, name+"-") {
			pods = append(pods, p)
		}
	}
	if len(pods) == 0 {
		return fmt.Errorf("there is no pod %q; there are %s", name, strings.Join(podNames, ", "))
	}
	if !slices.Contains(counters, counter) {
		return fmt.Errorf("no rule of a request's life steps %q; there are %s", counter, strings.Join(counters, ", "))
	}
	*b = append(*b, brokenRule{pods, counter})
	return nil
}
