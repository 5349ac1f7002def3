package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
)

// ControlPlane is etcd and an API server with nothing around them: no nodes, no
// controllers, no scheduler. It is for what needs the real API alone.
type ControlPlane struct {
	// Kubeconfig is the path of a file with which programs in the same network
	// namespace reach the API server as cluster-admin.
	Kubeconfig string
}

// StartControlPlane starts one on the loopback of this process's network namespace,
// which has no other, and returns when it is ready. Its files and logs are in dir,
// which must not exist, and should be on a tmpfs. It ends with ctx.
func StartControlPlane(ctx context.Context, b Binaries, dir string) (*ControlPlane, error) {
	address := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	server := "https://" + netip.AddrPortFrom(address, apiPort).String()
	p := &ControlPlane{Kubeconfig: filepath.Join(dir, "kubeconfig")}
	pki := filepath.Join(dir, "pki")
	if err := os.MkdirAll(pki, 0o700); err != nil {
		return nil, fmt.Errorf("control plane: %w", err)
	}
	ca, err := newAuthority(pki)
	if err != nil {
		return nil, fmt.Errorf("control plane: certificates: %w", err)
	}
	err = errors.Join(
		ca.issue("apiserver", "kube-apiserver", "", []string{"localhost"}, []netip.Addr{address}),
		ca.issue("admin", "kubernetes-admin", "system:masters", nil, nil),
		ca.kubeconfig(p.Kubeconfig, server, "admin"),
		ca.signingKey(),
	)
	if err != nil {
		return nil, fmt.Errorf("control plane: certificates: %w", err)
	}
	api, err := newAPIClient(ca, server, "admin")
	if err != nil {
		return nil, fmt.Errorf("control plane: %w", err)
	}
	ended := make(chan error, 2)
	for _, args := range [][]string{
		etcdArgs(filepath.Join(dir, "etcd")),
		append([]string{
			filepath.Join(b.Kubernetes, "kube-apiserver"),
			"--endpoint-reconciler-type=none", // its own endpoint would be on the loopback, where none may be
		}, apiServerArgs(pki, filepath.Join(dir, "certs"), address, serviceRanges[:1])...),
	} {
		if err := startLogged(ctx, dir, ended, args...); err != nil {
			return nil, fmt.Errorf("control plane: %w", err)
		}
	}
	err = poll(ctx, "the API server", func(ctx context.Context) error {
		select {
		case err := <-ended:
			return permanent{err}
		default:
			return api.get(ctx, "/readyz", nil)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("control plane: %w; end of its log:\n%s", err, tail(filepath.Join(dir, "kube-apiserver.log")))
	}
	return p, nil
}

// startLogged starts a program that ends with ctx; what it writes is in dir, under
// its name. ended hears of its end.
func startLogged(ctx context.Context, dir string, ended chan<- error, args ...string) error {
	name := filepath.Base(args[0])
	log, err := os.Create(filepath.Join(dir, name+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	go waitEnd(cmd, name, ended)
	return nil
}

func waitEnd(cmd *exec.Cmd, name string, ended chan<- error) {
	_ = cmd.Wait() // its state says it all
	ended <- fmt.Errorf("%s has ended: %s", name, cmd.ProcessState)
}

// etcdArgs is etcd's command line, with its data in dir, on the loopback.
func etcdArgs(dir string) []string {
	return []string{
		"/usr/bin/etcd", "--name=default", "--data-dir=" + dir,
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
		"--initial-cluster=default=http://127.0.0.1:2380",
		"--logger=zap", "--log-outputs=stderr",
	}
}

// apiServerArgs are those of the API server's flags that every one has: it serves at
// address, uses the etcd of etcdArgs, and makes files of its own in scratch.
func apiServerArgs(pki, scratch string, address netip.Addr, services families) []string {
	file := func(name string) string { return filepath.Join(pki, name) }
	return []string{
		"--etcd-servers=http://127.0.0.1:2379",
		"--advertise-address=" + address.String(),
		fmt.Sprintf("--secure-port=%d", apiPort),
		"--service-cluster-ip-range=" + services.String(),
		"--allow-privileged=true",
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--client-ca-file=" + file("ca.crt"),
		"--tls-cert-file=" + file("apiserver.crt"), "--tls-private-key-file=" + file("apiserver.key"),
		"--cert-dir=" + scratch,
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + file("sa.pub"), "--service-account-signing-key-file=" + file("sa.key"),
		"--profiling=false",
	}
}
