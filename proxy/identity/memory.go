package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/agent/memfd"
)

// A memory file has an identity for the pod's next proxy: key, chain and roots, in PEM.
// A sealed one cannot be changed and an unsealed one could be read half written, so
// there is another for every identity, sealed when complete. The agent has a copy of its
// descriptor, and nobody a name for it.

const (
	blockKey   = "PRIVATE KEY"
	blockChain = "CERTIFICATE"
	blockRoot  = "TRUSTED ROOT"

	headerReceived = "Received"
	headerDomain   = "Trust-Domain"

	// maxFile is how much of a memory file is read.
	maxFile = 256 << 10

	seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
)

// Adopt takes the identity from the memory file fd, which it closes, or keeps to hand it
// on. It is called before Run, and without an agent; what is wrong with the file is no
// reason not to start: another identity is asked for.
func (h *Holder) Adopt(fd int) error {
	s, err := readFile(fd, time.Now())
	if err != nil {
		unix.Close(fd)
		return fmt.Errorf("memory file of an identity: %w", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.renewal, h.file = renewal(s), fd
	h.publish(s)
	return nil
}

// Handover calls give with the memory file for the pod's next proxy; -1: there is none.
func (h *Holder) Handover(give func(fd int) error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return give(h.file)
}

// Close lets go of the memory file. Others may have it still.
func (h *Holder) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drop()
}

func (h *Holder) drop() {
	if h.file >= 0 {
		unix.Close(h.file)
	}
	h.file = -1
}

// keep writes s down for the next proxy. If that cannot be, there is nothing to hand on:
// what there was is older. The caller holds h.mu.
func (h *Holder) keep(s *held) {
	h.drop()
	fd, err := writeFile(s)
	if err != nil {
		h.cause = err
		return
	}
	h.file, h.told = fd, false
	wake(h.woken)
}

func writeFile(s *held) (int, error) {
	document, err := encode(s)
	if err != nil {
		return -1, err
	}
	fd, err := memfd.Create("weir-identity", memfd.Data)
	if err != nil {
		return -1, fmt.Errorf("memory file: %w", err)
	}
	for len(document) > 0 && err == nil {
		var n int
		n, err = unix.Write(fd, document)
		document = document[max(n, 0):]
		if errors.Is(err, unix.EINTR) {
			err = nil
		}
	}
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("memory file: %w", err)
	}
	return fd, nil
}

func encode(s *held) ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(s.Certificate.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("memory file: %w", err)
	}
	var out bytes.Buffer
	err = pem.Encode(&out, &pem.Block{Type: blockKey, Bytes: key, Headers: map[string]string{
		headerReceived: s.received.UTC().Format(time.RFC3339Nano), headerDomain: s.TrustDomain,
	}})
	for _, c := range s.Certificate.Certificate {
		err = errors.Join(err, pem.Encode(&out, &pem.Block{Type: blockChain, Bytes: c}))
	}
	for _, r := range s.roots {
		err = errors.Join(err, pem.Encode(&out, &pem.Block{Type: blockRoot, Bytes: r.Raw}))
	}
	return out.Bytes(), err
}

// readFile reads the identity in a memory file, if it is good now. Where in the file the
// descriptor is, others have a say in.
func readFile(fd int, now time.Time) (*held, error) {
	has, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	switch {
	case err != nil:
		return nil, err
	case has&seals != seals:
		return nil, fmt.Errorf("it is not sealed (%#x)", has)
	}
	document := make([]byte, maxFile)
	length := 0
	for length < len(document) {
		n, err := unix.Pread(fd, document[length:], int64(length))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		length += n
	}
	s, err := decode(document[:length])
	if err != nil {
		return nil, err
	}
	return s, s.Verify(now)
}

// decode is the inverse of encode.
func decode(document []byte) (*held, error) {
	var key *ecdsa.PrivateKey
	var chain [][]byte
	var roots []*x509.Certificate
	var received time.Time
	var domain string
	for block, rest := pem.Decode(document); block != nil; block, rest = pem.Decode(rest) {
		var err error
		switch block.Type {
		case blockKey:
			if received, err = time.Parse(time.RFC3339Nano, block.Headers[headerReceived]); err == nil {
				domain = block.Headers[headerDomain]
				key, err = parseKey(block.Bytes)
			}
		case blockChain:
			chain = append(chain, block.Bytes)
		case blockRoot:
			var r *x509.Certificate
			r, err = x509.ParseCertificate(block.Bytes)
			roots = append(roots, r)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", block.Type, err)
		}
	}
	if key == nil {
		return nil, errors.New("there is no key")
	}
	return newHeld(chain, key, roots, domain, received)
}

func parseKey(der []byte) (*ecdsa.PrivateKey, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%T is no key of ours", parsed)
	}
	return key, nil
}
