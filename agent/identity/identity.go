// Package identity says who a pod is, and signs for it: SPIFFE IDs, certificate
// signing requests and what is wrong with them, a CA and its rotation.
//
// A pod's proxy makes a key and a request (DER, PKCS #10). Whoever knows which pod
// asks derives the ID (OfPod); Authority.Sign checks the request and answers with a
// chain. Which roots are to be trusted, and when another CA begins to sign, is
// Keyring's business.
//
// Everything here is values: clocks are passed in, nothing is read or written.
// Where a CA's key is kept, and who may ask for what, is decided elsewhere.
package identity

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/weirmesh/weir/agent/model"
)

// maxTrustDomain is the longest trust domain, in bytes (SPIFFE ID, section 2.3).
const maxTrustDomain = 255

// TrustDomain reads the name of a trust domain, such as "cluster.local".
func TrustDomain(name string) (spiffeid.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(name)
	switch {
	case err != nil:
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %q: %w", name, err)
	case td.Name() != name:
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %q: its name alone is wanted, %q", name, td.Name())
	case len(name) > maxTrustDomain:
		return spiffeid.TrustDomain{}, fmt.Errorf("trust domain %q: longer than %d bytes", name, maxTrustDomain)
	}
	return td, nil
}

// Of is the ID of a namespace's service account:
// spiffe://TRUST DOMAIN/ns/NAMESPACE/sa/SERVICE ACCOUNT.
func Of(td spiffeid.TrustDomain, namespace, serviceAccount string) (spiffeid.ID, error) {
	id, err := spiffeid.FromSegments(td, "ns", namespace, "sa", serviceAccount)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("identity of service account %q in namespace %q: %w", serviceAccount, namespace, err)
	}
	return id, nil
}

// OfPod is a pod's ID; the zero ID of one that has no service account, as a static pod
// has none.
func OfPod(td spiffeid.TrustDomain, pod model.Pod) (spiffeid.ID, error) {
	if pod.ServiceAccount == "" || pod.Static() {
		return spiffeid.ID{}, nil
	}
	return Of(td, pod.Namespace, pod.ServiceAccount)
}
