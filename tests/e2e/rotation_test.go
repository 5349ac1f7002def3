package e2e

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/weirmesh/weir/agent/identity"
)

var (
	rotations = flag.Int("rotations", 20, "certificates that are renewed in the promise about that")
	takeovers = flag.Int("takeovers", 1, "CAs that take over in it")
)

const (
	// shortTTL is how long certificates are good for meanwhile: each is renewed every 10 s.
	shortTTL = 20 * time.Second
	// takeoverLimit is how long another CA may take to have signed for every pod: some 10 s
	// until it signs, and 12 until the last certificate is renewed.
	takeoverLimit = time.Minute
	// issuerName is the Secret of an operator's CA.
	issuerName = "weir-ca-issuer"
)

// rotated has certificates renewed and CAs take over while pods call each other, on
// connections that stay and on new ones: HTTP, and bytes, where each connection has a
// handshake of its own.
func rotated(t *testing.T) {
	signShortly(t)
	ns := newNamespace(t, captured())
	createOpaque(t, ns)
	x := beginTraffic(t, ns)
	pods := []*corev1.Pod{x.front, x.backs["back-0"], x.backs["back-1"]}
	var idle []*corev1.Pod
	for i := range 5 {
		idle = append(idle, onNode(appPod(fmt.Sprintf("idle-%d", i), "sleep", "1h"), i%len(bed.Nodes)))
	}
	pods = append(pods, startAll(t, ns, idle...)...)
	for _, pod := range pods {
		identified(t, pod)
	}
	allServed(t, "bytes", get(t, x.front, "-n", "5", "-retry", "10s", "http://opaque:8080/"))
	handshakes := beginLoad(t, x.front, "http://opaque:8080/")

	first := len(signedFor(t, pods))
	renewed := func(n int) {
		t.Helper()
		eventually(t, time.Minute+time.Duration(n)*3*time.Second, fmt.Sprintf("%d certificates to be renewed", n), func() error {
			if now := len(signedFor(t, pods)) - first; now < n {
				return fmt.Errorf("%d are", now)
			}
			return nil
		})
	}
	for i := range *takeovers {
		renewed(*rotations * i / *takeovers)
		ca := giveCA(t)
		eventually(t, takeoverLimit, "every pod to have a certificate of the CA that was given", func() error {
			have := map[types.UID]bool{}
			for _, s := range signedFor(t, pods) {
				if s.leaf.CheckSignatureFrom(ca) == nil {
					have[s.pod] = true
				}
			}
			if len(have) < len(pods) {
				return fmt.Errorf("%d of %d have", len(have), len(pods))
			}
			return nil
		})
	}
	renewed(*rotations)

	results := handshakes.end(t)
	allServed(t, "bytes", results)
	x.end(t)
	t.Logf("%d certificates renewed, %d CAs took over; %d connections with a handshake of their own, the slowest took %s",
		len(signedFor(t, pods))-first, *takeovers, len(results), slowest(results).Round(time.Millisecond))
}

// createOpaque makes a Service of back's pods whose port is said to carry no HTTP.
func createOpaque(t *testing.T, ns string) {
	t.Helper()
	_, err := bed.kube.CoreV1().Services(ns).Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "opaque"},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"app": "back"},
			Ports:    []corev1.ServicePort{{Port: 8080, AppProtocol: new("tcp")}},
		},
	}, metav1.CreateOptions{})
	must(t, err)
}

// signShortly has the controller sign for shortTTL, until the test ends. The agents go
// on as they are.
func signShortly(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	deployments, maps := bed.kube.AppsV1().Deployments(weirNamespace), bed.kube.CoreV1().ConfigMaps(weirNamespace)
	d, err := deployments.Get(ctx, controllerName, metav1.GetOptions{})
	must(t, err)
	volume := -1
	for i, v := range d.Spec.Template.Spec.Volumes {
		if v.Name == "options" && v.ConfigMap != nil {
			volume = i
		}
	}
	if volume < 0 {
		t.Fatal("the controller has no volume of options")
	}
	options, err := maps.Get(ctx, d.Spec.Template.Spec.Volumes[volume].ConfigMap.Name, metav1.GetOptions{})
	must(t, err)
	short := &corev1.ConfigMap{Data: map[string]string{}}
	short.Name = "weir-options-e2e"
	for name, document := range options.Data {
		short.Data[name] = fmt.Sprintf("%s\ncertificateTTL: %s\n", document, shortTTL)
	}
	if _, err := maps.Create(ctx, short, metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		must(t, err)
	}
	use := func(ctx context.Context, name string) error {
		patch := fmt.Sprintf(`[{"op":"replace","path":"/spec/template/spec/volumes/%d/configMap/name","value":%q}]`, volume, name)
		_, err := deployments.Patch(ctx, controllerName, types.JSONPatchType, []byte(patch), metav1.PatchOptions{})
		if err == nil {
			err = poll(ctx, "the controller to come to rest", func() error { return bed.controllersReady(ctx) })
		}
		return err
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*startLimit)
		defer cancel()
		if err := errors.Join(use(ctx, options.Name), maps.Delete(ctx, short.Name, metav1.DeleteOptions{})); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(ctx, 2*startLimit)
	defer cancel()
	must(t, use(ctx, short.Name))
}

// giveCA puts an operator's CA, another each time, where the controller looks for it,
// until the test ends, and returns its certificate.
func giveCA(t *testing.T) *x509.Certificate {
	t.Helper()
	ca, err := identity.NewAuthority(spiffeid.RequireTrustDomainFromString("cluster.local"), time.Now(), 90*24*time.Hour)
	must(t, err)
	certificate, key, err := ca.PEM()
	must(t, err)
	secret := &corev1.Secret{Type: corev1.SecretTypeTLS, Data: map[string][]byte{
		corev1.TLSCertKey: certificate, corev1.TLSPrivateKeyKey: key, "ca.crt": certificate,
	}}
	secret.Name = issuerName
	secrets := bed.kube.CoreV1().Secrets(weirNamespace)
	_, err = secrets.Create(t.Context(), secret, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = secrets.Update(t.Context(), secret, metav1.UpdateOptions{})
	} else if err == nil {
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), soon)
			defer cancel()
			if err := secrets.Delete(ctx, issuerName, metav1.DeleteOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	must(t, err)
	return ca.Root()
}

// signedCertificate is what a request for a certificate was answered with.
type signedCertificate struct {
	pod  types.UID
	leaf *x509.Certificate
}

// signedFor are all that were signed for pods.
func signedFor(t *testing.T, pods []*corev1.Pod) []signedCertificate {
	t.Helper()
	list, err := bed.kube.CertificatesV1().CertificateSigningRequests().List(t.Context(), metav1.ListOptions{FieldSelector: "spec.signerName=" + signerName})
	must(t, err)
	ours := map[types.UID]bool{}
	for _, pod := range pods {
		ours[pod.UID] = true
	}
	var out []signedCertificate
	for _, r := range list.Items {
		uid := types.UID(r.Annotations[podUIDAnnotation])
		block, _ := pem.Decode(r.Status.Certificate)
		if !ours[uid] || block == nil {
			continue
		}
		leaf, err := x509.ParseCertificate(block.Bytes)
		must(t, err)
		out = append(out, signedCertificate{uid, leaf})
	}
	return out
}
