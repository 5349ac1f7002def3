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
	TTL         time.Duration // of certificates; 0: identity.DefaultTTL
	Lifetime    time.Duration // of a CA; 0: identity.RootLifetime
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

// checkEvery is how often it is looked whether another CA is to take over, which takes
// days. In the first minute of an agent not all proxies have said yet what they trust.
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
		err = l.begin(time.Now())
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

// unfit says why a CA is of no use.
func (l *Local) unfit(ring identity.Keyring, now time.Time) error {
	root := ring.Signs().Root()
	if want := l.opts.TrustDomain.ID().String(); len(root.URIs) != 1 || root.URIs[0].String() != want {
		return fmt.Errorf("it is for the trust domain %v, not %s", root.URIs, want)
	}
	if end := ring.Signs().End(); !now.Before(end) {
		return fmt.Errorf("it expired at %s", end.UTC().Format(time.RFC3339))
	}
	return nil
}

// begin makes the first CA.
func (l *Local) begin(now time.Time) error {
	a, err := identity.NewAuthority(l.opts.TrustDomain, now, l.opts.Lifetime)
	if err != nil {
		return err
	}
	return l.set(identity.NewKeyring(a))
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
	out := &proxypb.Identity{TrustDomain: l.opts.TrustDomain.Name()}
	for _, r := range l.keyring().Roots() {
		out.Roots = append(out.Roots, r.Raw)
	}
	if id, err := l.id(a); err == nil && !id.IsZero() {
		out.Id = id.String()
	}
	return out
}

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
		return nil, err // another one is made in a minute
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
	timer := time.NewTicker(checkEvery)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		if err := l.advance(time.Now(), trusted(), changed); err != nil {
			l.opts.Log.Error("another CA cannot take over", "error", err, "retry", checkEvery)
		}
	}
}

func (l *Local) advance(now time.Time, trusted bool, changed func()) error {
	before := l.keyring()
	ring := before
	if ring.Due(now) {
		next, err := identity.NewAuthority(l.opts.TrustDomain, now, l.opts.Lifetime)
		if err != nil {
			return err
		}
		ring = ring.Announce(next, now)
	}
	ring = ring.Advance(now, trusted, l.opts.TTL)
	if ring.Equal(before) {
		return nil
	}
	if err := l.set(ring); err != nil {
		return err
	}
	l.opts.Log.Info("CA rotation", "signs", ring.Signs().Root().Subject.SerialNumber, "trusted", len(ring.Roots()), "until", ring.Signs().End())
	changed()
	return nil
}
