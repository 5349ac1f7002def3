package environments

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/tests/pod"
)

// ends are when certificates expire, as the agent's metrics say, by their kind.
func ends() (map[string]time.Time, error) {
	metrics, err := get("http://127.0.0.1:15090/metrics")
	if err != nil {
		return nil, err
	}
	out := map[string]time.Time{}
	line := regexp.MustCompile(`(?m)^weir_certificate_not_after_timestamp_seconds{kind="(\w+)"} (\S+)$`)
	for _, m := range line.FindAllStringSubmatch(metrics, -1) {
		seconds, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return nil, err
		}
		out[m[1]] = time.Unix(int64(seconds), 0)
	}
	return out, nil
}

// TestAPodHasACertificateWithoutACluster: for a day, by a CA in the agent's folder that
// outlives the agent.
func TestAPodHasACertificateWithoutACluster(t *testing.T) {
	onNode(t)
	agent := agentOf(t, programs)
	client := start(t, chained(t), "certified", nil)
	if err := node.Write(client.Name+".yaml", client.Running(nil)); err != nil {
		t.Fatal(err)
	}
	certified := func() map[string]time.Time {
		t.Helper()
		var found map[string]time.Time
		eventually(t, 10*time.Second, "the pod's certificate", func() error {
			var err error
			if found, err = ends(); err == nil && len(found) != 3 {
				err = fmt.Errorf("the metrics have %v", found)
			}
			return err
		})
		return found
	}
	first := certified()
	if left := time.Until(first["leaf"]); left > 24*time.Hour || left < 23*time.Hour {
		t.Errorf("the certificate is good for %s", left)
	}
	if info, err := os.Stat(pod.NodeDir + "/weir/ca.json"); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the CA's file: %v, %v", info, err)
	}
	if err := agent.End(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	agentOf(t, programs)
	second := certified()
	for kind, end := range first {
		if !second[kind].Equal(end) {
			t.Errorf("the %s ended at %s before the agent was started again, and now at %s", kind, end, second[kind])
		}
	}
}
