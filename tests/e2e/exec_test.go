package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/weirmesh/weir/tests/e2e/app/report"
)

// command is a program under way in a pod's first container.
type command struct {
	what   string
	stdin  io.Closer
	done   chan error
	mu     sync.Mutex // guards both buffers
	stdout bytes.Buffer
	stderr bytes.Buffer
}

// lockedWriter lets one goroutine write what another reads meanwhile.
type lockedWriter struct {
	mu  *sync.Mutex
	out *bytes.Buffer
}

func (w lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out.Write(p)
}

// begin starts the test application in a pod, beside the one that runs there.
// The program's standard input ends with finish.
func begin(t *testing.T, pod *corev1.Pod, args ...string) *command {
	t.Helper()
	request := bed.kube.CoreV1().RESTClient().Post().Resource("pods").Namespace(pod.Namespace).Name(pod.Name).
		SubResource("exec").VersionedParams(&corev1.PodExecOptions{
		Container: pod.Spec.Containers[0].Name, Command: append([]string{"/app"}, args...),
		Stdin: true, Stdout: true, Stderr: true,
	}, scheme.ParameterCodec)
	executor, err := remotecommand.NewSPDYExecutor(bed.config, "POST", request.URL())
	must(t, err)
	in, stdin := io.Pipe()
	c := &command{what: fmt.Sprintf("app %s in pod %s", strings.Join(args, " "), pod.Name), stdin: stdin, done: make(chan error, 1)}
	ctx := t.Context()
	go func() {
		c.done <- executor.StreamWithContext(ctx, remotecommand.StreamOptions{
			Stdin: in, Stdout: lockedWriter{&c.mu, &c.stdout}, Stderr: lockedWriter{&c.mu, &c.stderr},
		})
	}()
	t.Cleanup(func() { stdin.Close() })
	return c
}

// finish ends the program's standard input, waits for it to end, and returns
// what it wrote.
func (c *command) finish(ctx context.Context) (string, error) {
	c.stdin.Close()
	return c.wait(ctx)
}

func (c *command) wait(ctx context.Context) (string, error) {
	select {
	case err := <-c.done:
		if err != nil {
			err = fmt.Errorf("%s: %w: %s", c.what, err, c.said(&c.stderr))
		}
		return c.said(&c.stdout), err
	case <-ctx.Done():
		return c.said(&c.stdout), fmt.Errorf("%s: %w", c.what, ctx.Err())
	}
}

func (c *command) said(out *bytes.Buffer) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return out.String()
}

// get asks from inside a pod, as `app get` does; failures are in the results.
func get(t *testing.T, pod *corev1.Pod, args ...string) []report.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	out, err := begin(t, pod, append([]string{"get"}, args...)...).wait(ctx)
	results := parseResults(t, out)
	if err != nil && len(results) == 0 {
		t.Fatal(err)
	}
	return results
}

// load is a loop of requests from inside a pod.
type load struct{ *command }

// beginLoad starts one request after the other, each on a connection of its own.
func beginLoad(t *testing.T, pod *corev1.Pod, url string) load {
	t.Helper()
	l := load{begin(t, pod, "get", "-n", "0", "-interval", "20ms", url)}
	l.waitFor(t, 1)
	return l
}

// waitFor waits until the loop has got n results more.
func (l load) waitFor(t *testing.T, n int) {
	t.Helper()
	had := strings.Count(l.said(&l.stdout), "\n")
	eventually(t, soon, "requests to go on: "+l.what, func() error {
		if now := strings.Count(l.said(&l.stdout), "\n"); now < had+n {
			return fmt.Errorf("%d of %d since", now-had, n)
		}
		return nil
	})
}

// end ends the loop and returns all results.
func (l load) end(t *testing.T) []report.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	out, err := l.finish(ctx)
	results := parseResults(t, out)
	if err != nil && len(failures(results)) == 0 {
		t.Fatal(err)
	}
	return results
}

func parseResults(t *testing.T, out string) []report.Result {
	t.Helper()
	var results []report.Result
	for lines := bufio.NewScanner(strings.NewReader(out)); lines.Scan(); {
		var r report.Result
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			t.Fatalf("the application printed %q: %v", lines.Text(), err)
		}
		results = append(results, r)
	}
	return results
}

// failures are the results that are errors, worded.
func failures(results []report.Result) []string {
	var out []string
	for _, r := range results {
		if r.Error != "" {
			out = append(out, fmt.Sprintf("%s after %s: %s", r.Start.Format(time.StampMilli), r.Took.Round(time.Millisecond), r.Error))
		}
	}
	return out
}

// allServed fails the test if any request failed, or there was none.
func allServed(t *testing.T, what string, results []report.Result) {
	t.Helper()
	if len(results) == 0 {
		t.Errorf("%s: there was no request", what)
	}
	if failed := failures(results); len(failed) > 0 {
		t.Errorf("%s: %d of %d requests failed:\n%s", what, len(failed), len(results), strings.Join(failed[:min(5, len(failed))], "\n"))
	}
}

// answeredBy counts the results by the pod that answered.
func answeredBy(results []report.Result) map[string]int {
	counts := map[string]int{}
	for _, r := range results {
		if r.Answer != nil {
			counts[r.Answer.Pod]++
		}
	}
	return counts
}

var errNoAnswer = errors.New("the test application did not answer")
