package cluster

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	certificates "k8s.io/client-go/kubernetes/typed/certificates/v1"

	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/model"
)

// Pauses between looks at a request that is not answered. An answer takes three calls of
// the signer's; polling it needs no right to watch others' requests.
const (
	firstPoll = 100 * time.Millisecond
	lastPoll  = 5 * time.Second
)

// DeniedError says that the cluster's signer has denied a pod a certificate.
type DeniedError struct {
	Reason  string // one word, such as OtherNode: the condition's
	Message string // in words, and what to do
}

func (e *DeniedError) Error() string { return e.Reason + ": " + e.Message }

// Issuer has certificates for pods of this node made by the cluster's signer. Use
// NewIssuer.
type Issuer struct {
	client certificates.CertificateSigningRequestInterface
	ready  Ready
	ttl    time.Duration // to ask for
	state  Reachability
}

// Ready returns once the signer can know that a pod is captured, or an error with ctx.
type Ready func(ctx context.Context, pod model.Pod) error

// LeastTTL is the least that the API server lets anybody ask for. A signer may sign for
// less.
const LeastTTL = 10 * time.Minute

// NewIssuer makes an Issuer for the pods in a Store that RunAPI fills.
func (a *API) NewIssuer(s *Store, ttl time.Duration) *Issuer {
	return NewIssuer(a.client, s.waitCaptured, ttl, a.log)
}

// NewIssuer makes an Issuer that asks for a pod's certificate when ready returns, and for
// it to be good for ttl.
func NewIssuer(client kubernetes.Interface, ready Ready, ttl time.Duration, log *slog.Logger) *Issuer {
	return &Issuer{
		client: client.CertificatesV1().CertificateSigningRequests(), ready: ready, ttl: max(ttl, LeastTTL),
		state: Reachability{Kind: "certificatesigningrequests", Log: log},
	}
}

// Issue has a request (PKCS #10, DER) answered that a pod's proxy has made: a chain (DER),
// the pod's certificate first. It waits until the pod is published as captured, without
// which it would be denied, and then for the answer: while the API server or the signer
// is away, until ctx is done. The error is a *DeniedError, or says what was waited for.
func (i *Issuer) Issue(ctx context.Context, pod model.Pod, request []byte) ([][]byte, error) {
	if err := i.ready(ctx, pod); err != nil {
		return nil, err
	}
	made, err := i.ask(ctx, requestFor(pod, request, i.ttl))
	if err != nil {
		return nil, err
	}
	answer, err := i.await(ctx, made)
	if err != nil {
		return nil, err
	}
	chain, err := parseChain(answer)
	if err != nil {
		return nil, fmt.Errorf("request %s: status.certificate: %w", made.Name, err)
	}
	return chain, nil
}

func requestFor(pod model.Pod, der []byte, ttl time.Duration) *certificatesv1.CertificateSigningRequest {
	r := &certificatesv1.CertificateSigningRequest{}
	r.GenerateName = "weir-"
	r.Annotations = Subject{pod.Namespace, pod.Name, pod.UID}.Annotations()
	r.Spec = certificatesv1.CertificateSigningRequestSpec{
		SignerName:        SignerName,
		Request:           pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
		ExpirationSeconds: new(int32(ttl / time.Second)),
		Usages:            []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth, certificatesv1.UsageServerAuth},
	}
	return r
}

// ask makes the object.
func (i *Issuer) ask(ctx context.Context, r *certificatesv1.CertificateSigningRequest) (*certificatesv1.CertificateSigningRequest, error) {
	for pause := firstPoll; ; pause = min(2*pause, lastPoll) {
		made, err := i.client.Create(ctx, r, metav1.CreateOptions{FieldManager: "weir-agent"})
		i.state.Note(ctx, err)
		switch {
		case err == nil:
			return made, nil
		case apierrors.IsInvalid(err), apierrors.IsBadRequest(err): // the proxy made it so
			return nil, fmt.Errorf("request a certificate: %w", err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, fmt.Errorf("request a certificate: %w: %w", context.Cause(ctx), err)
		}
	}
}

// await returns the answer to a request, in PEM.
func (i *Issuer) await(ctx context.Context, made *certificatesv1.CertificateSigningRequest) ([]byte, error) {
	r, lookErr := made, error(nil)
	for pause := firstPoll; ; pause = min(2*pause, lastPoll) {
		if lookErr == nil {
			if answer, err := answerOf(r); answer != nil || err != nil {
				return answer, err
			}
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("request %s is not answered: weir-controller does, and its log says why it has not: %w", made.Name, context.Cause(ctx)), lookErr)
		}
		r, lookErr = i.client.Get(ctx, made.Name, metav1.GetOptions{})
		i.state.Note(ctx, lookErr)
		if apierrors.IsNotFound(lookErr) {
			return nil, fmt.Errorf("request %s was deleted before it was answered: %w", made.Name, lookErr)
		}
	}
}

// answerOf is what a request was answered with, nothing if it is open.
func answerOf(r *certificatesv1.CertificateSigningRequest) ([]byte, error) {
	for _, c := range r.Status.Conditions {
		if c.Status == corev1.ConditionTrue && (c.Type == certificatesv1.CertificateDenied || c.Type == certificatesv1.CertificateFailed) {
			return nil, &DeniedError{c.Reason, c.Message}
		}
	}
	if len(r.Status.Certificate) == 0 {
		return nil, nil
	}
	return r.Status.Certificate, nil
}

// parseChain reads certificates in PEM, of which there is one at least.
func parseChain(document []byte) ([][]byte, error) {
	certificates, err := identity.ParseCertificates(document)
	return identity.DER(certificates), err
}
