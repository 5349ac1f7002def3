package rotation

import (
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weirmesh/weir/agent/identity"
)

const (
	// ttl is that of the pods' certificates: each is renewed every 10 s, and a machine that
	// is busy has as long to do so.
	ttl = 20 * time.Second
	// patience is how long a CA may take to take over: it is looked for every 2.5 s,
	// announced, and signs 5 s later.
	patience = time.Minute
	// lookEvery is how often the agent's metrics are looked at.
	lookEvery = 200 * time.Millisecond
)

func TestNoRequestNoticesThatCertificatesAndCAsAreRotated(t *testing.T) {
	if node == nil {
		t.Skip("a node of one's own needs root")
	}
	defer func() {
		if t.Failed() {
			log := agent.Log()
			t.Logf("the end of the agent's log:\n%s", log[max(0, len(log)-4000):])
			t.Logf("the access log, of what failed:\n%s", accessLog.String())
		}
	}()
	load, err := startLoad(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	before := renewals(t)
	took := 0
	for n := 0; n < *rotations; {
		if took < *takeovers && n >= (took+1)**rotations/(*takeovers+1) {
			took++
			takeOver(t, took)
		}
		was := n
		if n = await(t, time.Minute, "certificates are renewed", func() (int, bool) {
			now := renewals(t) - before
			return now, now > was
		}); n*10 / *rotations > was*10 / *rotations {
			t.Logf("%d certificates renewed, %d CAs took over", n, took)
		}
	}
	said, err := load.stop()
	t.Logf("%d pods, %d certificates renewed, %d CAs took over: %s", len(ring), renewals(t)-before, took, said)
	if err != nil {
		t.Error(err)
	}
	if took < *takeovers {
		t.Errorf("%d CAs of %d took over", took, *takeovers)
	}
}

// takeOver gives the agent another CA, and waits until that signs.
func takeOver(t *testing.T, n int) {
	t.Helper()
	end, err := giveCA(n)
	if err != nil {
		t.Fatal(err)
	}
	await(t, patience, "the CA that was given signs", func() (int, bool) {
		return 0, metric(t, `weir_certificate_not_after_timestamp_seconds{kind="issuer"}`) == float64(end.Unix())
	})
}

// giveCA puts the operator's nth CA where the agent looks for it, and returns when it
// ends: none does so at the same time as another.
func giveCA(n int) (time.Time, error) {
	ca, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString("cluster.local"), time.Now(), 90*24*time.Hour+time.Duration(n)*time.Hour)
	if err != nil {
		return time.Time{}, err
	}
	certificate, key, err := ca.PEM()
	if err != nil {
		return time.Time{}, err
	}
	for name, content := range map[string][]byte{"tls.key": key, "tls.crt": certificate, "ca.crt": certificate} {
		if err := os.WriteFile(filepath.Join(issuerDir, name), content, 0o600); err != nil {
			return time.Time{}, err
		}
	}
	return ca.End(), nil
}

// await looks until it sees what is waited for, and returns what that is.
func await(t *testing.T, limit time.Duration, what string, look func() (int, bool)) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	for {
		if n, ok := look(); ok {
			return n
		}
		select {
		case <-ctx.Done():
			t.Fatalf("not after %s: %s", limit, what)
		case <-time.After(lookEvery):
		}
	}
}

func renewals(t *testing.T) int { return int(metric(t, "weir_certificate_renewals_total")) }

// metric is a metric of the agent's.
func metric(t *testing.T, name string) float64 {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:15090/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(body)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}
