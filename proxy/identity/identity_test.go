package identity

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/memfd"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/proxy/mtls"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const front = "spiffe://cluster.local/ns/shop/sa/front"

// ca signs as an agent's would.
type ca struct {
	*testing.T
	root *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA(t *testing.T) *ca {
	t.Helper()
	c := &ca{T: t}
	var err error
	if c.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, c.key.Public(), c.key)
	if err != nil {
		t.Fatal(err)
	}
	if c.root, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return c
}

// answer is what an agent says to a request.
func (c *ca) answer(m *proxypb.CertificateRequest, id string, life time.Duration) *proxypb.Certificate {
	c.Helper()
	request, err := x509.ParseCertificateRequest(m.GetRequest())
	if err != nil {
		c.Fatal(err)
	}
	if names := len(request.URIs) + len(request.DNSNames); names > 0 || request.CheckSignature() != nil {
		c.Errorf("a request with %d names, signature %v", names, request.CheckSignature())
	}
	uri, err := url.Parse(id)
	if err != nil {
		c.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(int64(m.GetNumber())), URIs: []*url.URL{uri}, NotBefore: time.Now().Add(-15 * time.Minute), NotAfter: time.Now().Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, c.root, request.PublicKey, c.key)
	if err != nil {
		c.Fatal(err)
	}
	return &proxypb.Certificate{Number: m.GetNumber(), Chain: [][]byte{der}, Roots: [][]byte{c.root.Raw}}
}

func trust(t *testing.T, id string, cas ...*ca) Trust {
	t.Helper()
	msg := &proxypb.Identity{Id: id, TrustDomain: "cluster.local"}
	for _, c := range cas {
		msg.Roots = append(msg.Roots, c.root.Raw)
	}
	out, err := ParseTrust(msg)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// holder is one that runs, and a session with it.
type holder struct {
	*testing.T
	*Holder
	session uint64
}

// run has a holder run until the test ends. It is for the bubbles of synctest.
func run(t *testing.T, h *Holder) *holder {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		h.Close()
	})
	h.Resume(1)
	return &holder{t, h, 1}
}

// next is the next message for the agent, once there is nothing left to do at this time.
func (h *holder) next() *proxypb.FromProxy {
	synctest.Wait()
	return h.Next(h.session)
}

func (h *holder) asks() *proxypb.CertificateRequest {
	h.Helper()
	m := h.next().GetCertificateRequest()
	if m == nil {
		h.Fatal("it asks for nothing")
	}
	return m
}

// asksFirst is asks, when nobody has waited and the first key is due.
func (h *holder) asksFirst() *proxypb.CertificateRequest {
	h.Helper()
	time.Sleep(maxFirst)
	return h.asks()
}

// asksWithin is asks, after a while.
func (h *holder) asksWithin(limit time.Duration) *proxypb.CertificateRequest {
	h.Helper()
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(time.Second) {
		if m := h.next().GetCertificateRequest(); m != nil {
			return m
		}
	}
	return h.asks()
}

func (h *holder) silent(why string) {
	h.Helper()
	if m := h.next(); m != nil {
		h.Fatalf("%s: it says %v", why, m)
	}
}

// has says that there is a certificate, as it was told.
func (h *holder) has() *held {
	h.Helper()
	s := h.good()
	if s == nil {
		h.Fatalf("there is no certificate: %v", h.missing())
	}
	if h.next().GetCertificateKept().GetNotAfterUnixNanos() != s.notAfter().UnixNano() {
		h.Fatal("the agent is not told that there is a memory file")
	}
	return s
}

func TestAKeyIsMadeOnceThePodIsKnownToHaveAnIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, h := newCA(t), run(t, New())
		h.silent("the agent has said nothing")
		h.Told(trust(t, front, c))
		m := h.asksFirst()
		h.silent("it has asked")
		if h.good() != nil {
			t.Fatal("a certificate before there is an answer")
		}
		h.Answered(c.answer(m, front, 24*time.Hour))
		s := h.has()
		if s.ID.String() != front || s.TrustDomain != "cluster.local" || time.Until(s.notAfter()) > 24*time.Hour || s.Certificate.Leaf == nil {
			t.Errorf("%+v", s)
		}
		h.silent("it has what it wants")
	})
}

// TestTheFirstKeyIsMadeAfterAPause: other pods may be on their way at the same time, and
// those that came together do not ask together.
func TestTheFirstKeyIsMadeAfterAPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, moments := newCA(t), map[time.Duration]bool{}
		var all []*holder
		for range 20 {
			h := run(t, New())
			h.Told(trust(t, front, c))
			all = append(all, h)
		}
		began := time.Now()
		time.Sleep(minFirst - time.Millisecond)
		for _, h := range all {
			h.silent("it is early")
			h.Told(trust(t, front, c, newCA(t))) // which begins no other pause
		}
		for len(all) > 0 && time.Since(began) < maxFirst {
			time.Sleep(time.Millisecond)
			synctest.Wait()
			all = slices.DeleteFunc(all, func(h *holder) bool {
				asks := h.Next(h.session) != nil
				if asks {
					moments[time.Since(began)] = true
				}
				return asks
			})
		}
		if len(all) > 0 || len(moments) < 10 {
			t.Errorf("%d have not asked, the others at %d moments", len(all), len(moments))
		}
	})
}

// TestWhoWaitsEndsThePause: before the pod's ID is known, during the pause, and as it ends.
func TestWhoWaitsEndsThePause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCA(t)
		wait := func(h *holder) <-chan error {
			waited := make(chan error, 1)
			go func() {
				_, err := h.Wait(t.Context())
				waited <- err
			}()
			return waited
		}
		answered := func(h *holder, waited <-chan error) {
			t.Helper()
			h.Answered(c.answer(h.asks(), front, time.Hour))
			if err := <-waited; err != nil {
				t.Error(err)
			}
			h.has()
			time.Sleep(maxFirst)
			h.silent("it has what it wants")
		}

		before := run(t, New())
		waited := wait(before)
		before.silent("the agent has said nothing")
		before.Told(trust(t, front, c))
		answered(before, waited)

		during := run(t, New())
		during.Told(trust(t, front, c))
		time.Sleep(minFirst / 2)
		during.silent("nobody waits")
		waited = wait(during)
		answered(during, waited)

		for range 20 {
			both := run(t, New())
			both.Told(trust(t, front, c))
			both.mu.Lock()
			end := both.first
			both.mu.Unlock()
			time.Sleep(time.Until(end))
			answered(both, wait(both))
		}
	})
}

func TestAPodWithoutAnIdentityAsksForNothingAndNobodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := run(t, New())
		h.Told(trust(t, ""))
		began := time.Now()
		if _, err := h.Wait(t.Context()); !errors.Is(err, ErrNone) || time.Since(began) > 0 {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		time.Sleep(1000 * time.Hour)
		h.silent("it has no identity")
	})
}

func TestWaitingEndsWithTheCertificateOrSaysWhatThereIsNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, h := newCA(t), run(t, New())
		wait := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			_, err := h.Wait(ctx)
			return err
		}
		missing := func(want string) {
			t.Helper()
			var e *MissingError
			if err := wait(); !errors.As(err, &e) || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %s", err, want)
			}
		}
		missing("the agent has not been heard of")
		h.Told(trust(t, front, c))
		m := h.asks()
		missing("asked for 5s ago")
		waited := make(chan error, 1)
		go func() { waited <- wait() }()
		time.Sleep(time.Second)
		h.Answered(c.answer(m, front, time.Hour))
		if err := <-waited; err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Hour)
		missing("the certificate expired at ")
	})
}

func TestACertificateIsRenewedAtHalfOfItsLifeWithAnotherKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, h := newCA(t), run(t, New())
		h.Told(trust(t, front, c))
		h.Answered(c.answer(h.asksFirst(), front, 24*time.Hour))
		before := h.has()
		time.Sleep(9*time.Hour + 30*time.Minute)
		h.silent("before two fifths of its life")
		m := h.asksWithin(5 * time.Hour)
		if h.good() != before {
			t.Error("another one before there is an answer")
		}
		h.Answered(c.answer(m, front, 24*time.Hour))
		after := h.has()
		if after == before || before.Certificate.PrivateKey.(*ecdsa.PrivateKey).Equal(after.Certificate.PrivateKey) {
			t.Error("the key is the same")
		}
	})
}

func TestWhatCannotBeRenewedIsKeptUntilItExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, h := newCA(t), run(t, New())
		h.Told(trust(t, front, c))
		h.Answered(c.answer(h.asksFirst(), front, 24*time.Hour))
		s := h.has()
		asked := 0
		for begin := time.Now(); time.Since(begin) < 25*time.Hour; time.Sleep(time.Second) {
			if m := h.next().GetCertificateRequest(); m != nil {
				asked++
				h.Answered(&proxypb.Certificate{Number: m.GetNumber(), Error: "the API server is away"})
			}
			if good := time.Now().Before(s.notAfter()); good != (h.good() == s) {
				t.Fatalf("it is good: %v, and kept: %v", good, !good)
			}
		}
		// 13 hours, at 4 to 6 minutes, and some in the beginning.
		if asked < 100 || asked > 220 {
			t.Errorf("asked %d times", asked)
		}
		if missing := h.missing(); !strings.Contains(missing.Error(), "the API server is away") {
			t.Error(missing)
		}
	})
}

func TestTheAgentMaySayWhenItIsWorthAskingAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, h := newCA(t), run(t, New())
		h.Told(trust(t, front, c))
		h.Answered(&proxypb.Certificate{Number: h.asksFirst().GetNumber(), Error: "denied", RetryAfter: int64(20 * time.Minute)})
		time.Sleep(15 * time.Minute)
		h.silent("it is not worth it")
		h.asksWithin(10 * time.Minute)
	})
}

func TestARequestIsSaidAgainInAnotherSessionAndGivenUpInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, h := newCA(t), run(t, New())
		h.Told(trust(t, front, c))
		first := h.asksFirst()
		old := h.session
		h.session++
		h.Resume(h.session)
		if h.Next(old) != nil {
			t.Error("an old session is told")
		}
		if again := h.asks(); again.GetNumber() != first.GetNumber() {
			t.Error("another request")
		}
		second := h.asksWithin(answerTimeout + 2*minBackoff)
		h.Answered(c.answer(first, front, time.Hour))
		if h.good() != nil {
			t.Error("an answer to a request that was given up counts")
		}
		h.Answered(c.answer(second, front, time.Hour))
		h.has()
	})
}

func TestAnAnswerThatDoesNotFitIsNotTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, other := newCA(t), newCA(t)
		h := run(t, New())
		h.Told(trust(t, front, c))
		strange := c.answer(h.asksFirst(), front, time.Hour)
		for name, spoil := range map[string]func(*proxypb.CertificateRequest) *proxypb.Certificate{
			"no certificate": func(*proxypb.CertificateRequest) *proxypb.Certificate { return &proxypb.Certificate{} },
			"another's":      func(m *proxypb.CertificateRequest) *proxypb.Certificate { return c.answer(m, front+"-2", time.Hour) },
			"another key":    func(*proxypb.CertificateRequest) *proxypb.Certificate { return strange },
			"expired":        func(m *proxypb.CertificateRequest) *proxypb.Certificate { return c.answer(m, front, -time.Second) },
			"another root": func(m *proxypb.CertificateRequest) *proxypb.Certificate {
				a := c.answer(m, front, time.Hour)
				a.Roots = [][]byte{other.root.Raw}
				return a
			},
			"no root": func(m *proxypb.CertificateRequest) *proxypb.Certificate {
				a := c.answer(m, front, time.Hour)
				a.Roots = nil
				return a
			},
			"nonsense": func(*proxypb.CertificateRequest) *proxypb.Certificate {
				return &proxypb.Certificate{Chain: [][]byte{{1, 2, 3}}, Roots: [][]byte{c.root.Raw}}
			},
		} {
			m := h.asksWithin(2 * maxBackoff)
			a := spoil(m)
			a.Number = m.GetNumber()
			h.Answered(a)
			synctest.Wait()
			if h.good() != nil || h.missing().Cause == "" {
				t.Errorf("%s: taken", name)
			}
		}
	})
}

func TestRootsMayChangeByThemselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, next := newCA(t), newCA(t)
		h := run(t, New())
		h.Told(trust(t, front, c))
		h.Answered(c.answer(h.asksFirst(), front, time.Hour))
		before := h.has()
		h.Told(trust(t, front, c))
		if h.good() != before {
			t.Error("nothing has changed, and there is another identity")
		}
		h.Told(trust(t, front, c, next))
		after := h.has() // and another memory file
		if after == before || !after.Certificate.PrivateKey.(*ecdsa.PrivateKey).Equal(before.Certificate.PrivateKey) || len(after.roots) != 2 {
			t.Errorf("%d roots", len(after.roots))
		}
		h.silent("its certificate is good still")
		h.Told(trust(t, front, next))
		h.Answered(next.answer(h.asks(), front, time.Hour)) // nobody believes the old one
	})
}

// TestHandshakesSeeWhatThereIs: of other roots by another number, and an identity that
// has expired as such, which they say at once.
func TestHandshakesSeeWhatThereIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, next := newCA(t), newCA(t)
		h := run(t, New())
		var source mtls.Source = h.Holder
		if source.Current() != nil {
			t.Error("an identity before there is one")
		}
		h.Told(trust(t, front, c))
		h.Answered(c.answer(h.asksFirst(), front, time.Hour))
		first, err := source.Wait(t.Context())
		if err != nil || first != source.Current() || first.Certificate.Leaf != h.has().Certificate.Leaf || first.TrustDomain != "cluster.local" {
			t.Errorf("%+v, %v", first, err)
		}
		h.Answered(c.answer(h.asksWithin(40*time.Minute), front, time.Hour))
		second := source.Current()
		if second == first || second.Trust != first.Trust {
			t.Errorf("renewed: roots %d after %d", second.Trust, first.Trust)
		}
		h.has()
		h.Told(trust(t, front, c, next))
		if third := source.Current(); third.Trust == first.Trust || third.Certificate.Leaf != second.Certificate.Leaf {
			t.Errorf("another root: roots %d after %d", third.Trust, first.Trust)
		}
		time.Sleep(2 * time.Hour)
		if expired := source.Current(); expired == nil || h.good() != nil {
			t.Error("expired")
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := source.Wait(ctx); err == nil {
			t.Error("an identity that has expired was waited for")
		}
	})
}

func TestAnotherIDNeedsAnotherCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, h := newCA(t), run(t, New())
		h.Told(trust(t, front, c))
		h.Answered(c.answer(h.asksFirst(), front, time.Hour))
		h.has()
		const moved = "spiffe://example.org/ns/shop/sa/front"
		h.Told(trust(t, moved, c))
		h.Answered(c.answer(h.asks(), moved, time.Hour))
		if s := h.has(); s.ID.String() != moved {
			t.Errorf("it is %s", s.ID)
		}
	})
}

func TestTheNextProxyHasTheIdentityOfTheOneBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, h := newCA(t), run(t, New())
		h.Told(trust(t, front, c))
		h.Answered(c.answer(h.asksFirst(), front, 24*time.Hour))
		s := h.has()
		time.Sleep(8 * time.Hour)
		next := New()
		if err := next.Adopt(handed(t, h.Holder)); err != nil {
			t.Fatal(err)
		}
		n := run(t, next)
		got := n.has()
		if got.ID != s.ID || got.TrustDomain != s.TrustDomain || !got.notAfter().Equal(s.notAfter()) || !bytes.Equal(got.Certificate.Certificate[0], s.Certificate.Certificate[0]) ||
			!got.Roots.Equal(s.Roots) || !got.received.Equal(s.received) {
			t.Errorf("%+v, want %+v", got, s)
		}
		n.Told(trust(t, front, c))
		n.silent("it has what it wants")
		n.asksWithin(6*time.Hour + 30*time.Minute) // at half of its life, not of what was left
	})
}

// handed is a copy of a holder's memory file.
func handed(t *testing.T, h *Holder) int {
	t.Helper()
	fd := -1
	err := h.Handover(func(file int) error {
		var err error
		fd, err = unix.FcntlInt(uintptr(file), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func TestAMemoryFileIsSealedWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, h := newCA(t), run(t, New())
		h.Told(trust(t, front, c))
		h.Answered(c.answer(h.asksFirst(), front, time.Hour))
		fd := handed(t, h.Holder)
		defer unix.Close(fd)
		if _, err := unix.Write(fd, []byte("x")); !errors.Is(err, unix.EPERM) {
			t.Errorf("write: %v", err)
		}
		if err := unix.Ftruncate(fd, 0); !errors.Is(err, unix.EPERM) {
			t.Errorf("truncate: %v", err)
		}
		if _, err := unix.Mmap(fd, 0, 1, unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EPERM) {
			t.Errorf("map for writing: %v", err)
		}
	})
}

func TestAMemoryFileThatIsNotGoodIsNotTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, h := newCA(t), run(t, New())
		h.Told(trust(t, front, c))
		h.Answered(c.answer(h.asksFirst(), front, time.Hour))
		good, err := encode(h.good())
		if err != nil {
			t.Fatal(err)
		}
		file := func(document []byte, sealed bool) int {
			fd, err := memfd.Create("weir-identity", memfd.Data)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := unix.Write(fd, document); err != nil {
				t.Fatal(err)
			}
			if !sealed {
				return fd
			}
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
				t.Fatal(err)
			}
			return fd
		}
		pipe := make([]int, 2)
		if err := unix.Pipe2(pipe, unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(pipe[1])
		for _, c := range []struct {
			name string
			fd   int
			want string
		}{
			{"not sealed", file(good, false), "not sealed"},
			{"no memory file", pipe[0], "invalid argument"},
			{"empty", file(nil, true), "there is no key"},
			{"cut", file(good[:len(good)/3], true), "there is no"},
			{"without a certificate", file(bytes.Replace(good, []byte("CERTIFICATE"), []byte("SOMETHING"), 2), true), "there is no certificate"},
		} {
			next := New()
			if err := next.Adopt(c.fd); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v, want %s", c.name, err, c.want)
			}
			if next.good() != nil || next.file >= 0 {
				t.Errorf("%s: taken", c.name)
			}
		}
		time.Sleep(2 * time.Hour)
		if err := New().Adopt(file(good, true)); err == nil || !strings.Contains(err.Error(), "expired") {
			t.Errorf("expired: %v", err)
		}
	})
}

func FuzzMemoryFile(f *testing.F) {
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nReceived: 2026-03-01T12:00:00Z\n\nAAAA\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(_ *testing.T, document []byte) {
		_, _ = decode(document) // does not panic
	})
}

func TestTrustIsAllOrNothing(t *testing.T) {
	for name, msg := range map[string]*proxypb.Identity{
		"no trust domain": {Id: front, Roots: [][]byte{newCA(t).root.Raw}},
		"no root":         {Id: front, TrustDomain: "cluster.local"},
		"nonsense":        {Id: front, TrustDomain: "cluster.local", Roots: [][]byte{{1}}},
	} {
		if _, err := ParseTrust(msg); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}
