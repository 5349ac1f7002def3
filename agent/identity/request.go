package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// What can be wrong with a certificate signing request.
var (
	ErrMalformed     = errors.New("the request is no certificate signing request")
	ErrSignature     = errors.New("the request is not signed by the key that it is about")
	ErrKey           = errors.New("the request's key is not an ECDSA key of curve P-256")
	ErrOtherNames    = errors.New("the request has other names than one SPIFFE ID")
	ErrOtherIdentity = errors.New("the request is for another identity than the pod's")
)

// maxRequest is the longest request that is looked at, in bytes. One with a P-256 key
// and an ID as long as can be has less than half of that.
const maxRequest = 8 << 10

// checkRequest returns the key that a request in DER is about, if a certificate for id
// may be made for it. A request may have no names at all, or the one ID that it is
// going to get. The error is one of those above.
func checkRequest(der []byte, id spiffeid.ID) (*ecdsa.PublicKey, error) {
	if len(der) > maxRequest {
		return nil, fmt.Errorf("%w: %d bytes, %d are the most", ErrMalformed, len(der), maxRequest)
	}
	request, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	key, ok := request.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%w: it is %s", ErrKey, request.PublicKeyAlgorithm)
	}
	if key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%w: its curve is %s", ErrKey, key.Curve.Params().Name)
	}
	if err := request.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSignature, err)
	}
	return key, checkNames(request, id)
}

// checkNames looks at what a request wants to be called.
func checkNames(request *x509.CertificateRequest, id spiffeid.ID) error {
	others := len(request.DNSNames) + len(request.EmailAddresses) + len(request.IPAddresses)
	switch {
	case others > 0:
		return fmt.Errorf("%w: %v %v %v", ErrOtherNames, request.DNSNames, request.EmailAddresses, request.IPAddresses)
	case len(request.URIs) > 1:
		return fmt.Errorf("%w: %v", ErrOtherNames, request.URIs)
	case len(request.URIs) == 1 && request.URIs[0].String() != id.String():
		return fmt.Errorf("%w: it says %s, the pod is %s", ErrOtherIdentity, request.URIs[0], id)
	}
	return checkKinds(request, len(request.URIs))
}

// subjectAltName is the extension's identifier (RFC 5280, section 4.2.1.6).
var subjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// checkKinds makes sure that there are so many alternative names and no more: of those
// that Go does not know (otherName, directoryName, …) it tells nothing.
func checkKinds(request *x509.CertificateRequest, known int) error {
	found := 0
	for _, e := range request.Extensions {
		if !e.Id.Equal(subjectAltName) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(e.Value, &names); err != nil || len(rest) > 0 {
			return fmt.Errorf("%w: its alternative names cannot be read", ErrMalformed)
		}
		found += len(names)
	}
	if found != known {
		return fmt.Errorf("%w: %d of a kind that is not known", ErrOtherNames, found-known)
	}
	return nil
}
