package controller

import (
	"context"
	"errors"
	"fmt"

	certificatesv1 "k8s.io/api/certificates/v1"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/weirmesh/weir/agent/cluster"
)

// publishRoots makes roots (PEM) known to all agents: in a ClusterTrustBundle where the
// API server has them, which it has as v1 from Kubernetes 1.37 on and before as v1beta1
// if that is switched on; else in a ConfigMap of a namespace.
func publishRoots(ctx context.Context, client kubernetes.Interface, namespace string, roots []byte) error {
	text := string(roots)
	v1 := &certificatesv1.ClusterTrustBundle{}
	v1.Name = cluster.RootsBundle
	err := put(ctx, v1, client.CertificatesV1().ClusterTrustBundles(),
		func(l *certificatesv1.ClusterTrustBundleList) []certificatesv1.ClusterTrustBundle { return l.Items },
		func(b *certificatesv1.ClusterTrustBundle) bool {
			was := b.Spec
			b.Spec = certificatesv1.ClusterTrustBundleSpec{SignerName: cluster.SignerName, TrustBundle: text}
			return b.Spec != was
		})
	if !errors.Is(err, errNotServed) {
		return err
	}
	beta := &certificatesv1beta1.ClusterTrustBundle{}
	beta.Name = cluster.RootsBundle
	err = put(ctx, beta, client.CertificatesV1beta1().ClusterTrustBundles(),
		func(l *certificatesv1beta1.ClusterTrustBundleList) []certificatesv1beta1.ClusterTrustBundle {
			return l.Items
		},
		func(b *certificatesv1beta1.ClusterTrustBundle) bool {
			was := b.Spec
			b.Spec = certificatesv1beta1.ClusterTrustBundleSpec{SignerName: cluster.SignerName, TrustBundle: text}
			return b.Spec != was
		})
	if !errors.Is(err, errNotServed) {
		return err
	}
	plain := &corev1.ConfigMap{}
	plain.Namespace, plain.Name = namespace, cluster.RootsConfigMap
	return put(ctx, plain, client.CoreV1().ConfigMaps(namespace),
		func(l *corev1.ConfigMapList) []corev1.ConfigMap { return l.Items },
		func(m *corev1.ConfigMap) bool {
			changed := m.Data[cluster.RootsKey] != text
			m.Data = map[string]string{cluster.RootsKey: text}
			return changed
		})
}

// errNotServed says that the API server does not have a kind in that version.
var errNotServed = errors.New("it is not served")

// object is a pointer to T, which is one of Kubernetes' types.
type object[T any] interface {
	*T
	cluster.Object
}

// writable is the part of a typed client that put needs.
type writable[O, L any] interface {
	List(ctx context.Context, opts metav1.ListOptions) (L, error)
	Create(ctx context.Context, o O, opts metav1.CreateOptions) (O, error)
	Update(ctx context.Context, o O, opts metav1.UpdateOptions) (O, error)
}

// put makes an object what set makes of it, or makes it. set reports whether it has
// changed something. It is looked for by a list of one, as of a kind that is not served
// the list is not found (errNotServed), and of one that is served the object is not in it.
func put[T any, O object[T], L any](ctx context.Context, fresh O, resource writable[O, L], items func(L) []T, set func(O) bool) error {
	name := fresh.GetName()
	list, err := resource.List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	if apierrors.IsNotFound(err) {
		return errNotServed
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, item := range items(list) {
		have := O(&item)
		if have.GetName() != name {
			continue
		}
		if !set(have) {
			return nil
		}
		if _, err := resource.Update(ctx, have, updateOptions); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		return nil
	}
	set(fresh)
	if _, err := resource.Create(ctx, fresh, metav1.CreateOptions{FieldManager: programName}); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
