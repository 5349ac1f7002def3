package identity

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
)

const pemCertificate = "CERTIFICATE"

// EncodeCertificates renders certificates in PEM, for ParseCertificates.
func EncodeCertificates(list []*x509.Certificate) []byte { return EncodeChain(DER(list)) }

// DER are certificates as they are signed.
func DER(list []*x509.Certificate) [][]byte {
	var out [][]byte
	for _, c := range list {
		out = append(out, c.Raw)
	}
	return out
}

// EncodeChain is EncodeCertificates of a chain in DER, as Sign makes it.
func EncodeChain(chain [][]byte) []byte {
	var out []byte
	for _, der := range chain {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der})...)
	}
	return out
}

// Digest is the same for the same certificates (DER), in whatever order, and no other's.
func Digest(certificates [][]byte) string {
	hash := sha256.New()
	for _, der := range slices.SortedFunc(slices.Values(certificates), bytes.Compare) {
		one := sha256.Sum256(der)
		hash.Write(one[:])
	}
	return hex.EncodeToString(hash.Sum(nil))
}

// ParseCertificates reads certificates in PEM, of which there is one at least, and
// nothing else.
func ParseCertificates(document []byte) ([]*x509.Certificate, error) {
	blocks := 0
	for block, rest := pem.Decode(document); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != pemCertificate {
			return nil, fmt.Errorf("there is a %s among the certificates", block.Type)
		}
		blocks++
	}
	if blocks == 0 {
		return nil, errors.New("there is no certificate, in PEM")
	}
	return parseCertificates(document)
}

// parseCertificates reads all certificates of a document in PEM, of which there is one at
// least. There may be something else, as a key.
func parseCertificates(document []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for block, rest := pem.Decode(document); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != pemCertificate {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("there is none, in PEM")
	}
	return out, nil
}
