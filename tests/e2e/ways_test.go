package e2e

import (
	"context"
	"encoding/json"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/tests/e2e/app/report"
)

// served is the outcome of a call that was answered.
const served = "served"

// way is a protocol by which a pod can be called that runs serveAll.
type way struct {
	name    string
	refused string // outcome of a call that no policy allows
	reset   string // outcome of one in plaintext where mTLS is demanded
	// call calls a Service and says a word to it; the outcome is served, or in words what
	// else came.
	call func(t *testing.T, from *corev1.Pod, to, word string) string
}

// ways are all of them.
var ways = []way{
	{"HTTP", "403", "reset", overHTTP},
	{"gRPC", "7", "14", overGRPC},
	{"TCP", "reset", "reset", overTCP},
}

// serveAll is a pod that can be called in all ways.
func serveAll(name string) *corev1.Pod {
	return appPod(name, "serve", "-grpc", ":9001", "-echo", ":9000")
}

// serviceAll is the Service of such pods.
func serviceAll(t *testing.T, namespace, app string) *corev1.Service {
	t.Helper()
	return service(t, namespace, app, 8080, 9000, 9001)
}

func overHTTP(t *testing.T, from *corev1.Pod, to, word string) string {
	t.Helper()
	r := get(t, from, "http://"+to+":8080/"+word)[0]
	switch {
	case r.Error == "":
		return served
	case r.Status != 0:
		return strconv.Itoa(r.Status)
	}
	return outcomeOfBytes(r.Error)
}

func overGRPC(t *testing.T, from *corev1.Pod, to, word string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	out, err := begin(t, from, "call", "-word", word, to+":9001").wait(ctx)
	must(t, err)
	var answer report.Call
	must(t, json.Unmarshal([]byte(out), &answer))
	if answer.Code == 0 {
		return served
	}
	return strconv.Itoa(answer.Code)
}

func overTCP(t *testing.T, from *corev1.Pod, to, word string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	_, err := begin(t, from, "talk", "-n", "1", "-word", word, to+":9000").wait(ctx)
	return outcomeOfTalk(err)
}

func outcomeOfTalk(err error) string {
	if err == nil {
		return served
	}
	return outcomeOfBytes(err.Error())
}

// outcomeOfBytes is that of a connection that failed.
func outcomeOfBytes(failure string) string {
	if strings.Contains(failure, "connection reset by peer") {
		return "reset"
	}
	return failure
}

// outcomes are those of all ways, as "HTTP served, gRPC served, TCP served".
func outcomes(t *testing.T, from *corev1.Pod, to string) string {
	t.Helper()
	return outcomesOf(func(w way) string { return w.call(t, from, to, "word") })
}

// expectedOutcomes are those of a caller whom policies allow these ways alone.
func expectedOutcomes(allowed func(way string) bool) string {
	return outcomesOf(func(w way) string {
		if allowed(w.name) {
			return served
		}
		return w.refused
	})
}

// plaintextOutcomes are those of a caller in plaintext who may come by these ways alone.
func plaintextOutcomes(allowed func(way string) bool) string {
	return outcomesOf(func(w way) string {
		if allowed(w.name) {
			return served
		}
		return w.reset
	})
}

func outcomesOf(of func(way) string) string {
	var all []string
	for _, w := range ways {
		all = append(all, w.name+" "+of(w))
	}
	return strings.Join(all, ", ")
}
