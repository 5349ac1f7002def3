package identity

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Keyring is the CAs of a trust domain while one takes the place of another, which no
// handshake may notice. It goes through these stages:
//
//	steady     one CA signs, its root is trusted
//	announced  another root is trusted, too; the CA before it signs on (Announce)
//	switched   the new CA signs; the old root is trusted until the last
//	           certificate below it has expired (Advance), then: steady
//
// The zero value is not useful: see NewKeyring. It does not change; what changes it
// returns another.
type Keyring struct {
	signs     *Authority
	next      *Authority // announced, or nil
	announced time.Time  // when next was
	old       []retired
}

// retired is a root whose CA signs no more.
type retired struct {
	root  *x509.Certificate
	until time.Time // then the last certificate below it has expired
}

const (
	// spread is how long a root has been announced, at most, before its CA signs, if
	// everybody is known to trust it: there are others who read what is published. Where
	// certificates are good for less than four times that it is a quarter of it.
	spread = 10 * time.Minute
	// spreadLimit is how long those who do not say that they trust a new root are
	// waited for: a proxy that hangs keeps nobody from being rotated.
	spreadLimit = 24 * time.Hour
	// slack is added to the end of the last certificate, for clocks.
	slack = backdate
)

// Pace is how often it is looked whether a rotation has to go on where certificates are
// good for ttl, at most every most.
func Pace(ttl, most time.Duration) time.Duration { return min(ttl/8, most) }

// NewKeyring has one CA.
func NewKeyring(a *Authority) Keyring { return Keyring{signs: a} }

// Signs is the CA that signs now.
func (k Keyring) Signs() *Authority { return k.signs }

// Next is the CA that was announced and does not sign yet, nil if there is none.
func (k Keyring) Next() *Authority { return k.next }

// Roots are those to be trusted now.
func (k Keyring) Roots() []*x509.Certificate {
	out := []*x509.Certificate{k.signs.Root()}
	if k.next != nil && !k.next.Root().Equal(out[0]) {
		out = append(out, k.next.Root())
	}
	for _, r := range k.old {
		out = append(out, r.root)
	}
	return out
}

// Digest is that of Roots.
func (k Keyring) Digest() string { return Digest(DER(k.Roots())) }

// Due reports whether another CA is to be made and announced: half of the life of the
// one that signs is over, and none is.
func (k Keyring) Due(now time.Time) bool {
	begin, end := k.signs.Issuer().NotBefore, k.signs.End()
	return k.next == nil && now.After(begin.Add(end.Sub(begin)/2))
}

// Announce has next's root trusted. Its CA signs when Advance says so. One that was
// announced before and did not sign is forgotten.
func (k Keyring) Announce(next *Authority, now time.Time) Keyring {
	k.next, k.announced = next, now
	return k
}

// Proceed is the keyring's next stage at now. If another CA is to take over it is announced:
// given, the operator's, unless it signs or is announced already; or where there is none,
// one that own makes, in time (Due). Else what was announced before goes on, as Advance
// has it: it is told to everybody first.
func (k Keyring) Proceed(given *Authority, own func() (*Authority, error), now time.Time, trusted bool, ttl time.Duration) (Keyring, error) {
	next, err := k.succeed(given, own, now)
	if err != nil || !next.Equal(k) {
		return next, err
	}
	return k.Advance(now, trusted, ttl), nil
}

func (k Keyring) succeed(given *Authority, own func() (*Authority, error), now time.Time) (Keyring, error) {
	switch {
	case given != nil && (given.same(k.signs) || given.same(k.next)), given == nil && !k.Due(now):
		return k, nil
	case given != nil:
		return k.Announce(given, now), nil
	}
	next, err := own()
	if err != nil {
		return k, err
	}
	return k.Announce(next, now), nil
}

// same reports whether two CAs are one; none is like no other.
func (a *Authority) same(b *Authority) bool {
	return b != nil && a.Issuer().Equal(b.Issuer()) && a.Root().Equal(b.Root())
}

// Advance is the keyring at now. trusted says that everybody is known to trust all of
// Roots. ttl is how long certificates are signed for.
//
// A CA that was announced signs once everybody trusts its root and some minutes have
// passed; without that knowledge a day later, or when the one before it could not sign
// for ttl any more. A root is dropped when the last certificate below it has expired,
// for however long it was signed.
func (k Keyring) Advance(now time.Time, trusted bool, ttl time.Duration) Keyring {
	if k.next != nil && k.maySwitch(now, trusted, ttl) {
		if !k.next.Root().Equal(k.signs.Root()) {
			k.old = append(k.old[:len(k.old):len(k.old)], retired{k.signs.Root(), k.signs.last(now).Add(slack)})
		}
		k.signs, k.next, k.announced = k.next, nil, time.Time{}
	}
	var old []retired
	for _, r := range k.old {
		if now.Before(r.until) && !r.root.Equal(k.signs.Root()) {
			old = append(old, r)
		}
	}
	k.old = old
	return k
}

func (k Keyring) maySwitch(now time.Time, trusted bool, ttl time.Duration) bool {
	known := now.Sub(k.announced)
	return trusted && known >= min(spread, ttl/4) || known >= spreadLimit || now.Add(ttl).After(k.signs.End())
}

// last is when all have expired that a CA has signed until now.
func (a *Authority) last(now time.Time) time.Time {
	last := now.Add(MaxTTL)
	if end := a.End(); end.Before(last) {
		return end
	}
	return last
}

// Equal reports whether both are at the same stage, with the same CAs.
func (k Keyring) Equal(o Keyring) bool {
	same := len(k.old) == len(o.old) && k.announced.Equal(o.announced) &&
		k.signs.Issuer().Equal(o.signs.Issuer()) && (k.next == nil) == (o.next == nil)
	if same && k.next != nil {
		same = k.next.Issuer().Equal(o.next.Issuer())
	}
	for i := range k.old {
		same = same && k.old[i].root.Equal(o.old[i].root)
	}
	return same
}

// kept is a Keyring as JSON. It has the keys of CAs.
type kept struct {
	Signs     keptAuthority  `json:"signs"`
	Next      *keptAuthority `json:"next,omitempty"`
	Announced time.Time      `json:"announced,omitzero"`
	Old       []keptRoot     `json:"old,omitempty"`
}

type keptAuthority struct {
	Certificates string `json:"certificates"` // PEM, as is the key
	Key          string `json:"key"`
}

type keptRoot struct {
	Root  string    `json:"root"` // PEM
	Until time.Time `json:"until"`
}

// Encode renders a keyring as JSON with PEM in it, for ParseKeyring. It has the keys of
// CAs: keep it where nobody else reads it.
func (k Keyring) Encode() ([]byte, error) {
	out := kept{Announced: k.announced}
	var err error
	if out.Signs, err = keep(k.signs); err != nil {
		return nil, err
	}
	if k.next != nil {
		next, err := keep(k.next)
		if err != nil {
			return nil, err
		}
		out.Next = &next
	}
	for _, r := range k.old {
		out.Old = append(out.Old, keptRoot{string(EncodeCertificates([]*x509.Certificate{r.root})), r.until})
	}
	return json.MarshalIndent(out, "", "  ")
}

func keep(a *Authority) (keptAuthority, error) {
	certificates, key, err := a.PEM()
	return keptAuthority{string(certificates), string(key)}, err
}

// ParseKeyring reads what Encode rendered.
func ParseKeyring(document []byte) (Keyring, error) {
	var in kept
	decoder := json.NewDecoder(bytes.NewReader(document))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&in); err != nil {
		return Keyring{}, fmt.Errorf("keyring: %w", err)
	}
	out := Keyring{announced: in.Announced}
	var err error
	if out.signs, err = ParseAuthority([]byte(in.Signs.Certificates), []byte(in.Signs.Key), nil); err != nil {
		return Keyring{}, fmt.Errorf("keyring: %w", err)
	}
	if in.Next != nil {
		if out.next, err = ParseAuthority([]byte(in.Next.Certificates), []byte(in.Next.Key), nil); err != nil {
			return Keyring{}, fmt.Errorf("keyring: next %w", err)
		}
	}
	for _, r := range in.Old {
		roots, err := parseCertificates([]byte(r.Root))
		if err != nil || len(roots) != 1 {
			return Keyring{}, errors.Join(errors.New("keyring: an old root cannot be read"), err)
		}
		out.old = append(out.old, retired{roots[0], r.Until})
	}
	return out, nil
}
