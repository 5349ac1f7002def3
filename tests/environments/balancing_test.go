package environments

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/plugin/capture/nstest"
	"github.com/weirmesh/weir/tests/pod"
)

// TestConnectTimeBalancingIsReported: by an event and a metric where it is, and by
// neither where it is not.
func TestConnectTimeBalancingIsReported(t *testing.T) {
	onNode(t)
	service := pod.Service{Namespace: "default", Name: "kubernetes", Port: 443, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")}}
	backend := &pod.Pod{Addresses: []netip.Addr{netip.MustParseAddr("10.0.7.9")}}
	if err := node.Write("kubernetes.yaml", append(service.Slices(6443, backend), service.Manifest())...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Write("kubernetes.yaml"); err != nil {
			t.Error(err)
		}
	})
	for _, balanced := range []bool{false, true} {
		t.Run(fmt.Sprint(balanced), func(t *testing.T) {
			pods := nstest.NewCgroup(t)
			want := `weir_connect_time_balancing{family="ipv4"} 0`
			if balanced {
				nstest.RewriteConnects(t, pods.Dir, netip.MustParseAddrPort("10.96.0.1:443"), netip.MustParseAddrPort("10.0.7.9:6443"))
				want = `weir_connect_time_balancing{family="ipv4"} 1`
			}
			agent := agentOf(t, programs, "--pods-cgroup", pods.Bypass.Path)
			eventually(t, 5*time.Second, "the metric", func() error {
				metrics, err := get("http://127.0.0.1:15090/metrics")
				if err == nil && !strings.Contains(metrics, want) {
					err = errors.New("it is not there: " + want)
				}
				return err
			})
			log := agent.Log()
			if said := strings.Contains(log, "reason=ConnectTimeBalancing") && strings.Contains(log, "socketLB.hostNamespaceOnly=true"); said != balanced {
				t.Errorf("there was an event: %v, want %v", said, balanced)
			}
		})
	}
}

func get(url string) (string, error) {
	client := http.Client{Timeout: time.Second}
	defer client.CloseIdleConnections()
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return string(text), err
}
