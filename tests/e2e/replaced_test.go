package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/tests/cluster"
)

// nextVersion is what a proxy says of itself that is to take the place of another.
const nextVersion = "e2e-next"

// buildProxy builds that proxy, otherwise as the Makefile does.
func buildProxy(t *testing.T) string {
	t.Helper()
	path := filepath.Join(bed.work, "weir-proxy-next")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-buildvcs=false", "-tags=grpcnotrace",
		"-ldflags=-s -w -X main.version="+nextVersion, "-o", path, "./proxy")
	build.Dir, build.Env = repository(), append(os.Environ(), "CGO_ENABLED=0")
	_, err := output(build)
	must(t, err)
	return path
}

// replaceProxyBinary has a node's agent find another program where it starts proxies from,
// until the test ends. Those that run are as they were.
func replaceProxyBinary(t *testing.T, node *cluster.Node, path string) {
	t.Helper()
	run := func(ctx context.Context, script string, args ...string) error {
		_, err := output(node.Command(ctx, "sh", append([]string{"-euc", script, "sh"}, args...)...))
		return err
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), soon)
		defer cancel()
		if err := run(ctx, `for f in /opt/weir/bin/*.before; do mv "$f" "${f%.before}"; done`); err != nil {
			t.Error(err)
		}
	})
	must(t, run(t.Context(), `for f in /opt/weir/bin/weir-proxy-*; do
		cp "$f" "$f.before"; cp "$1" "$f.next"; chmod 755 "$f.next"; mv "$f.next" "$f"
	done`, path))
}

// crash kills the pods' proxies, once agents have the certificates of all, and returns when
// it began to and when all had ended.
func crash(t *testing.T, pods []*corev1.Pod) (time.Time, time.Time) {
	t.Helper()
	proxies := proxiesOf(t, pods)
	for i, pod := range pods {
		waitIdentityKept(t, bed.node(pod.Spec.NodeName), proxies[i])
	}
	began := time.Now()
	for _, proxy := range proxies {
		must(t, proxy.kill())
	}
	ended := time.Now()
	followed(t, pods, proxies)
	return began, ended
}

// upgrade ends the pods' proxies by hand, and has their agents start the next program, of
// which no pod has one yet.
func upgrade(t *testing.T, pods []*corev1.Pod, program string) {
	t.Helper()
	on := map[string]int{} // pods by node
	for _, node := range bed.Nodes {
		replaceProxyBinary(t, node, program)
	}
	proxies := proxiesOf(t, pods)
	for i, pod := range pods {
		on[pod.Spec.NodeName]++
		must(t, proxies[i].end())
	}
	followed(t, pods, proxies)
	for node, n := range on {
		waitVersion(t, bed.node(node), n)
	}
}

// proxiesOf are the pods' proxies.
func proxiesOf(t *testing.T, pods []*corev1.Pod) []process {
	t.Helper()
	var all []process
	for _, pod := range pods {
		all = append(all, proxyOf(t, pod))
	}
	return all
}

// followed waits until each pod has another proxy than it had.
func followed(t *testing.T, pods []*corev1.Pod, before []process) {
	t.Helper()
	for i, pod := range pods {
		eventually(t, soon, "another proxy of pod "+pod.Name, func() error {
			if now := proxyOf(t, pod); now.pid == before[i].pid {
				return fmt.Errorf("it is %d still", now.pid)
			}
			return nil
		})
	}
}

// waitVersion waits until a node's agent is in touch with n proxies of the next version.
func waitVersion(t *testing.T, node *cluster.Node, n int) {
	t.Helper()
	want := fmt.Sprintf("\nweir_proxies{version=%q} %d\n", nextVersion, n)
	eventually(t, soon, "upgraded proxies on "+node.Name, func() error {
		_, metrics, err := askFrom(t.Context(), node.Machine, "http://127.0.0.1:15090/metrics")
		if err == nil && !strings.Contains(metrics, want) {
			err = fmt.Errorf("the metrics do not have %q", want)
		}
		return err
	})
}

// leavesOf are the certificates that the pods' proxies show.
func leavesOf(t *testing.T, pods []*corev1.Pod) []*x509.Certificate {
	t.Helper()
	var all []*x509.Certificate
	for _, pod := range pods {
		all = append(all, leafOf(t, pod))
	}
	return all
}

// leafOf is the certificate that a pod's proxy shows to whoever says hello as a proxy does.
func leafOf(t *testing.T, pod *corev1.Pod) *x509.Certificate {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	conn, err := bed.node(pod.Spec.NodeName).DialContext(ctx, "tcp", net.JoinHostPort(pod.Status.PodIP, "8080"))
	must(t, err)
	defer conn.Close()
	client := tls.Client(conn, &tls.Config{NextProtos: []string{mtls.Protocol}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
	must(t, client.HandshakeContext(ctx))
	return client.ConnectionState().PeerCertificates[0]
}

// sameLeaves fails the test if a proxy shows another certificate than the pod had.
func sameLeaves(t *testing.T, when string, pods []*corev1.Pod, before []*x509.Certificate) {
	t.Helper()
	for i, now := range leavesOf(t, pods) {
		if !now.Equal(before[i]) {
			t.Errorf("%s the certificate of %s is %x, until %s; it was %x, until %s", when, pods[i].Name,
				now.SerialNumber, now.NotAfter, before[i].SerialNumber, before[i].NotAfter)
		}
	}
}
