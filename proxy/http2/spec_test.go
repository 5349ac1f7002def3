package http2_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"
)

// h2spec, in its strict mode, finds nothing to say against a relayed backend. (Of
// net/http's server by itself it finds five cases.)
func TestSpecification(t *testing.T) {
	backend := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = fmt.Fprint(w, "an answer long enough to be cut into pieces")
	})
	r := newRelay(t, backend, nil)
	host, port, err := net.SplitHostPort(r.addr)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "tool", "h2spec", "--strict", "-o", "10", "-h", host, "-p", port)
	cmd.Dir = "../../.ci/h2spec"
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "146 passed") {
		t.Errorf("%v\n%s", err, out)
	}
}
