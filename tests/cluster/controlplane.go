package cluster

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
)

// The control plane runs on the fabric. The API server is at one address for
// the nodes and the control plane, at another for the host.
func (c *Cluster) nodesServer() string {
	return "https://" + netip.AddrPortFrom(c.net.fabric()[0], apiPort).String()
}

func (c *Cluster) hostServer() string {
	return "https://" + netip.AddrPortFrom(c.net.linkAddr(), apiPort).String()
}

// makeCredentials writes every certificate and kubeconfig of the cluster.
func (c *Cluster) makeCredentials() error {
	ca, err := newAuthority(c.path("pki"))
	if err != nil {
		return fmt.Errorf("certificates: %w", err)
	}
	c.ca = ca
	serverAddrs := append(c.net.fabric(), c.net.linkAddr(), netip.MustParseAddr("127.0.0.1"), c.net.services.host(1)[0])
	serverNames := []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}
	type pair struct {
		name, user, group string
		hosts             []string
		addrs             []netip.Addr
		server            string // of its kubeconfig; empty: it has none
	}
	pairs := []pair{
		{name: "apiserver", user: "kube-apiserver", hosts: serverNames, addrs: serverAddrs},
		{name: "apiserver-kubelet", user: "kube-apiserver-kubelet-client", group: "system:masters"},
		{name: "admin", user: "kubernetes-admin", group: "system:masters", server: c.hostServer()},
		{name: "controller-manager", user: "system:kube-controller-manager", server: c.nodesServer()},
		{name: "scheduler", user: "system:kube-scheduler", server: c.nodesServer()},
		{name: "kube-proxy", user: "system:kube-proxy", server: c.nodesServer()},
	}
	for i, node := range c.Nodes {
		pairs = append(pairs, pair{
			name: node.Name, user: "system:node:" + node.Name, group: "system:nodes",
			hosts: []string{node.Name}, addrs: c.net.node(i + 1), server: c.nodesServer(),
		})
	}
	for _, p := range pairs {
		if err := ca.issue(p.name, p.user, p.group, p.hosts, p.addrs); err != nil {
			return fmt.Errorf("certificate of %s: %w", p.name, err)
		}
		if p.server == "" {
			continue
		}
		path := c.pki(p.name + ".kubeconfig")
		if p.name == "admin" {
			path = c.Kubeconfig
		}
		if err := ca.kubeconfig(path, p.server, p.name); err != nil {
			return fmt.Errorf("kubeconfig of %s: %w", p.name, err)
		}
	}
	return ca.signingKey()
}

func (c *Cluster) pki(name string) string { return filepath.Join(c.path("pki"), name) }

// startEtcd keeps its data in the fabric's /run, a tmpfs: nothing here is to
// survive, and no disk is to be waited for.
func (c *Cluster) startEtcd() error {
	return c.Fabric.start(c.Fabric.process("etcd", etcdArgs("/run/etcd")...))
}

func (c *Cluster) startAPIServer() error {
	args := append([]string{filepath.Join(c.binaries.Kubernetes, "kube-apiserver")},
		apiServerArgs(c.path("pki"), "/run/kubernetes", c.net.fabric()[0], c.net.services)...)
	return c.Fabric.start(c.Fabric.process("kube-apiserver", append(args,
		"--kubelet-certificate-authority="+c.pki("ca.crt"),
		"--kubelet-client-certificate="+c.pki("apiserver-kubelet.crt"), "--kubelet-client-key="+c.pki("apiserver-kubelet.key"),
		"--kubelet-preferred-address-types=InternalIP",
	)...))
}

// startControllers starts the controller manager and the scheduler. Neither
// elects a leader: each is alone.
func (c *Cluster) startControllers() error {
	const rate = "200" // requests per second; the default of 20 makes tests wait
	manager := c.Fabric.process("kube-controller-manager", filepath.Join(c.binaries.Kubernetes, "kube-controller-manager"),
		"--kubeconfig="+c.pki("controller-manager.kubeconfig"),
		"--authentication-kubeconfig="+c.pki("controller-manager.kubeconfig"),
		"--authorization-kubeconfig="+c.pki("controller-manager.kubeconfig"),
		"--bind-address=127.0.0.1", "--cert-dir=/run/kubernetes", "--leader-elect=false",
		"--allocate-node-cidrs=false",
		"--use-service-account-credentials=true",
		"--root-ca-file="+c.pki("ca.crt"), "--service-account-private-key-file="+c.pki("sa.key"),
		"--cluster-signing-cert-file="+c.pki("ca.crt"), "--cluster-signing-key-file="+c.pki("ca.key"),
		"--kube-api-qps="+rate, "--kube-api-burst="+rate,
		"--node-monitor-period=1s", "--node-monitor-grace-period=20s",
		"--profiling=false",
	)
	scheduler := c.Fabric.process("kube-scheduler", filepath.Join(c.binaries.Kubernetes, "kube-scheduler"),
		"--kubeconfig="+c.pki("scheduler.kubeconfig"),
		"--authentication-kubeconfig="+c.pki("scheduler.kubeconfig"),
		"--authorization-kubeconfig="+c.pki("scheduler.kubeconfig"),
		"--bind-address=127.0.0.1", "--cert-dir=/run/kubernetes", "--leader-elect=false",
		"--kube-api-qps="+rate, "--kube-api-burst="+rate,
		"--profiling=false",
	)
	if err := c.Fabric.start(manager); err != nil {
		return err
	}
	return c.Fabric.start(scheduler)
}

// WaitAPI waits until the API server is ready, as it says itself. Tests use it
// after Fabric.Stop and Fabric.Start of "kube-apiserver".
func (c *Cluster) WaitAPI(ctx context.Context) error {
	err := poll(ctx, "the API server", func(ctx context.Context) error {
		for _, process := range []string{"etcd", "kube-apiserver"} {
			if err := c.Fabric.running(process); err != nil {
				return err
			}
		}
		return c.api.get(ctx, "/readyz", nil)
	})
	if err != nil {
		return fmt.Errorf("%w; %s", err, c.Fabric.processes["kube-apiserver"].logTail())
	}
	return nil
}
