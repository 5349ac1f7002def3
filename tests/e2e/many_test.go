package e2e

import (
	"fmt"
	"testing"
	"time"
)

// fiftyAtOnce takes one Deployment for all of them. How long it takes is said,
// not asserted: it depends on the machine.
func fiftyAtOnce(t *testing.T) {
	const many = 50
	ns := newNamespace(t, captured())
	began := time.Now()
	newDeployment(t, ns, "many", many, "sleep", "1h")
	pods := waitPods(t, ns, "many", many)
	took := time.Since(began)
	expectCaptured(t, pods...)

	users := map[string]string{}
	for _, pod := range pods {
		uid, err := uidOf(proxyOf(t, pod))
		must(t, err)
		// Nodes count for themselves.
		key := fmt.Sprintf("%s uid %d", pod.Spec.NodeName, uid)
		if other := users[key]; other != "" {
			t.Errorf("the proxies of %s and %s share %s", other, pod.Name, key)
		}
		users[key] = pod.Name
	}
	t.Logf("%d pods on %d nodes were running, captured, after %s", many, len(bed.Nodes), took.Round(100*time.Millisecond))
}
