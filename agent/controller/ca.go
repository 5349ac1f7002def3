package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/identity"
)

// Secrets of Weir's namespace.
const (
	// caSecret has the CAs, with their keys. The controller makes and writes it, and
	// nobody else is to read it.
	caSecret = "weir-ca"
	caKey    = "keyring.json"
	// issuerSecret is the operator's, of the type kubernetes.io/tls, as cert-manager
	// writes it: a CA to sign with, instead of one of the controller's making.
	issuerSecret = "weir-ca-issuer"
	issuerRoot   = "ca.crt"
)

// caInterval is how often it is looked whether the operator's CA is another, and
// whether a rotation has to go on, at least.
const caInterval = 30 * time.Second

// caKeeper keeps the CA that signs, and has another one take its place in time. What
// it knows is in a Secret, so that the next leader goes on with it; only the leader
// writes, and only to what it has read.
//
// A Secret that cannot be read is not written over: whoever made it so can put it right,
// and the certificates that proxies have are good for a while.
type caKeeper struct {
	client    kubernetes.Interface
	namespace string
	domain    spiffeid.TrustDomain
	ttl       time.Duration                                 // of certificates
	publish   func(ctx context.Context, roots []byte) error // PEM
	trusted   func(roots string) bool                       // whether all proxies are known to trust those of that digest
	usable    func(keyring, issuer bool)                    // told at every look
	log       *slog.Logger

	last string // what was logged to be wrong

	mu   sync.Mutex
	ring *identity.Keyring // nil: there is nothing to sign with
}

// authority is the CA that signs now, nil if none is known.
func (k *caKeeper) authority() *identity.Authority {
	if ring := k.known(); ring != nil {
		return ring.Signs()
	}
	return nil
}

func (k *caKeeper) known() *identity.Keyring {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.ring
}

func (k *caKeeper) set(ring *identity.Keyring) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ring = ring
}

// run looks after the CA until ctx is done; then nothing is signed any more.
func (k *caKeeper) run(ctx context.Context) {
	defer k.set(nil)
	every := identity.Pace(k.ttl, caInterval)
	pause := firstRetry
	for {
		err := k.once(ctx)
		if ctx.Err() != nil {
			return
		}
		k.note(ctx, err)
		if err == nil {
			pause = every
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, every)
	}
}

// note logs once what is wrong, and once that it is no longer.
func (k *caKeeper) note(ctx context.Context, err error) {
	switch {
	case err == nil && k.last != "":
		k.last = ""
		k.log.InfoContext(ctx, "the CA is as it should be again")
	case err != nil && k.last != err.Error():
		k.last = err.Error()
		k.log.ErrorContext(ctx, "CA", "error", err, "signs", k.authority() != nil)
	}
}

// once does what there is to do now.
func (k *caKeeper) once(ctx context.Context) error {
	given, wrong := k.issuer(ctx)
	err := k.look(ctx, given, wrong)
	k.usable(k.known() != nil, wrong == nil)
	if errors.Is(err, wrong) {
		return err
	}
	return errors.Join(err, wrong)
}

// look reads the Secret and does what there is to do about it. While the API server is
// away what is known is as good as it was.
func (k *caKeeper) look(ctx context.Context, given *identity.Authority, wrong error) error {
	secret, err := k.client.CoreV1().Secrets(k.namespace).Get(ctx, caSecret, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		secret, err = k.create(ctx, given, wrong)
	}
	if err != nil {
		return fmt.Errorf("secret %s: %w", caSecret, err)
	}
	ring, err := identity.ParseKeyring(secret.Data[caKey])
	if err != nil {
		k.set(nil)
		return fmt.Errorf("secret %s, %s: %w; nothing is signed until it can be read. Put it right; or delete it: another CA is made, and pods do not trust each other until all have their next certificate", caSecret, caKey, err)
	}
	return k.advance(ctx, secret, ring, given, wrong)
}

// advance publishes the roots, and then goes on to the next stage of a rotation.
// Nothing is signed with a CA whose root may not be known.
func (k *caKeeper) advance(ctx context.Context, secret *corev1.Secret, ring identity.Keyring, given *identity.Authority, wrong error) error {
	if err := k.publish(ctx, identity.EncodeCertificates(ring.Roots())); err != nil {
		return fmt.Errorf("roots are not published: %w", err)
	}
	k.set(&ring)
	next, err := k.next(ring, given, wrong)
	if err != nil || next.Equal(ring) {
		return err
	}
	document, err := next.Encode()
	if err != nil {
		return err
	}
	secret = secret.DeepCopy()
	secret.Data[caKey] = document
	if _, err := k.client.CoreV1().Secrets(k.namespace).Update(ctx, secret, updateOptions); err != nil {
		return fmt.Errorf("secret %s: %w", caSecret, err)
	}
	k.set(&next)
	k.log.InfoContext(ctx, "CA rotation", "signs", next.Signs().Issuer().Subject.String(), "until", next.Signs().End(), "roots", len(next.Roots()), "announced", next.Next() != nil)
	return k.publish(ctx, identity.EncodeCertificates(next.Roots()))
}

// next is the keyring as it should be now.
func (k *caKeeper) next(ring identity.Keyring, given *identity.Authority, wrong error) (identity.Keyring, error) {
	now, trusted := time.Now(), ring.Next() != nil && k.trusted(ring.Digest())
	if wrong != nil {
		return ring.Advance(now, trusted, k.ttl), nil
	}
	return ring.Proceed(given, k.own, now, trusted, k.ttl)
}

// own makes a CA.
func (k *caKeeper) own() (*identity.Authority, error) {
	return identity.NewAuthority(k.domain, time.Now(), identity.RootLifetime)
}

// issuer is the operator's CA, nil if there is none, or what is wrong with it.
func (k *caKeeper) issuer(ctx context.Context) (*identity.Authority, error) {
	secret, err := k.client.CoreV1().Secrets(k.namespace).Get(ctx, issuerSecret, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("secret %s: %w", issuerSecret, err)
	}
	given, err := identity.ParseAuthority(secret.Data[corev1.TLSCertKey], secret.Data[corev1.TLSPrivateKeyKey], secret.Data[issuerRoot])
	if err != nil {
		return nil, fmt.Errorf("secret %s: %w; the CA before it signs on, if there is one", issuerSecret, err)
	}
	if err := given.GoodAt(time.Now().Add(cluster.LeastTTL)); err != nil {
		return nil, fmt.Errorf("secret %s: %w; the CA before it signs on, if there is one", issuerSecret, err)
	}
	return given, nil
}

// create makes the Secret where there is none: with what this leader knows, if
// somebody has deleted it, else with the operator's CA or one of our own. Of two that
// do so at once the other reads the one's.
func (k *caKeeper) create(ctx context.Context, given *identity.Authority, wrong error) (*corev1.Secret, error) {
	ring := k.known()
	switch {
	case ring != nil:
		k.log.WarnContext(ctx, "the CA's Secret is gone: making it anew with the same CA", "secret", caSecret)
	case wrong != nil: // another root than the one that was meant is not to be trusted
		return nil, wrong
	case given == nil:
		own, err := k.own()
		if err != nil {
			return nil, err
		}
		given = own
		fallthrough
	default:
		ring = new(identity.NewKeyring(given))
	}
	document, err := ring.Encode()
	if err != nil {
		return nil, err
	}
	secret := &corev1.Secret{Type: corev1.SecretTypeOpaque, Data: map[string][]byte{caKey: document}}
	secret.Namespace, secret.Name = k.namespace, caSecret
	secrets := k.client.CoreV1().Secrets(k.namespace)
	made, err := secrets.Create(ctx, secret, metav1.CreateOptions{FieldManager: updateOptions.FieldManager})
	switch {
	case apierrors.IsAlreadyExists(err):
		made, err = secrets.Get(ctx, caSecret, metav1.GetOptions{})
	case err == nil:
		k.log.InfoContext(ctx, "CA made", "secret", caSecret, "signs", ring.Signs().Issuer().Subject.String(), "until", ring.Signs().End())
	}
	return made, err
}
