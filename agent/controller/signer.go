package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/identity"
)

// signers is how many requests are answered at once: each is three calls that follow
// each other, and a pod's connections wait for them.
const signers = 8

// errNoCA says that there is nothing to sign with; the log of the CA says why.
var errNoCA = errors.New("the CA is not known")

// signer answers requests for certificates of pods (CertificateSigningRequest with
// cluster.SignerName): it approves and signs them, or denies them with a reason.
type signer struct {
	client    kubernetes.Interface
	agent     string // the user that agents are, as the API server names them
	domain    spiffeid.TrustDomain
	ttl       time.Duration              // the most that is signed for
	authority func() *identity.Authority // nil: nothing can be signed
	count     func(result string)        // resultSigned, resultError, or why it was denied
	log       *slog.Logger
}

// Results of a request, beside the reasons for which one is denied.
const (
	resultSigned = "signed"
	resultError  = "error"
)

// run answers requests until ctx is done.
func (s *signer) run(ctx context.Context) {
	requests := newInbox()
	var group sync.WaitGroup
	defer group.Wait()
	defer requests.queue.ShutDown()
	for range signers {
		group.Go(func() { s.work(ctx, requests) })
	}
	ours := cluster.Selector{Fields: "spec.signerName=" + cluster.SignerName}
	cluster.Follow(ctx, s.client, s.log, "certificatesigningrequests", &certificatesv1.CertificateSigningRequest{}, ours,
		s.client.CertificatesV1().CertificateSigningRequests(), requests)
}

// work answers one request after the other.
func (s *signer) work(ctx context.Context, requests *inbox) {
	for {
		name, shutdown := requests.queue.Get()
		if shutdown {
			return
		}
		if r := requests.get(name); r != nil && ctx.Err() == nil {
			s.try(ctx, requests, r)
		}
		requests.queue.Done(name)
	}
}

// try answers one request, or has it tried again.
func (s *signer) try(ctx context.Context, requests *inbox, r *certificatesv1.CertificateSigningRequest) {
	err := s.answer(ctx, r.DeepCopy())
	switch {
	case err == nil, apierrors.IsNotFound(err):
		requests.queue.Forget(r.Name)
		return
	case ctx.Err() != nil:
		return
	case apierrors.IsConflict(err), errors.Is(err, errNoCA): // it is told what it is now; the CA says what is wrong
		s.log.DebugContext(ctx, "request for a certificate not answered yet", "request", r.Name, "error", err)
	default:
		s.count(resultError)
		s.log.WarnContext(ctx, "request for a certificate not answered; trying again", "request", r.Name, "error", err)
	}
	requests.queue.AddRateLimited(r.Name)
}

// answer decides on a request and says so in it. The pod is asked for from the API
// server itself: for one that has ended nothing is signed, however late a watch is.
func (s *signer) answer(ctx context.Context, r *certificatesv1.CertificateSigningRequest) error {
	a, no := toApplication(r, s.agent)
	if no != nil {
		return s.refuse(ctx, r, no)
	}
	pod, err := s.client.CoreV1().Pods(a.subject.Namespace).Get(ctx, a.subject.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		pod = nil
	} else if err != nil {
		return fmt.Errorf("pod %s/%s: %w", a.subject.Namespace, a.subject.Name, err)
	}
	id, no := a.holder(pod, s.domain)
	if no != nil {
		return s.refuse(ctx, r, no)
	}
	ca := s.authority()
	if ca == nil {
		return errNoCA
	}
	a.ttl = min(a.ttl, s.ttl)
	chain, err := ca.Sign(a.der, id, time.Now(), a.ttl)
	if no := a.refusalOf(err, s.domain); no != nil {
		return s.refuse(ctx, r, no)
	}
	if err != nil {
		return err
	}
	return s.grant(ctx, r, a, id, chain)
}

// grant approves a request, if nobody has, and answers it.
func (s *signer) grant(ctx context.Context, r *certificatesv1.CertificateSigningRequest, a application, id spiffeid.ID, chain [][]byte) error {
	requests := s.client.CertificatesV1().CertificateSigningRequests()
	if !hasCondition(r, certificatesv1.CertificateApproved) {
		say(r, certificatesv1.CertificateApproved, "PodCaptured", "the pod runs captured on the node whose agent asks; it is "+id.String())
		approved, err := requests.UpdateApproval(ctx, r.Name, r, updateOptions)
		if err != nil {
			return fmt.Errorf("approve: %w", err)
		}
		r = approved
	}
	r.Status.Certificate = identity.EncodeChain(chain)
	if _, err := requests.UpdateStatus(ctx, r, updateOptions); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	s.count(resultSigned)
	s.log.InfoContext(ctx, "certificate signed", "request", r.Name, "pod", a.subject.Namespace+"/"+a.subject.Name, "node", a.node, "identity", id.String(), "for", a.ttl)
	return nil
}

// refuse denies a request. One that somebody else has approved cannot be denied any
// more: it has failed.
func (s *signer) refuse(ctx context.Context, r *certificatesv1.CertificateSigningRequest, no *refusal) error {
	requests := s.client.CertificatesV1().CertificateSigningRequests()
	var err error
	if hasCondition(r, certificatesv1.CertificateApproved) {
		say(r, certificatesv1.CertificateFailed, no.reason, no.message)
		_, err = requests.UpdateStatus(ctx, r, updateOptions)
	} else {
		say(r, certificatesv1.CertificateDenied, no.reason, no.message)
		_, err = requests.UpdateApproval(ctx, r.Name, r, updateOptions)
	}
	if err != nil {
		return fmt.Errorf("deny: %w", err)
	}
	s.count(no.reason)
	s.log.WarnContext(ctx, "certificate refused", "request", r.Name, "reason", no.reason, "message", no.message, "user", r.Spec.Username)
	return nil
}

var updateOptions = metav1.UpdateOptions{FieldManager: programName}

func say(r *certificatesv1.CertificateSigningRequest, kind certificatesv1.RequestConditionType, reason, message string) {
	now := metav1.Now()
	r.Status.Conditions = append(r.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
		Type: kind, Status: corev1.ConditionTrue, Reason: reason, Message: message, LastUpdateTime: now, LastTransitionTime: now,
	})
}

func hasCondition(r *certificatesv1.CertificateSigningRequest, kind certificatesv1.RequestConditionType) bool {
	for _, c := range r.Status.Conditions {
		if c.Type == kind {
			return true
		}
	}
	return false
}

// inbox has the requests that are to be answered, as a reflector tells of them.
type inbox struct {
	queue workqueue.TypedRateLimitingInterface[string] // names

	mu   sync.Mutex
	open map[string]*certificatesv1.CertificateSigningRequest
}

var _ cache.ReflectorStore = (*inbox)(nil)

func newInbox() *inbox {
	limit := workqueue.NewTypedItemExponentialFailureRateLimiter[string](100*time.Millisecond, maxRetry)
	return &inbox{queue: workqueue.NewTypedRateLimitingQueue(limit), open: map[string]*certificatesv1.CertificateSigningRequest{}}
}

// isOpen reports whether a request is ours to answer, and nobody has.
func isOpen(r *certificatesv1.CertificateSigningRequest) bool {
	return r.Spec.SignerName == cluster.SignerName && len(r.Status.Certificate) == 0 &&
		!hasCondition(r, certificatesv1.CertificateDenied) && !hasCondition(r, certificatesv1.CertificateFailed)
}

// get is a request as it was told of last, nil if it is answered or gone.
func (b *inbox) get(name string) *certificatesv1.CertificateSigningRequest {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.open[name]
}

// Add takes a request in, or out if it is answered. One that is in already is in the
// queue, being answered, or going to be tried again.
func (b *inbox) Add(obj any) error {
	r, ok := obj.(*certificatesv1.CertificateSigningRequest)
	if !ok {
		return fmt.Errorf("watch: %T where requests for certificates are watched", obj)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !isOpen(r) {
		delete(b.open, r.Name)
		return nil
	}
	_, known := b.open[r.Name]
	b.open[r.Name] = r
	if !known {
		b.queue.Add(r.Name)
	}
	return nil
}

// Update takes a request as it is now.
func (b *inbox) Update(obj any) error { return b.Add(obj) }

// Delete takes a request out.
func (b *inbox) Delete(obj any) error {
	r, ok := obj.(*certificatesv1.CertificateSigningRequest)
	if !ok {
		return fmt.Errorf("watch: %T where requests for certificates are watched", obj)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.open, r.Name)
	return nil
}

// Replace takes a list in place of what was there.
func (b *inbox) Replace(list []any, _ string) error {
	b.mu.Lock()
	clear(b.open)
	b.mu.Unlock()
	for _, obj := range list {
		if err := b.Add(obj); err != nil {
			return err
		}
	}
	return nil
}

// Resync has nothing to do: what could not be answered is in the queue.
func (b *inbox) Resync() error { return nil }
