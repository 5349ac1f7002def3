package cluster

import (
	"context"
	"crypto/x509"
	"log/slog"
	"slices"
	"sync"

	certificatesv1 "k8s.io/api/certificates/v1"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/weirmesh/weir/agent/identity"
)

// Roots are the certificates that proxies are to trust, as the cluster has them: those of
// the ClusterTrustBundle, or where there is none, of the ConfigMap. What cannot be read,
// or is gone, changes nothing. Use NewRoots.
type Roots struct {
	// Changed is told when they are others. It may be nil.
	Changed func()

	api       *API
	namespace string

	mu            sync.Mutex
	bundle, plain []*x509.Certificate // as each source has them; nil: it has none
	now           []*x509.Certificate
}

// NewRoots makes Roots, of which the ConfigMap is in a namespace.
func (a *API) NewRoots(namespace string) *Roots { return &Roots{api: a, namespace: namespace} }

// List is nil until any are known.
func (r *Roots) List() []*x509.Certificate {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.now
}

// Run follows them until ctx is done.
func (r *Roots) Run(ctx context.Context) {
	a := r.api
	var both sync.WaitGroup
	defer both.Wait()
	both.Go(func() {
		v1 := rootsFeed(r.setBundle, RootsBundle, a.log, func(b *certificatesv1.ClusterTrustBundle) string { return b.Spec.TrustBundle })
		beta := rootsFeed(r.setBundle, RootsBundle, a.log, func(b *certificatesv1beta1.ClusterTrustBundle) string { return b.Spec.TrustBundle })
		FollowServed(ctx, a.log, "clustertrustbundles", func() { r.setBundle(nil) },
			VersionOf(a.client, a.log, "clustertrustbundles", &certificatesv1.ClusterTrustBundle{},
				named[*certificatesv1.ClusterTrustBundleList]{a.client.CertificatesV1().ClusterTrustBundles(), RootsBundle}, v1),
			VersionOf(a.client, a.log, "clustertrustbundles", &certificatesv1beta1.ClusterTrustBundle{},
				named[*certificatesv1beta1.ClusterTrustBundleList]{a.client.CertificatesV1beta1().ClusterTrustBundles(), RootsBundle}, beta))
	})
	both.Go(func() {
		plain := rootsFeed(r.setPlain, RootsConfigMap, a.log, func(m *corev1.ConfigMap) string { return m.Data[RootsKey] })
		Follow(ctx, a.client, a.log, "configmaps", &corev1.ConfigMap{}, Selector{Fields: nameIs(RootsConfigMap)}, a.client.CoreV1().ConfigMaps(r.namespace), plain)
	})
}

func (r *Roots) setBundle(list []*x509.Certificate) { r.set(&r.bundle, list) }
func (r *Roots) setPlain(list []*x509.Certificate)  { r.set(&r.plain, list) }

// set takes what a source has.
func (r *Roots) set(source *[]*x509.Certificate, list []*x509.Certificate) {
	r.mu.Lock()
	*source = list
	next := r.bundle
	if next == nil {
		next = r.plain
	}
	differs := next != nil && !slices.EqualFunc(next, r.now, (*x509.Certificate).Equal)
	if differs {
		r.now = next
	}
	r.mu.Unlock()
	if differs && r.Changed != nil {
		r.Changed()
	}
}

// rootsFeed has the object of one name, of which text is the PEM.
func rootsFeed[O Object](set func([]*x509.Certificate), name string, log *slog.Logger, text func(O) string) *feed[O] {
	take := func(o O) error {
		if o.GetName() != name {
			return nil
		}
		list, err := identity.ParseCertificates([]byte(text(o)))
		if err != nil {
			return err
		}
		set(list)
		return nil
	}
	return &feed[O]{
		strip: func(o O) { dropManagedFields(o) }, synced: func() {}, log: log,
		sink: sink[O]{
			set: take,
			drop: func(k key) {
				if k.name == name {
					set(nil)
				}
			},
			replace: func(objects []O, skip func(O, error)) {
				if !slices.ContainsFunc(objects, func(o O) bool { return o.GetName() == name }) {
					set(nil)
				}
				for _, o := range objects {
					if err := take(o); err != nil {
						skip(o, err)
					}
				}
			},
		},
	}
}

// named is the resource of one name: a right to list and watch can be about that.
type named[L runtime.Object] struct {
	Resource[L]
	name string
}

func (n named[L]) List(ctx context.Context, opts metav1.ListOptions) (L, error) {
	opts.FieldSelector = nameIs(n.name)
	return n.Resource.List(ctx, opts)
}

func (n named[L]) Watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
	opts.FieldSelector = nameIs(n.name)
	return n.Resource.Watch(ctx, opts)
}

func nameIs(name string) string {
	return fields.OneTermEqualSelector(metav1.ObjectNameField, name).String()
}
