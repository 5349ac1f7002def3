package issue

import (
	"context"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/identity/identitytest"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/push"
)

var _ push.Issuer = (*Local)(nil)

var domain = spiffeid.RequireTrustDomainFromString("cluster.local")

// pods are those of a node: front, whose UID is u1, and a static one.
func pods(namespace, name, uid string) (model.Pod, bool) {
	pod := model.Pod{Namespace: "shop", Name: name, UID: "u1", ServiceAccount: "front"}
	if name == "static" {
		pod.ServiceAccount, pod.MirrorHash = "", "u1"
	}
	return pod, namespace == "shop" && (name == "front" || name == "static") && pod.HasUID(uid)
}

func options(t *testing.T) Options {
	return Options{Path: filepath.Join(t.TempDir(), "ca.json"), TrustDomain: domain, Pod: pods, Log: slog.New(slog.DiscardHandler)}
}

func open(t *testing.T, o Options) *Local {
	t.Helper()
	l, err := OpenLocal(o)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func attached(name, uid string) launch.Attachment {
	return launch.Attachment{PodNamespace: "shop", PodName: name, PodUID: uid}
}

func request(t *testing.T, names ...string) []byte {
	t.Helper()
	return identitytest.Request(t, identitytest.Key(t, elliptic.P256()), x509.CertificateRequest{URIs: identitytest.URIs(names...)})
}

func TestAPodGetsItsOwnCertificateAndNoOther(t *testing.T) {
	l := open(t, options(t))
	const front = "spiffe://cluster.local/ns/shop/sa/front"
	for _, c := range []struct {
		name string
		a    launch.Attachment
		asks []string
		id   string // "" for nobody
		want string // part of the error, "" for none
	}{
		{"a pod", attached("front", "u1"), nil, front, ""},
		{"that says who it is", attached("front", "u1"), []string{front}, front, ""},
		{"that says it is another", attached("front", "u1"), []string{"spiffe://cluster.local/ns/shop/sa/back"}, front, "another identity"},
		{"one before of the same name", attached("front", "u0"), nil, "", "not known any more"},
		{"one that is not there", attached("back", "u2"), nil, "", "not known any more"},
		{"a static pod", attached("static", "u1"), nil, "", "no service account"},
		{"nobody knows yet of which pod it is", launch.Attachment{ContainerID: "c1"}, nil, "", "no service account"},
	} {
		t.Run(c.name, func(t *testing.T) {
			told := l.Identity(c.a)
			if told.GetId() != c.id || told.GetTrustDomain() != "cluster.local" || len(told.GetRoots()) != 1 {
				t.Errorf("told %v", told)
			}
			chain, err := l.Issue(t.Context(), c.a, request(t, c.asks...))
			if c.want != "" {
				var refused *push.RefusedError
				if !errors.As(err, &refused) || !strings.Contains(err.Error(), c.want) {
					t.Errorf("got %v, want %s", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			leaf, err := x509.ParseCertificate(chain[0])
			if err != nil || leaf.URIs[0].String() != c.id {
				t.Errorf("%v, %v", leaf.URIs, err)
			}
		})
	}
}

func TestTheCASurvivesTheAgent(t *testing.T) {
	o := options(t)
	first := open(t, o)
	info, err := os.Stat(o.Path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if second := open(t, o); !second.keyring().Equal(first.keyring()) {
		t.Error("another CA")
	}
}

func TestACAThatIsOfNoUseIsSetAside(t *testing.T) {
	for name, spoil := range map[string]func(*testing.T, *Options){
		"corrupt": func(t *testing.T, o *Options) {
			if err := os.WriteFile(o.Path, []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"another trust domain": func(_ *testing.T, o *Options) {
			o.TrustDomain = spiffeid.RequireTrustDomainFromString("example.org")
		},
		"expired": func(t *testing.T, o *Options) {
			a, err := identity.NewAuthority(domain, time.Now().Add(-time.Hour), time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			document, err := identity.NewKeyring(a).Encode()
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(o.Path, document, 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := options(t)
			first := open(t, o)
			spoil(t, &o)
			second := open(t, o)
			if second.keyring().Equal(first.keyring()) {
				t.Error("the same CA")
			}
			if _, err := os.Stat(o.Path + ".bad"); err != nil {
				t.Error(err)
			}
		})
	}
	o := options(t)
	o.Path = filepath.Join(o.Path, "nowhere", "ca.json")
	if _, err := OpenLocal(o); err == nil {
		t.Error("it is not written down, and that is no error")
	}
}

// TestCAsTakeOverFromEachOther: with everybody told each time, and without a certificate
// that is not below a root that was known before.
func TestCAsTakeOverFromEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := options(t)
		o.Lifetime, o.TTL = 4*24*time.Hour, time.Hour
		l := open(t, o)
		ctx, cancel := context.WithCancel(t.Context())
		known, changes, signers := l.Identity(attached("front", "u1")).GetRoots(), 0, map[string]bool{}
		done := make(chan struct{})
		go func() {
			defer close(done)
			l.Run(ctx, func() bool { return true }, func() { changes++ })
		}()
		for range 9 * 24 * 12 {
			time.Sleep(5 * time.Minute)
			synctest.Wait()
			chain, err := l.Issue(ctx, attached("front", "u1"), request(t))
			if err != nil {
				t.Fatal(err)
			}
			pool := x509.NewCertPool()
			for _, der := range known {
				root, err := x509.ParseCertificate(der)
				if err != nil {
					t.Fatal(err)
				}
				pool.AddCert(root)
			}
			leaf, err := x509.ParseCertificate(chain[0])
			if err != nil {
				t.Fatal(err)
			}
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: time.Now()}); err != nil {
				t.Fatalf("who knows what was told 5 minutes ago does not believe it: %v", err)
			}
			signers[string(leaf.AuthorityKeyId)] = true
			known = l.Identity(attached("front", "u1")).GetRoots()
		}
		cancel()
		<-done
		if len(signers) < 4 || changes < 9 {
			t.Errorf("%d CAs have signed, %d changes were told", len(signers), changes)
		}
		if again := open(t, o); !again.keyring().Equal(l.keyring()) {
			t.Error("another agent does not go on where this one ended")
		}
	})
}

// give writes a CA to the operator's folder, in full or without its key.
func give(t *testing.T, dir string, withKey bool) *identity.Authority {
	t.Helper()
	a, err := identity.NewAuthority(domain, time.Now(), 90*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	certificates, key, err := a.PEM()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"tls.crt": certificates, "ca.crt": certificates}
	if withKey {
		files["tls.key"] = key
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

// TestTheOperatorsCATakesOver: once all proxies trust it, and never half written.
func TestTheOperatorsCATakesOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := options(t)
		o.Given, o.TTL = t.TempDir(), time.Hour
		if _, err := OpenLocal(o); err == nil {
			t.Fatal("there is none, and that is no error")
		}
		first := give(t, o.Given, true)
		l := open(t, o)
		var trusted atomic.Bool
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { l.Run(ctx, trusted.Load, func() {}) })
		is := func(what string, signs *identity.Authority, roots int) {
			t.Helper()
			synctest.Wait()
			if ring := l.keyring(); !ring.Signs().Root().Equal(signs.Root()) || len(ring.Roots()) != roots || len(l.Roots()) != roots {
				t.Errorf("%s: %v signs, %d roots", what, ring.Signs().Root().Subject, len(ring.Roots()))
			}
		}
		is("the first", first, 1)
		give(t, o.Given, false)
		time.Sleep(time.Hour)
		is("half of another", first, 1)
		second := give(t, o.Given, true)
		time.Sleep(2 * time.Hour)
		is("another, which not all trust", first, 2)
		trusted.Store(true)
		time.Sleep(2 * checkEvery)
		is("another", second, 2)
		time.Sleep(25 * time.Hour)
		is("all certificates of the first have ended", second, 1)
		cancel()
		running.Wait()
	})
}
