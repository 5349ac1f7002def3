package http2_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/proxy/http2"
)

// Bodies arrive as they were sent, both ways at once, whatever their size, and are
// counted.
func TestBodies(t *testing.T) {
	backend := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength >= 0 {
			w.Header().Set("content-length", fmt.Sprint(r.ContentLength))
		}
		w.WriteHeader(http.StatusCreated)
		_, _ = io.Copy(w, r.Body)
	})
	r := newRelay(t, backend, nil)
	client := httpClient(t)
	for _, size := range []int{0, 1, 64<<10 - 1, 64 << 10, 64<<10 + 1, 20 << 20} {
		for _, declared := range []bool{true, false} {
			t.Run(fmt.Sprintf("%d bytes, declared %v", size, declared), func(t *testing.T) {
				body := make([]byte, size)
				_, _ = rand.NewChaCha8([32]byte{1}).Read(body)
				var sent io.Reader = bytes.NewReader(body)
				if !declared {
					sent = io.MultiReader(sent)
				}
				resp, err := client.Post("http://"+r.addr+"/echo", "application/octet-stream", sent)
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				got, err := io.ReadAll(resp.Body)
				if err != nil {
					t.Fatal(err)
				}
				if sha256.Sum256(got) != sha256.Sum256(body) || resp.StatusCode != http.StatusCreated {
					t.Errorf("status %d and %d bytes came back", resp.StatusCode, len(got))
				}
				want := http2.Outcome{Status: 201, Received: uint64(size), Sent: uint64(size)}
				if diff := cmp.Diff(want, r.outcome(t)); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
}

// Header fields, informational answers and trailers go through as they are.
func TestHeadersInformationTrailers(t *testing.T) {
	backend := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("link", "</a.css>")
		w.WriteHeader(http.StatusEarlyHints)
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("trailer", "x-sum")
		w.Header().Set("x-method", r.Method+" "+r.Host+" "+r.URL.String())
		w.Header()["x-got"] = append(r.Header["X-Two"], r.Trailer.Get("x-end"))
		_, _ = io.WriteString(w, "body")
		w.Header().Set("x-sum", "42")
	})
	r := newRelay(t, backend, nil)
	var hints []string
	ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{
		Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			hints = append(hints, fmt.Sprint(code, h.Get("link")))
			return nil
		},
	})
	req, err := http.NewRequestWithContext(ctx, "PUT", "http://"+r.addr+"/a%2Fb?q=1", strings.NewReader("request"))
	if err != nil {
		t.Fatal(err)
	}
	req.ContentLength = -1
	req.Host = "shop.example"
	req.Header["X-Two"] = []string{"1", "2"}
	req.Trailer = http.Header{"X-End": {"over"}}
	resp, err := httpClient(t).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	got := []string{
		string(body), resp.Header.Get("x-method"), strings.Join(resp.Header["X-Got"], ","),
		resp.Trailer.Get("x-sum"), strings.Join(hints, ","),
	}
	want := []string{"body", "PUT shop.example /a%2Fb?q=1", "1,2,over", "42", "103</a.css>"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// A header block that fills several frames goes through, in both directions.
func TestLargeHeaders(t *testing.T) {
	backend := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		for i := range 10 {
			w.Header().Set(fmt.Sprintf("x-%d", i), r.Header.Get(fmt.Sprintf("x-%d", i)))
		}
	})
	r := newRelay(t, backend, nil)
	req, err := http.NewRequest("GET", "http://"+r.addr, nil)
	if err != nil {
		t.Fatal(err)
	}
	value := strings.Repeat("!", 5000) // not shorter when compressed
	for i := range 10 {
		req.Header.Set(fmt.Sprintf("x-%d", i), value)
	}
	resp, err := httpClient(t).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	for i := range 10 {
		if resp.Header.Get(fmt.Sprintf("x-%d", i)) != value {
			t.Errorf("x-%d has %d bytes", i, len(resp.Header.Get(fmt.Sprintf("x-%d", i))))
		}
	}
}

// Many clients' streams share one upstream connection.
func TestManyStreamsOneConnection(t *testing.T) {
	var mu sync.Mutex
	from := make(map[string]int)
	backend := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		from[r.RemoteAddr]++
		mu.Unlock()
		time.Sleep(time.Millisecond)
		_, _ = io.WriteString(w, r.URL.Path)
	})
	r := newRelay(t, backend, nil)
	var done sync.WaitGroup
	for i := range 4 {
		client := httpClient(t)
		for j := range 20 {
			done.Go(func() {
				for k := range 25 {
					path := fmt.Sprintf("/%d/%d/%d", i, j, k)
					if code, body := get(t, client, "http://"+r.addr+path); code != 200 || body != path {
						t.Errorf("%s: %d %s", path, code, body)
					}
				}
			})
		}
	}
	done.Wait()
	if len(from) != 1 {
		t.Errorf("upstream connections: %v", from)
	}
}
