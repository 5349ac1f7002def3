// Package issue answers proxies' requests for certificates (push.Issuer). Local has a CA
// of its own: for an agent without a cluster. Cluster has the cluster's signer sign.
//
// Which identity a pod has follows from the agent's view of it; who asks, from the
// proxy's attachment. What is signed, and when another CA takes over, is package
// identity's business.
package issue

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/agent/push"
)

// Options is what a Local is told.
type Options struct {
	// Path of the file of its CAs, with their keys (0600). Whoever trusts them are proxies
	// of this node and this boot: on a tmpfs it goes with them, and another CA is made.
	Path        string
	TrustDomain spiffeid.TrustDomain
	// Given is the folder of a CA to sign with, the operator's: tls.crt, tls.key and ca.crt,
	// as in a Secret that cert-manager writes. Empty: Local makes its own. One that is
	// another than before takes its place step by step.
	Given    string
	TTL      time.Duration // of certificates; 0: identity.DefaultTTL
	Lifetime time.Duration // of a CA of its own; 0: identity.RootLifetime
	// Pod finds a pod of this node by what the attachment says.
	Pod func(namespace, name, uid string) (model.Pod, bool)
	Log *slog.Logger
}

// Local signs with a CA of its own.
type Local struct {
	opts Options

	mu   sync.Mutex
	ring identity.Keyring
}

// checkEvery is how often it is looked whether another CA is to take over, at least.
const checkEvery = time.Minute

// OpenLocal reads the CA, or makes one. One that cannot be read, or is of another trust
// domain, is set aside, as *.bad: then every proxy gets another certificate.
func OpenLocal(o Options) (*Local, error) {
	if o.TTL == 0 {
		o.TTL = identity.DefaultTTL
	}
	if o.Lifetime == 0 {
		o.Lifetime = identity.RootLifetime
	}
	l := &Local{opts: o}
	found, err := l.read(time.Now())
	if err == nil && !found {
		err = l.begin()
	}
	if err != nil {
		return nil, fmt.Errorf("CA: %w", err)
	}
	return l, nil
}

// read takes up the CA in the file, and reports whether there is one that is of use.
func (l *Local) read(now time.Time) (bool, error) {
	document, err := os.ReadFile(l.opts.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	ring, cause := identity.ParseKeyring(document)
	if cause == nil {
		cause = l.unfit(ring, now)
	}
	if cause == nil {
		l.ring = ring
		return true, nil
	}
	l.opts.Log.Error("the CA is of no use and set aside: another one is made, and all proxies get other certificates", "file", l.opts.Path+".bad", "error", cause)
	return false, os.Rename(l.opts.Path, l.opts.Path+".bad")
}

// unfit says why a CA is of no use. The operator's may be for any trust domain.
func (l *Local) unfit(ring identity.Keyring, now time.Time) error {
	root := ring.Signs().Root()
	if want := l.opts.TrustDomain.ID().String(); len(root.URIs) == 1 && root.URIs[0].String() != want {
		return fmt.Errorf("it is for the trust domain %v, not %s", root.URIs, want)
	}
	if end := ring.Signs().End(); !now.Before(end) {
		return fmt.Errorf("it expired at %s", end.UTC().Format(time.RFC3339))
	}
	return nil
}

// begin has the first CA: the operator's, or one that is made.
func (l *Local) begin() error {
	a, err := l.given()
	if err == nil && a == nil {
		a, err = l.own()
	}
	if err != nil {
		return err
	}
	return l.set(identity.NewKeyring(a))
}

// own makes a CA.
func (l *Local) own() (*identity.Authority, error) {
	return identity.NewAuthority(l.opts.TrustDomain, time.Now(), l.opts.Lifetime)
}

// given is the operator's CA, nil if he gives none.
func (l *Local) given() (*identity.Authority, error) {
	if l.opts.Given == "" {
		return nil, nil
	}
	certificates, err := os.ReadFile(filepath.Join(l.opts.Given, "tls.crt"))
	if err != nil {
		return nil, err
	}
	key, err := os.ReadFile(filepath.Join(l.opts.Given, "tls.key"))
	if err != nil {
		return nil, err
	}
	root, err := os.ReadFile(filepath.Join(l.opts.Given, "ca.crt"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	a, err := identity.ParseAuthority(certificates, key, root)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l.opts.Given, err)
	}
	if err := a.GoodAt(time.Now()); err != nil {
		return nil, fmt.Errorf("%s: %w", l.opts.Given, err)
	}
	return a, nil
}

// set writes a keyring down, and uses it once that is done. The file is synced: one that
// is lost costs every proxy its certificate.
func (l *Local) set(ring identity.Keyring) error {
	document, err := ring.Encode()
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(l.opts.Path, document, 0o600, renameio.WithTempDir(filepath.Dir(l.opts.Path)), renameio.WithStaticPermissions(0o600)); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ring = ring
	return nil
}

func (l *Local) keyring() identity.Keyring {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ring
}

// Identity implements push.Issuer.
func (l *Local) Identity(a launch.Attachment) *proxypb.Identity {
	out := &proxypb.Identity{TrustDomain: l.opts.TrustDomain.Name(), Roots: l.Roots()}
	if id, err := l.id(a); err == nil && !id.IsZero() {
		out.Id = id.String()
	}
	return out
}

// Roots implements push.Issuer.
func (l *Local) Roots() [][]byte { return identity.DER(l.keyring().Roots()) }

// id is who the pod of an attachment is; the zero ID of nobody.
func (l *Local) id(a launch.Attachment) (spiffeid.ID, error) {
	pod, known := podOf(a, l.opts.Pod)
	if !known {
		return spiffeid.ID{}, nil
	}
	return identity.OfPod(l.opts.TrustDomain, pod)
}

// Issue implements push.Issuer.
func (l *Local) Issue(_ context.Context, a launch.Attachment, request []byte) ([][]byte, error) {
	id, err := l.id(a)
	switch {
	case err != nil:
		return nil, &push.RefusedError{Reason: err.Error(), Err: err}
	case id.IsZero():
		return nil, &push.RefusedError{Reason: "the pod has no service account, or is not known any more"}
	}
	chain, err := l.keyring().Signs().Sign(request, id, time.Now(), l.opts.TTL)
	switch {
	case errors.Is(err, identity.ErrExpired):
		return nil, err // another one is made soon
	case err != nil:
		return nil, &push.RefusedError{Reason: err.Error(), Err: err}
	}
	return chain, nil
}

// Ends is when what is trusted and what signs expires: the first of the roots, and the
// certificate of the key that signs.
func (l *Local) Ends() (time.Time, time.Time) {
	ring := l.keyring()
	root := ring.Roots()[0].NotAfter
	for _, r := range ring.Roots() {
		if r.NotAfter.Before(root) {
			root = r.NotAfter
		}
	}
	return root, ring.Signs().Issuer().NotAfter
}

// Run has another CA take over when that is due, until ctx is done. trusted reports
// whether all proxies are known to trust all roots that there are; changed is called when
// these are others.
func (l *Local) Run(ctx context.Context, trusted func() bool, changed func()) {
	every := identity.Pace(l.opts.TTL, checkEvery)
	timer := time.NewTicker(every)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		if err := l.advance(time.Now(), trusted(), changed); err != nil {
			l.opts.Log.Error("another CA cannot take over", "error", err, "retry", every)
		}
	}
}

func (l *Local) advance(now time.Time, trusted bool, changed func()) error {
	before := l.keyring()
	given, wrong := l.given()
	var ring identity.Keyring
	if wrong != nil { // what was announced before goes on
		ring = before.Advance(now, trusted, l.opts.TTL)
	} else {
		var err error
		if ring, err = before.Proceed(given, l.own, now, trusted, l.opts.TTL); err != nil {
			return err
		}
	}
	if ring.Equal(before) {
		return wrong
	}
	if err := l.set(ring); err != nil {
		return err
	}
	l.opts.Log.Info("CA rotation", "signs", ring.Signs().Issuer().Subject.String(), "until", ring.Signs().End(), "roots", len(ring.Roots()), "announced", ring.Next() != nil)
	changed()
	return wrong
}
