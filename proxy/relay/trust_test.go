package relay

import (
	"bufio"
	"context"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/listen"
	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/mtls/mtlstest"
	"github.com/weirmesh/weir/proxy/route"
)

// believes is id where these CAs' roots are trusted, which are others than before.
func believes(id *mtls.Identity, cas ...*mtlstest.CA) *mtls.Identity {
	later := *id
	later.Roots = x509.NewCertPool()
	for _, ca := range cas {
		later.Roots.AddCert(ca.Cert)
	}
	later.Trust++
	return &later
}

// now has a proxy go by an identity from now on.
func (b *bench) now(id *mtls.Identity) {
	b.TLS.Source.(*mtlstest.Source).Set(id)
	b.Recheck()
}

// secure is a client's connection of another proxy, which shows an identity.
func secure(t *testing.T, f *far, id *mtls.Identity) *mtls.Conn {
	t.Helper()
	tcp, err := net.Dial("tcp", f.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tcp.Close() })
	c, err := (&mtls.Handshaker{}).Client(t.Context(), tcp.(*net.TCPConn), id, backID)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

// waitUntil returns once it is so.
func waitUntil(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// waitEmpty returns once no connection is open.
func (f *far) waitEmpty(t *testing.T) {
	t.Helper()
	waitUntil(t, "the connections are closed", func() bool {
		f.Server.mu.Lock()
		defer f.Server.mu.Unlock()
		return f.open == 0
	})
}

// TestWhatGoesOnWithAClientWhoseRootGoesEnds, where it may: beside it a client of the
// other CA goes on.
func TestWhatGoesOnWithAClientWhoseRootGoesEnds(t *testing.T) {
	older, newer := mtlstest.NewCA(t), mtlstest.NewCA(t)
	going := make(chan struct{}, 1)
	goOn := make(chan struct{})
	app := serving2(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			going <- struct{}{}
			<-goOn
		}
		_, _ = io.WriteString(w, "served")
	})
	own := believes(newer.Identity(backID, nil), older, newer)
	client := func(ca *mtlstest.CA) *mtls.Identity { return believes(ca.Identity(frontID, nil), newer) }
	rooted := func() (*far, func()) {
		f := newFar(t, own, route.Strict, app)
		return f, func() { f.now(believes(own, newer)) }
	}
	ask := func(c net.Conn, r *bufio.Reader) error {
		if _, err := io.WriteString(c, hello); err != nil {
			return err
		}
		resp, err := http.ReadResponse(r, nil)
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
		}
		return err
	}

	t.Run("HTTP/1, idle", func(t *testing.T) {
		f, change := rooted()
		gone, stays := secure(t, f, client(older)), secure(t, f, client(newer))
		goneR, staysR := bufio.NewReader(gone), bufio.NewReader(stays)
		if err := errors.Join(ask(gone, goneR), ask(stays, staysR)); err != nil {
			t.Fatal(err)
		}
		change()
		if _, err := goneR.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%v, want an end", err)
		}
		if err := ask(stays, staysR); err != nil {
			t.Errorf("whose root stays: %v", err)
		}
		stays.Close()
		for _, r := range f.ended(t) {
			if r.Reason != "" {
				t.Errorf("record %v", r)
			}
		}
	})

	t.Run("HTTP/1, with a request", func(t *testing.T) {
		f, change := rooted()
		gone := secure(t, f, client(older))
		_, _ = io.WriteString(gone, "GET /slow HTTP/1.1\r\nHost: back\r\n\r\n")
		<-going
		change()
		goOn <- struct{}{}
		r := bufio.NewReader(gone)
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != 200 || !resp.Close {
			t.Fatalf("%v, %v", resp, err)
		}
		if body, err := io.ReadAll(resp.Body); string(body) != "served" || err != nil {
			t.Errorf("%q, %v", body, err)
		}
		if _, err := r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("then %v, want an end", err)
		}
		gone.Close()
		f.ended(t)
	})

	t.Run("HTTP/2", func(t *testing.T) {
		f, change := rooted()
		dials := 0
		transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (net.Conn, error) {
			if dials++; dials > 1 {
				return nil, errors.New("a second connection")
			}
			return secure(t, f, client(older)), nil
		}}
		transport.Protocols.SetUnencryptedHTTP2(true)
		caller := &http.Client{Transport: transport}
		got := make(chan string, 1)
		go func() {
			resp, err := caller.Get("http://back/slow")
			if err != nil {
				got <- err.Error()
				return
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			got <- string(body)
		}()
		<-going
		change()
		waitUntil(t, "GOAWAY has come", func() bool {
			resp, err := caller.Get("http://back/")
			if err == nil {
				resp.Body.Close()
			}
			return err != nil
		})
		goOn <- struct{}{}
		if body := <-got; body != "served" {
			t.Errorf("what went on: %q", body)
		}
		transport.CloseIdleConnections()
		f.ended(t)
	})

	t.Run("before it has said what it speaks", func(t *testing.T) {
		f, change := rooted()
		gone := secure(t, f, client(older))
		waitUntil(t, "the connection is open", func() bool { return f.accepted.Load() == 1 })
		change()
		if err := ask(gone, bufio.NewReader(gone)); err == nil {
			t.Error("it was served")
		}
		gone.Close()
		if records := f.ended(t); len(records) != 1 || records[0].Reason != "cert_untrusted" {
			t.Errorf("records %v", records)
		}
	})

	t.Run("TCP", func(t *testing.T) {
		f := newFar(t, own, route.Strict, echoing(t))
		gone, stays := secure(t, f, client(older)), secure(t, f, client(newer))
		goneR, staysR := bufio.NewReader(gone), bufio.NewReader(stays)
		ping(t, gone, goneR)
		ping(t, stays, staysR)
		f.now(believes(own, newer))
		if _, err := goneR.ReadByte(); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%v, want a reset", err)
		}
		ping(t, stays, staysR)
		stays.Close()
		f.stop()
		var untrusted int
		for _, r := range f.ended(t) {
			if r.Reason == "cert_untrusted" {
				untrusted++
			}
		}
		if untrusted != 1 {
			t.Errorf("%d ended for it", untrusted)
		}
	})
}

// TestWhatGoesOnWithAnEndpointWhoseRootGoesEnds: no request fails, and no other one goes
// to it; what is not HTTP is reset.
func TestWhatGoesOnWithAnEndpointWhoseRootGoesEnds(t *testing.T) {
	older, newer := mtlstest.NewCA(t), mtlstest.NewCA(t)
	for _, c := range callers {
		t.Run(c.name, func(t *testing.T) {
			both := []*mtlstest.CA{older, newer}
			f := newFar(t, believes(older.Identity(backID, nil), both...), route.Strict, c.app(t))
			own := believes(newer.Identity(frontID, nil), both...)
			near := newNear(t, own, c.protocol, f.addr)
			var tcp *net.TCPConn
			if c.protocol == route.Opaque {
				tcp = near.conn(t, listen.Outbound, vip)
				ping(t, tcp, bufio.NewReader(tcp))
			} else if !c.call(t, near) {
				t.Fatal("not served")
			}
			near.now(believes(own, newer))
			if tcp != nil {
				if _, err := tcp.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("%v, want a reset", err)
				}
			}
			f.waitEmpty(t)
			if c.call(t, near) {
				t.Error("another request was served")
			}
			records, _ := over(t, near, f)
			want := []string{"", "cert_untrusted"}
			if tcp != nil {
				want[0] = "cert_untrusted"
			}
			if len(records) != 2 || records[0].Reason != want[0] || records[1].Reason != want[1] {
				t.Errorf("records %v, want %q", records, want)
			}
		})
	}
}

// TestTheNextRequestOfAClientGoesByTheRootsOfNow, whatever connection the one before it
// had: of a Service, and of a pod that is dialled; one that goes on is served.
func TestTheNextRequestOfAClientGoesByTheRootsOfNow(t *testing.T) {
	older, newer := mtlstest.NewCA(t), mtlstest.NewCA(t)
	going, goOn := make(chan struct{}), make(chan struct{})
	app := serving2(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			going <- struct{}{}
			<-goOn
		}
	})
	for _, protocol := range []route.Protocol{route.HTTP, route.HTTP2} {
		for _, direct := range []bool{false, true} {
			for _, how := range []struct{ goes, idle bool }{{false, false}, {true, false}, {false, true}, {true, true}} {
				f := newFar(t, believes(older.Identity(backID, nil), older, newer), route.Strict, app)
				own := newer.Identity(frontID, nil)
				near := newNear(t, believes(own, older, newer), protocol, f.addr)
				to := vip
				if direct {
					to = f.addr
					config := near.Config.(*fakeConfig)
					config.service, config.destination = to, route.Destination{Identity: backID, Protocol: protocol}
				}
				ask := func() func(path string) int {
					if protocol == route.HTTP2 {
						client := near.client2(t, listen.Outbound, to, 0)
						return func(path string) int {
							resp, _ := call(t, client, "GET", path, "")
							return resp.StatusCode
						}
					}
					client := near.conn(t, listen.Outbound, to)
					near.clients = append(near.clients, client)
					r := bufio.NewReader(client)
					return func(path string) int {
						resp, _ := say(t, client, r, "GET "+path+" HTTP/1.1\r\nHost: back\r\n\r\n", "GET")
						return resp.StatusCode
					}
				}()
				first := ask("/") // another one may be the poller's
				got := make(chan int, 1)
				if how.idle {
					got <- ask("/")
				} else {
					go func() { got <- ask("/slow") }()
					<-going
				}
				later := believes(own, newer)
				if !how.goes {
					later = believes(own, older, newer, mtlstest.NewCA(t))
				}
				later.Trust++
				near.now(later)
				if !how.idle {
					goOn <- struct{}{}
				}
				slow := <-got
				if !how.idle {
					f.waitEmpty(t)
				}
				next := ask("/")
				want := 200
				if how.goes {
					want = 503
				}
				if first != 200 || slow != 200 || next != want || f.accepted.Load() < 2 {
					t.Errorf("protocol %v, direct %v, %+v: %d, %d, then %d, of %d connections",
						protocol, direct, how, first, slow, next, f.accepted.Load())
				}
				over(t, near, f)
			}
		}
	}
}

// TestWhatGoesOnOutlivesOtherChanges: a root that comes, and a certificate that has
// expired meanwhile.
func TestWhatGoesOnOutlivesOtherChanges(t *testing.T) {
	ca := mtlstest.NewCA(t)
	own := ca.Identity(backID, nil)
	f := newFar(t, own, route.Strict, echoing(t))
	caller := ca.Identity(frontID, brief)
	c := secure(t, f, caller)
	r := bufio.NewReader(c)
	ping(t, c, r)
	waitUntil(t, "the certificate has expired", func() bool { return time.Now().After(caller.Certificate.Leaf.NotAfter) })
	f.now(believes(own, ca, mtlstest.NewCA(t)))
	ping(t, c, r)
	c.Close()
	f.ended(t)
}
