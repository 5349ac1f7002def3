package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/weirmesh/weir/install/owner"
)

// flags are the agent's command line.
type flags struct {
	manifests    string
	kubeconfig   string
	nodeName     string
	namespace    string
	runDir       string
	netnsDir     string
	cgroupRoot   string
	cgroupParent string
	podsCgroup   string
	cgroupNS     string
	mountNS      string
	proxy        string
	proxyDir     string
	plugin       string
	options      string
	issuer       string
	uidBase      uint
	accessLog    string
	metrics      string
	repair       bool
	release      bool
	daemonSet    string
	version      bool
}

func parseFlags(args []string, stderr io.Writer) (flags, error) {
	var f flags
	fs := flag.NewFlagSet("weir-agent", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, "weir-agent decides which pods of this node are captured, and ships and supervises their proxies.\n\n"+
			"  weir-agent [flags]              serve\n"+
			"  weir-agent ready [--run-dir D]  exit 0 if the agent serves\n"+
			"  weir-agent controller [flags]   do what is done once for a cluster\n\n")
		fs.PrintDefaults()
	}
	host, err := os.Hostname()
	if err != nil {
		host = ""
	}
	fs.StringVar(&f.manifests, "manifests", "", "`folder` of Kubernetes YAML to read instead of an API server (standalone mode)")
	fs.StringVar(&f.kubeconfig, "kubeconfig", "", "`file` to reach the API server with; empty: the pod's service account")
	fs.StringVar(&f.nodeName, "node-name", host, "this node's `name` in the cluster")
	fs.StringVar(&f.namespace, "namespace", "weir-system", "`namespace` of Weir in the cluster")
	fs.StringVar(&f.runDir, "run-dir", "/run/weir", "`folder` of sockets and state, on a tmpfs of the host; in standalone mode the CA that signs for pods, too, which goes at a reboot, as do all that trust it")
	fs.StringVar(&f.netnsDir, "netns-dir", "/run/netns", "`folder` where the host's /run/netns is seen")
	fs.StringVar(&f.cgroupRoot, "cgroup-root", "/sys/fs/cgroup", "`folder` where the host's /sys/fs/cgroup is seen")
	fs.StringVar(&f.cgroupParent, "cgroup-parent", "weir", "`cgroup` of all proxies of this node, relative to the root of each hierarchy")
	fs.StringVar(&f.podsCgroup, "pods-cgroup", "", "`cgroup` of all pods, relative to the root of the v2 hierarchy; empty: the one called kubepods or kubepods.slice")
	fs.StringVar(&f.cgroupNS, "host-cgroup-ns", "/proc/1/ns/cgroup", "cgroup namespace the container runtime runs in, a `file`")
	fs.StringVar(&f.mountNS, "host-mount-ns", "/proc/1/ns/mnt", "mount namespace the container runtime runs in, a `file`: there weir-cni finds iptables, where it has to use that")
	fs.StringVar(&f.proxy, "proxy", "/weir-proxy", "weir-proxy, a `file`")
	fs.StringVar(&f.proxyDir, "proxy-dir", "/opt/weir/bin", "`folder` of the host to run weir-proxy from; empty: run it where it is")
	fs.StringVar(&f.plugin, "plugin", "/weir-cni", "weir-cni, a `file`: puts rules into namespaces for the test at start")
	fs.StringVar(&f.options, "options", "", "`file` of mesh options, YAML as in manifests/OPTIONS.md; empty: their defaults")
	fs.StringVar(&f.issuer, "issuer", "", "`folder` of a CA that signs for pods in standalone mode: tls.crt, tls.key and ca.crt, as in a Secret of cert-manager's; another one there takes over without a failed handshake; empty: one is made in --run-dir")
	fs.UintVar(&f.uidBase, "uid-base", 1879048192, "proxies run as this `uid` and those above")
	fs.StringVar(&f.accessLog, "access-log", "-", "`file` for access log lines; -: standard output")
	fs.StringVar(&f.metrics, "metrics-address", ":15090", "`address` to serve Prometheus metrics on, at /metrics; empty: do not")
	fs.BoolVar(&f.repair, "repair", true, "capture and release running pods in place, and put right rules that are not as they were left")
	fs.BoolVar(&f.release, "release", false, "capture no pod, and let those go that are: the first step of an uninstall")
	fs.StringVar(&f.daemonSet, "daemonset", "", "`namespace/name` of the DaemonSet that runs this: when stopped because it is deleted, let all pods go; empty: never")
	fs.BoolVar(&f.version, "version", false, "print the version and exit")
	if err := fs.Parse(args); err != nil {
		return flags{}, err
	}
	switch {
	case fs.NArg() > 0:
		return flags{}, fmt.Errorf("unexpected argument %q; weir-agent -h lists what there is", fs.Arg(0))
	case f.nodeName == "" && f.manifests == "":
		return flags{}, errors.New("--node-name is needed: the node's name in the cluster")
	case f.cgroupParent == "" || strings.HasPrefix(f.cgroupParent, "/") || strings.Contains(f.cgroupParent, ".."):
		return flags{}, fmt.Errorf("--cgroup-parent %q must be relative, like \"weir\"", f.cgroupParent)
	case f.issuer != "" && f.manifests == "":
		return flags{}, errors.New("--issuer is for --manifests: on a cluster weir-controller signs, with the CA in the Secret weir-ca-issuer if there is one")
	case f.uidBase < 100000 || f.uidBase > 1<<32-1<<20:
		return flags{}, fmt.Errorf("--uid-base %d must be between 100000 and %d, out of the way of other users", f.uidBase, uint(1<<32-1<<20))
	}
	if f.daemonSet != "" {
		if err := owner.CheckName(f.daemonSet); err != nil {
			return flags{}, fmt.Errorf("--daemonset %w", err)
		}
	}
	return f, nil
}
