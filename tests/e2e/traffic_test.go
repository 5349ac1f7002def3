package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weirmesh/weir/agent/telemetry"
	"github.com/weirmesh/weir/tests/e2e/app/report"
)

// backs starts n pods behind one Service, on the nodes in turn, and returns them
// by name.
func backs(t *testing.T, namespace string, n int) map[string]*corev1.Pod {
	t.Helper()
	service(t, namespace, "back", 8080)
	var pods []*corev1.Pod
	for i := range n {
		pod := labelled(appPod(fmt.Sprintf("back-%d", i), "serve"), "app", "back")
		pods = append(pods, onNode(pod, i%len(bed.Nodes)))
	}
	byName := map[string]*corev1.Pod{}
	for _, pod := range startAll(t, namespace, pods...) {
		byName[pod.Name] = pod
	}
	return byName
}

// waitAnswers asks until all of pods answer, and nobody else, and no request
// fails: the news of endpoints take their time.
func waitAnswers(t *testing.T, from *corev1.Pod, url string, pods map[string]*corev1.Pod) {
	t.Helper()
	eventually(t, soon, fmt.Sprintf("answers of %d pods", len(pods)), func() error {
		results := get(t, from, "-n", "20", url)
		got := answeredBy(results)
		for name := range got {
			if pods[name] == nil {
				return fmt.Errorf("%s answered", name)
			}
		}
		if failed := failures(results); len(failed) > 0 || len(got) != len(pods) {
			return fmt.Errorf("answers came from %v, failures are %v", got, failed)
		}
		return nil
	})
}

// frontToBack asks from one pod on the first node: back has pods on that node
// and on the other.
func frontToBack(t *testing.T) {
	ns := newNamespace(t, captured())
	pods := backs(t, ns, 3)
	front := start(t, ns, onNode(appPod("front", "serve"), 0))
	networks := []string{"tcp4"}
	if len(front.Status.PodIPs) > 1 {
		networks = append(networks, "tcp6")
	}
	name := "back." + ns + ".svc.cluster.local"
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			url := "http://" + name + ":8080/"
			waitAnswers(t, front, url, pods)
			results := get(t, front, "-network", network, "-n", "60", url)
			allServed(t, "front to back", results)
			hops := followAll(t, results)
			balanced(t, results, pods)
			for i, h := range hops {
				agrees(t, h, results[i], ns, front, pods)
			}
			counted(t, front, "out_turned", len(results))
			counted(t, pods["back-0"], "in_turned", 1)
		})
	}
}

// counted fails the test unless the rule in the pod's network namespace that has
// that counter has turned n connections aside.
func counted(t *testing.T, pod *corev1.Pod, counter string, n int) {
	t.Helper()
	shown, err := sandboxOf(t, pod).rules()
	must(t, err)
	if got := shown.Counters[counter].Packets; got < uint64(n) {
		t.Errorf("the counter %s of pod %s is %d, want %d at least", counter, pod.Name, got, n)
	}
}

// balanced fails the test unless each pod had its share: with 60 requests to
// three, fewer than five at one of them come up once in some 80,000 runs of a
// fair draw.
func balanced(t *testing.T, results []report.Result, pods map[string]*corev1.Pod) {
	t.Helper()
	counts := answeredBy(results)
	for name := range pods {
		if counts[name] < 5 {
			t.Errorf("%s answered %d of %d requests: %v", name, counts[name], len(results), counts)
		}
	}
}

// agrees holds a request's records against what both applications say.
func agrees(t *testing.T, h hop, r report.Result, ns string, front *corev1.Pod, pods map[string]*corev1.Pod) {
	t.Helper()
	back := pods[r.Answer.Pod]
	if back == nil {
		t.Fatalf("pod %q answered, it is none of back's", r.Answer.Pod)
	}
	for _, c := range []struct{ what, got, want string }{
		{"the caller's proxy is of", h.out.Pod, ns + "/" + front.Name},
		{"the callee's proxy is of", h.in.Pod, ns + "/" + back.Name},
		{"the Service is", h.out.Service, ns + "/back"},
		{"the caller called", h.out.Server, r.Remote},
		{"the picked pod is", h.out.UpstreamPod, ns + "/" + back.Name},
		{"the callee was called at", h.in.Server, r.Answer.Local},
		{"reasons to fail are", h.out.Reason + h.in.Reason, ""},
	} {
		if c.got != c.want {
			t.Errorf("%s %q, want %q", c.what, c.got, c.want)
		}
	}
	host, _, err := net.SplitHostPort(h.in.Server)
	if err != nil || !hasAddress(back, host) {
		t.Errorf("the callee was called at %s, want an address of pod %s", h.in.Server, back.Name)
	}
}

func hasAddress(pod *corev1.Pod, address string) bool {
	for _, ip := range pod.Status.PodIPs {
		if ip.IP == address {
			return true
		}
	}
	return false
}

// throughIngress sends a user's requests from outside the cluster: to nginx by a
// node port, from there to front, from there to back.
func throughIngress(t *testing.T) {
	ns := newNamespace(t, captured())
	pods := backs(t, ns, 2)
	service(t, ns, "front", 8080)
	front := start(t, ns, appPod("front", "serve", "-next", "http://back:8080/"))

	nginx := appPod("ingress")
	nginx.Spec.Containers[0].Image = nginxImage
	svc := service(t, ns, "ingress", 8080)
	svc.Spec.Type = corev1.ServiceTypeNodePort
	svc, err := bed.kube.CoreV1().Services(ns).Update(t.Context(), svc, metav1.UpdateOptions{})
	must(t, err)
	ingress := start(t, ns, nginx)
	expectCaptured(t, ingress, front)

	address := net.JoinHostPort(bed.Nodes[0].Addrs[0].String(), fmt.Sprint(svc.Spec.Ports[0].NodePort))
	var last report.Result
	eventually(t, soon, "an answer through the ingress", func() error {
		last = askFromOutside(t.Context(), address)
		if last.Error != "" {
			return errors.New(last.Error)
		}
		return nil
	})
	for range 5 {
		r := askFromOutside(t.Context(), address)
		if r.Error != "" {
			t.Fatalf("a user's request failed: %s", r.Error)
		}
		wayThroughIngress(t, ns, r, pods)
	}
	// The control: nginx itself decides by host name.
	if r := askHostFromOutside(t.Context(), address, "other.example.com"); r.Status != http.StatusNotFound {
		t.Errorf("nginx answered another host with %d %s, want 404", r.Status, r.Error)
	}
}

// wayThroughIngress finds the five records of a user's request: ingress in and
// out, front in and out, back in.
func wayThroughIngress(t *testing.T, ns string, r report.Result, pods map[string]*corev1.Pod) {
	t.Helper()
	if r.Answer == nil || r.Answer.Pod != "front" || r.Answer.Host != "app.example.com" || r.Answer.Next == nil || r.Answer.Next.Answer == nil {
		t.Fatalf("the user was answered %+v, want front's answer with back's in it", r.Answer)
	}
	within := func(rec telemetry.Record) bool {
		return !rec.Timestamp.Before(r.Start.Add(-50*time.Millisecond)) && !rec.Timestamp.After(r.Start.Add(r.Took+50*time.Millisecond))
	}
	find := func(what, pod, direction string, by func(telemetry.Record) string, address string) telemetry.Record {
		return waitRecord(t, what, func(rec telemetry.Record) bool {
			return rec.Pod == ns+"/"+pod && rec.Direction == direction && by(rec) == address && within(rec)
		})
	}
	client := func(rec telemetry.Record) string { return rec.Client }
	local := func(rec telemetry.Record) string { return rec.UpstreamLocal }

	find("the user's connection", "ingress", "inbound", local, r.Header.Get("X-Ingress-Client"))
	frontIn := find("front being called", "front", "inbound", local, r.Answer.Client)
	out := find("nginx calling front", "ingress", "outbound", local, frontIn.Client)
	if out.Service != ns+"/front" || out.Upstream != frontIn.Server {
		t.Errorf("nginx called %s (%s), front was called at %s", out.Service, out.Upstream, frontIn.Server)
	}
	h := followAll(t, []report.Result{*r.Answer.Next})[0]
	if h.out.Client != r.Answer.Next.Local || client(h.out) == "" {
		t.Errorf("front called from %s, its proxy was called from %s", r.Answer.Next.Local, h.out.Client)
	}
	if pods[r.Answer.Next.Answer.Pod] == nil {
		t.Errorf("%s answered front, it is none of back's", r.Answer.Next.Answer.Pod)
	}
}

func askFromOutside(ctx context.Context, address string) report.Result {
	return askHostFromOutside(ctx, address, "app.example.com")
}

// askHostFromOutside sends one request from the machine that joins the nodes.
func askHostFromOutside(ctx context.Context, address, host string) report.Result {
	r := report.Result{URL: "http://" + address + "/", Start: time.Now()}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, r.URL, nil)
	if err != nil {
		r.Error = err.Error()
		return r
	}
	request.Host = host
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: bed.Fabric.DialContext, DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		r.Error = err.Error()
		return r
	}
	defer response.Body.Close()
	r.Took, r.Status, r.Header = time.Since(r.Start), response.StatusCode, response.Header
	if response.StatusCode != http.StatusOK {
		r.Error = response.Status
		return r
	}
	r.Answer = &report.Answer{}
	if err := json.NewDecoder(response.Body).Decode(r.Answer); err != nil {
		r.Error = err.Error()
	}
	return r
}
