package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/weirmesh/weir/install/conflist"
	"github.com/weirmesh/weir/install/cri"
	"github.com/weirmesh/weir/install/owner"
	"github.com/weirmesh/weir/install/place"
)

// options are the command line's. Paths are as this program sees them, but for
// the socket's.
type options struct {
	confDir string
	binDir  string
	plugin  string
	runDir  string
	form    string
	runtime string
	owner   string
	mesh    string
	entry   conflist.Entry
}

// Limits that weir-cni has too.
const (
	minTimeout = 100 * time.Millisecond
	maxTimeout = time.Minute
	maxSunPath = 107 // bytes, sun_path of unix(7)
)

var backends = []string{"auto", "nftables", "iptables"}

// parseFlags reads the flags of a command. All of them need the node's two
// folders; only run has something to put there.
func parseFlags(command string, args []string, stderr io.Writer) (options, error) {
	var o options
	fs := flag.NewFlagSet("weir-install "+command, flag.ContinueOnError)
	fs.SetOutput(io.Discard) // errors are printed once, by run
	fs.Usage = func() {}
	fs.StringVar(&o.confDir, "cni-conf-dir", "/etc/cni/net.d", "`folder` of CNI configurations that the container runtime reads")
	fs.StringVar(&o.binDir, "cni-bin-dir", "/opt/cni/bin", "`folder` that the container runtime looks for CNI plugins in")
	if command != "uninstall" {
		fs.StringVar(&o.form, "chain", string(place.Auto), "`form`: entry (in the primary's list), dropin (a file of its own, which the runtime must read), auto (dropin if the runtime says that it has loaded it)")
		fs.StringVar(&o.runtime, "runtime-socket", "/run/containerd/containerd.sock", "the container runtime's `socket`, asked for what it has loaded, with --chain=auto; empty: not asked")
	}
	switch command {
	case "uninstall":
		fs.StringVar(&o.runDir, "run-dir", "/run/weir", "the agent's `folder`; on its socket it is asked to let the node's pods go")
	case "run":
		fs.StringVar(&o.plugin, "plugin", "/weir-cni", "weir-cni, the `file` to copy")
		fs.StringVar(&o.runDir, "run-dir", "/run/weir", "the agent's `folder`; its file \"ready\" is waited for")
		fs.StringVar(&o.owner, "daemonset", "", "`namespace/name` of the DaemonSet that runs this: when stopped because it is deleted, uninstall; empty: never")
		fs.StringVar(&o.entry.Socket, "socket", "/run/weir/attach.sock", "the agent's `socket`, a path on the host")
		fs.StringVar(&o.mesh, "options", "", "`file` of mesh options, YAML as in manifests/OPTIONS.md: the exempt namespaces go into the chain; empty: their defaults")
		fs.DurationVar(&o.entry.Timeout, "timeout", 5*time.Second, "limit of a whole ADD")
		fs.StringVar(&o.entry.Backend, "backend", "auto", "`backend` for the rules: "+strings.Join(backends, ", "))
	}
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(stderr, "Flags of weir-install %s:\n", command)
		fs.SetOutput(stderr)
		fs.PrintDefaults()
		return options{}, err
	} else if err != nil {
		return options{}, fmt.Errorf("%w: %w; weir-install %s -h lists the flags", errUsage, err, command)
	}
	if fs.NArg() > 0 {
		return options{}, fmt.Errorf("%w: unexpected argument %q", errUsage, fs.Arg(0))
	}
	if command == "run" {
		if err := o.checkEntry(); err != nil {
			return options{}, fmt.Errorf("%w: %w", errUsage, err)
		}
	}
	return o, nil
}

// checkEntry finds here what would otherwise fail every pod of the node.
func (o options) checkEntry() error {
	e := o.entry
	switch {
	case !filepath.IsAbs(e.Socket) || len(e.Socket) > maxSunPath:
		return fmt.Errorf("--socket %q must be an absolute path of at most %d bytes", e.Socket, maxSunPath)
	case e.Timeout < minTimeout || e.Timeout > maxTimeout:
		return fmt.Errorf("--timeout %s must be between %s and %s", e.Timeout, minTimeout, maxTimeout)
	case !slices.Contains(backends, e.Backend):
		return fmt.Errorf("--backend %q must be one of %s", e.Backend, strings.Join(backends, ", "))
	case !slices.Contains(place.Forms, place.Form(o.form)):
		return fmt.Errorf("--chain %q must be one of %v", o.form, place.Forms)
	case o.plugin == "":
		return errors.New("--plugin must name the file to copy")
	}
	if o.owner != "" {
		if err := owner.CheckName(o.owner); err != nil {
			return fmt.Errorf("--daemonset %w", err)
		}
	}
	return nil
}

// readMesh takes the one mesh option that is the plugin's, too, out of their file.
// The others are the agent's to judge, and nothing is chained before it is ready.
func (o *options) readMesh() error {
	mesh := struct {
		ExemptNamespaces []string `json:"exemptNamespaces"`
	}{[]string{"kube-system", "weir-system"}}
	if o.mesh != "" {
		document, err := os.ReadFile(o.mesh)
		if err == nil {
			err = yaml.Unmarshal(document, &mesh)
		}
		if err != nil {
			return fmt.Errorf("--options %s: %w", o.mesh, err)
		}
	}
	o.entry.ExemptNamespaces = mesh.ExemptNamespaces
	return nil
}

// loaded asks the container runtime what it runs for pods; nil: it is not asked.
func (o options) loaded() func(context.Context) ([]string, error) {
	if o.runtime == "" {
		return nil
	}
	return func(ctx context.Context) ([]string, error) { return cri.Loaded(ctx, o.runtime) }
}

func (o options) chain() place.Chain { return place.Chain{Dir: o.confDir, Entry: o.entry} }

func (o options) place() place.Plugin { return place.Plugin{Source: o.plugin, Dir: o.binDir} }

func (o options) marker() string { return filepath.Join(o.runDir, "ready") }

// socket is the agent's, as this program sees it.
func (o options) socket() string { return filepath.Join(o.runDir, "attach.sock") }
