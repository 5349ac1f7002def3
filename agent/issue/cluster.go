package issue

import (
	"context"
	"crypto/x509"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weirmesh/weir/agent/cluster"
	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/proxypb"
	"github.com/weirmesh/weir/agent/push"
)

// Cluster has the cluster's signer sign. Make it with NewCluster.
type Cluster struct {
	opts ClusterOptions

	setting sync.Mutex // over SetRoots; taken before mu
	mu      sync.Mutex
	roots   []*x509.Certificate
}

// ClusterOptions is what a Cluster is told.
type ClusterOptions struct {
	// Path of the file with the roots that were heard of last, for an agent that starts
	// while the API server is away.
	Path        string
	TrustDomain spiffeid.TrustDomain
	Pod         func(namespace, name, uid string) (model.Pod, bool) // as Options'
	// Sign is cluster.Issuer's Issue.
	Sign func(ctx context.Context, pod model.Pod, request []byte) ([][]byte, error)
	Log  *slog.Logger
}

// NewCluster reads the roots that there were.
func NewCluster(o ClusterOptions) *Cluster {
	c := &Cluster{opts: o}
	document, err := os.ReadFile(o.Path)
	if err == nil {
		c.roots, err = identity.ParseCertificates(document)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		o.Log.Warn("the roots that were kept cannot be read: proxies that are started anew wait for the API server", "file", o.Path, "error", err)
	}
	return c
}

// Identity implements push.Issuer. Without any root nobody is told who he is, nor that he
// is nobody; nor is that one whom the watch does not show yet, or whose attachment was
// rebuilt: he would not wait for a certificate.
func (c *Cluster) Identity(a launch.Attachment) *proxypb.Identity {
	roots := c.Roots()
	pod, known := podOf(a, c.opts.Pod)
	if !known || len(roots) == 0 {
		return nil
	}
	out := &proxypb.Identity{TrustDomain: c.opts.TrustDomain.Name(), Roots: roots}
	if id, err := identity.OfPod(c.opts.TrustDomain, pod); err == nil && !id.IsZero() {
		out.Id = id.String()
	}
	return out
}

// Roots implements push.Issuer.
func (c *Cluster) Roots() [][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return identity.DER(c.roots)
}

// Issue implements push.Issuer.
func (c *Cluster) Issue(ctx context.Context, a launch.Attachment, request []byte) ([][]byte, error) {
	pod, known := podOf(a, c.opts.Pod)
	if !known {
		return nil, errors.New("the pod is not known, or not any more")
	}
	chain, err := c.opts.Sign(ctx, pod, request)
	if denied := (*cluster.DeniedError)(nil); errors.As(err, &denied) {
		return nil, &push.RefusedError{Reason: denied.Error(), Err: err}
	}
	return chain, err
}

// SetRoots takes what is to be trusted, and reports whether it is something else than
// before. Nothing changes nothing.
func (c *Cluster) SetRoots(roots []*x509.Certificate) bool {
	c.setting.Lock()
	defer c.setting.Unlock()
	if len(roots) == 0 || slices.EqualFunc(roots, c.roots, (*x509.Certificate).Equal) { // nobody else changes them
		return false
	}
	c.mu.Lock()
	c.roots = roots
	c.mu.Unlock()
	if err := renameio.WriteFile(c.opts.Path, identity.EncodeCertificates(roots), 0o600, renameio.WithTempDir(filepath.Dir(c.opts.Path))); err != nil {
		c.opts.Log.Warn("the roots are not kept for another agent", "error", err)
	}
	return true
}

// Ends is when the first of the roots expires, and the zero time: who signs is the
// signer's to know.
func (c *Cluster) Ends() (time.Time, time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var end time.Time
	for _, r := range c.roots {
		if end.IsZero() || r.NotAfter.Before(end) {
			end = r.NotAfter
		}
	}
	return end, time.Time{}
}

// podOf finds the pod of an attachment.
func podOf(a launch.Attachment, find func(namespace, name, uid string) (model.Pod, bool)) (model.Pod, bool) {
	if !a.Identified() {
		return model.Pod{}, false
	}
	return find(a.PodNamespace, a.PodName, a.PodUID)
}
