package sniff

import "encoding/binary"

// Hello is what a connection's first bytes are of TLS.
type Hello uint8

// What they may be.
const (
	HelloUndecided Hello = iota // more bytes are needed
	HelloNone                   // no TLS
	HelloOther                  // TLS, of somebody who does not offer the protocol
	HelloOffers                 // TLS, and the protocol is offered (ALPN, RFC 7301)
)

const (
	recordHeader    = 5 // type, version, length (RFC 8446, section 5.1)
	handshakeHeader = 4 // type, length (section 4)
	maxRecord       = 1 << 14
	typeHandshake   = 22
	typeClientHello = 1
	majorVersion    = 3 // of all versions since SSL 3.0
	extensionALPN   = 16
	helloFixed      = 2 + 32 // version, random (section 4.1.2)
)

// LookHello decides on the first bytes of a connection. A ClientHello counts once it
// is complete, and if it is in one record, as those of crypto/tls are, whatever its
// keys' size. One that breaks a rule offers nothing.
func LookHello(first []byte, protocol string) Hello {
	if len(first) == 0 {
		return HelloUndecided
	}
	if first[0] != typeHandshake || len(first) > 1 && first[1] != majorVersion {
		return HelloNone
	}
	if len(first) < recordHeader {
		return HelloUndecided
	}
	length := int(binary.BigEndian.Uint16(first[3:]))
	if length > maxRecord || length <= handshakeHeader {
		return HelloNone
	}
	record := first[recordHeader:]
	whole := len(record) >= length
	if whole {
		record = record[:length]
	}
	if len(record) > 0 && record[0] != typeClientHello {
		return HelloOther
	}
	if len(record) >= handshakeHeader && int(record[1])<<16|int(record[2])<<8|int(record[3]) != length-handshakeHeader {
		return HelloOther
	}
	switch {
	case !whole:
		return HelloUndecided
	case offers(record[handshakeHeader:], protocol):
		return HelloOffers
	}
	return HelloOther
}

// offers reports whether a ClientHello's body is well formed and names the protocol.
func offers(body []byte, protocol string) bool {
	b := fields{rest: body}
	b.skip(helloFixed)
	b.vector(1) // session ID
	b.vector(2) // cipher suites
	b.vector(1) // compression methods
	extensions := b.vector(2)
	if !b.ended() {
		return false
	}
	found, seen := false, false
	for len(extensions.rest) > 0 && !extensions.bad {
		kind := extensions.number(2)
		data := extensions.vector(2)
		if kind != extensionALPN {
			continue
		}
		if seen {
			return false
		}
		seen = true
		names := data.vector(2)
		if !data.ended() {
			return false
		}
		for len(names.rest) > 0 && !names.bad {
			name := names.vector(1)
			found = found || string(name.rest) == protocol
		}
		if names.bad {
			return false
		}
	}
	return found && !extensions.bad
}

// fields reads TLS's presentation language (RFC 8446, section 3), within bounds: what
// is not there makes it bad.
type fields struct {
	rest []byte
	bad  bool
}

func (f *fields) skip(n int) []byte {
	if f.bad || n > len(f.rest) {
		f.bad, f.rest = true, nil
		return nil
	}
	out := f.rest[:n]
	f.rest = f.rest[n:]
	return out
}

// number is one of so many bytes.
func (f *fields) number(size int) int {
	out := 0
	for _, b := range f.skip(size) {
		out = out<<8 | int(b)
	}
	return out
}

// vector is one whose length has so many bytes.
func (f *fields) vector(size int) fields {
	out := f.skip(f.number(size))
	return fields{rest: out, bad: f.bad}
}

// ended reports whether all was read, and was there.
func (f *fields) ended() bool { return !f.bad && len(f.rest) == 0 }
