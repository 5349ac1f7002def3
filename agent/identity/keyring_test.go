package identity

import (
	"crypto/elliptic"
	"crypto/x509"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/identity/identitytest"
)

// roots names the roots of a keyring.
func roots(k Keyring, names map[string]*Authority) string {
	var out []string
	for _, r := range k.Roots() {
		for name, a := range names {
			if a.Root().Equal(r) {
				out = append(out, name)
			}
		}
	}
	return strings.Join(out, " ")
}

func TestANewRootIsTrustedBeforeItsCASigns(t *testing.T) {
	first := authority(t, start, 90*24*time.Hour)
	second := authority(t, start, 90*24*time.Hour)
	names := map[string]*Authority{"first": first, "second": second}
	announced := start.Add(time.Hour)
	k := NewKeyring(first).Announce(second, announced)
	for _, c := range []struct {
		name    string
		after   time.Duration
		trusted bool
		signs   string
		roots   string
	}{
		{"announced", 0, false, "first", "first second"},
		{"all trust it, but only just", time.Minute, true, "first", "first second"},
		{"not all trust it", 23 * time.Hour, false, "first", "first second"},
		{"all trust it", 23 * time.Hour, true, "second", "second first"},
		{"before the last certificate of the first ends", 47 * time.Hour, true, "second", "second first"},
		{"after that", 47*time.Hour + 15*time.Minute, false, "second", "second"},
		{"steady", 1000 * time.Hour, false, "second", "second"},
	} {
		k = k.Advance(announced.Add(c.after), c.trusted, DefaultTTL)
		if got := roots(k, names); k.Signs() != names[c.signs] || got != c.roots {
			t.Errorf("%s: %v signs and %s are trusted; want %s and %s", c.name, k.Signs().Issuer().Subject, got, c.signs, c.roots)
		}
	}
}

func TestARotationEndsThoughSomebodySaysNothing(t *testing.T) {
	second := authority(t, start, 1000*time.Hour)
	for _, c := range []struct {
		name     string
		lifetime time.Duration // of the first
		after    time.Duration
		want     bool
	}{
		{"within a day", 1000 * time.Hour, 24*time.Hour - 1, false},
		{"after a day", 1000 * time.Hour, 24 * time.Hour, true},
		{"when the first could not sign for a day any more", 25 * time.Hour, time.Hour + 1, true},
	} {
		k := NewKeyring(authority(t, start, c.lifetime)).Announce(second, start).Advance(start.Add(c.after), false, DefaultTTL)
		if got := k.Signs() == second; got != c.want {
			t.Errorf("%s: the second signs: %v", c.name, got)
		}
	}
}

// TestNoHandshakeFailsWhileTheCAIsRotated: at any time, every certificate that is good
// still is verified by everybody, be what he knows of the roots from now or from before
// the last step.
func TestNoHandshakeFailsWhileTheCAIsRotated(t *testing.T) {
	const ttl, lifetime = 24 * time.Hour, 20 * 24 * time.Hour
	csr := identitytest.Request(t, identitytest.Key(t, elliptic.P256()), x509.CertificateRequest{})
	k := NewKeyring(authority(t, start, lifetime))
	known := k.Roots()
	type signed struct {
		chain [][]byte
		end   time.Time
	}
	var good []signed
	rotations := 0
	for now := start; now.Before(start.Add(3 * lifetime)); now = now.Add(3 * time.Hour) {
		next := k
		if next.Due(now) {
			next = next.Announce(authority(t, now, lifetime), now)
		}
		next = next.Advance(now, true, ttl)
		if next.Signs() != k.Signs() {
			rotations++
		}
		k = next
		chain, err := k.Signs().Sign(csr, front, now, ttl)
		if err != nil {
			t.Fatal(err)
		}
		good = append(good, signed{chain, now.Add(ttl)})
		good = slices.DeleteFunc(good, func(s signed) bool { return s.end.Before(now) })
		for _, s := range good {
			for _, trusted := range [][]*x509.Certificate{known, k.Roots()} {
				if err := verify(s.chain, trusted, now, x509.ExtKeyUsageClientAuth); err != nil {
					t.Fatalf("at %s: %v", now, err)
				}
			}
		}
		known = k.Roots()
	}
	if rotations < 4 || len(k.Roots()) > 2 {
		t.Errorf("%d rotations, %d roots", rotations, len(k.Roots()))
	}
}

func TestAKeyringIsReadBackAtEveryStage(t *testing.T) {
	first, second := authority(t, start, RootLifetime), authority(t, start, RootLifetime)
	steady := NewKeyring(first)
	announced := steady.Announce(second, start)
	switched := announced.Advance(start.Add(time.Hour), true, DefaultTTL)
	for name, k := range map[string]Keyring{"steady": steady, "announced": announced, "switched": switched} {
		document, err := k.Encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseKeyring(document)
		if err != nil || !got.Equal(k) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		later := start.Add(26 * time.Hour)
		if a, b := k.Advance(later, true, DefaultTTL), got.Advance(later, true, DefaultTTL); !a.Equal(b) {
			t.Errorf("%s: it goes on otherwise", name)
		}
		for _, bad := range []string{"", "{}", string(document[:len(document)/2]), `{"other": 1}`} {
			if _, err := ParseKeyring([]byte(bad)); err == nil {
				t.Errorf("%q is a keyring", bad)
			}
		}
	}
	if steady.Equal(announced) || announced.Equal(switched) || switched.Equal(steady) {
		t.Error("stages are equal")
	}
}

// TestWhatIsShortLivedIsRotatedFaster: and its root is trusted as long as any certificate
// may have been signed for, or could have been.
func TestWhatIsShortLivedIsRotatedFaster(t *testing.T) {
	for _, c := range []struct {
		name     string
		lifetime time.Duration // of the first
		after    time.Duration
		roots    string
	}{
		{"just announced", RootLifetime, 14 * time.Second, "first second"},
		{"a quarter of a certificate's life later", RootLifetime, 15 * time.Second, "second first"},
		{"some have been signed for a day", RootLifetime, 24*time.Hour + 15*time.Minute, "second first"},
		{"all have expired", RootLifetime, 24*time.Hour + 16*time.Minute, "second"},
		{"its CA has only just ended", time.Hour, time.Hour + 14*time.Minute, "second first"},
		{"its CA has ended, and all with it", time.Hour, time.Hour + 16*time.Minute, "second"},
	} {
		names := map[string]*Authority{"first": authority(t, start, c.lifetime), "second": authority(t, start, RootLifetime)}
		k := NewKeyring(names["first"]).Announce(names["second"], start)
		for _, at := range []time.Duration{0, min(c.after, 15*time.Second), c.after} {
			k = k.Advance(start.Add(at), true, time.Minute)
		}
		if got := roots(k, names); got != c.roots {
			t.Errorf("%s: %s are trusted, want %s", c.name, got, c.roots)
		}
	}
}

func TestWhoSucceedsIsTheOperatorsToSayOrOneIsMadeInTime(t *testing.T) {
	first, given, own := authority(t, start, RootLifetime), authority(t, start, RootLifetime), authority(t, start, RootLifetime)
	again, err := ParseAuthority(pemOf(t, given)) // read anew
	if err != nil {
		t.Fatal(err)
	}
	const half = RootLifetime / 2
	k := NewKeyring(first)
	for _, c := range []struct {
		name  string
		k     Keyring
		given *Authority
		after time.Duration
		want  *Authority
	}{
		{"nobody, in the first half", k, nil, half - time.Hour, nil},
		{"one of our own", k, nil, half, own},
		{"the operator's", k, given, time.Hour, given},
		{"the operator's, which signs", NewKeyring(given), again, half, nil},
		{"the operator's, which is announced", k.Announce(given, start), again, half, given},
		{"another of the operator's", k.Announce(own, start), given, time.Hour, given},
	} {
		got, err := c.k.succeed(c.given, func() (*Authority, error) { return own, nil }, start.Add(c.after))
		if err != nil || got.Next() != c.want || got.Signs() != c.k.Signs() {
			t.Errorf("%s: %v, %v", c.name, got.Next(), err)
		}
	}
}

// pemOf is an authority for ParseAuthority.
func pemOf(t *testing.T, a *Authority) ([]byte, []byte, []byte) {
	t.Helper()
	certificates, key, err := a.PEM()
	if err != nil {
		t.Fatal(err)
	}
	return certificates, key, nil
}

func TestADigestIsOfCertificatesInWhateverOrder(t *testing.T) {
	digests := map[string]bool{}
	for _, list := range [][][]byte{{{1}, {2}}, {{2}, {1}}, {{1}}, {{1, 2}}, nil} {
		digests[Digest(list)] = true
	}
	if len(digests) != 4 || !digests[Digest([][]byte{{2}, {1}})] {
		t.Errorf("%v", digests)
	}
}
