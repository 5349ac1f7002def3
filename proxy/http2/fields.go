package http2

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// headerBlock decodes the header blocks of one connection and holds the last one.
//
// Not http2.Framer's ReadMetaHeaders: that ends the connection where a block is too
// large, and allocates anew for each.
type headerBlock struct {
	fields []Field // valid until the next block

	decoder   *hpack.Decoder
	regular   bool  // a field that is no pseudo-header field has come
	response  bool  // what pseudo-header fields there may be
	malformed error // the first rule that was broken
	size      int   // decoded
	encoded   int
	large     bool
}

func (h *headerBlock) init() {
	h.decoder = hpack.NewDecoder(headerTable, h.field)
	h.decoder.SetMaxStringLength(2 * maxHeaderList) // so that one long field gets its 431
}

func (h *headerBlock) begin(response bool) {
	clear(h.fields)
	h.fields = h.fields[:0]
	h.regular, h.response, h.malformed, h.size, h.encoded, h.large = false, response, nil, 0, 0, false
}

// write decodes a fragment.
func (h *headerBlock) write(p []byte) error {
	h.encoded += len(p)
	_, err := h.decoder.Write(p)
	switch {
	case h.encoded > maxBlock || h.size > maxBlock || errors.Is(err, hpack.ErrStringLength):
		return &connError{http2.ErrCodeEnhanceYourCalm, fmt.Errorf("%w: %w, by far", ErrAbuse, ErrHeaderTooLarge)}
	case err != nil:
		return &connError{http2.ErrCodeCompression, fmt.Errorf("%w: %w", ErrMalformed, err)}
	}
	return nil
}

// end returns what is wrong with the message, and then what ends the connection.
func (h *headerBlock) end() (error, error) {
	if err := h.decoder.Close(); err != nil {
		return nil, &connError{http2.ErrCodeCompression, fmt.Errorf("%w: %w", ErrMalformed, err)}
	}
	if h.large {
		return ErrHeaderTooLarge, nil
	}
	return h.malformed, nil
}

func (h *headerBlock) field(f Field) {
	h.size += int(f.Size())
	if h.size > maxHeaderList {
		h.large = true
		return
	}
	if h.malformed == nil {
		h.malformed = h.check(f)
	}
	h.fields = append(h.fields, f)
}

// check is RFC 9113, sections 8.2 and 8.3, for one field. Blanks at the ends of a
// value pass: section 8.2.1 forbids them, and servers of gRPC send them in
// grpc-message.
func (h *headerBlock) check(f Field) error {
	if !httpguts.ValidHeaderFieldValue(f.Value) {
		return fmt.Errorf("%w: value of %q", ErrMalformed, f.Name)
	}
	if strings.HasPrefix(f.Name, ":") {
		if h.regular || !h.pseudo(f.Name) {
			return fmt.Errorf("%w: %s", ErrMalformed, f.Name)
		}
		for _, other := range h.fields {
			if other.Name == f.Name {
				return fmt.Errorf("%w: two of %s", ErrMalformed, f.Name)
			}
		}
		return nil
	}
	h.regular = true
	if !validName(f.Name) {
		return fmt.Errorf("%w: name %q", ErrMalformed, f.Name)
	}
	switch f.Name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return fmt.Errorf("%w: %s", ErrMalformed, f.Name)
	case "te":
		if f.Value != "trailers" {
			return fmt.Errorf("%w: te %q", ErrMalformed, f.Value)
		}
	}
	return nil
}

// pseudo reports whether there is such a pseudo-header field. CONNECT's :protocol
// (RFC 8441) must be offered by SETTINGS, and is not.
func (h *headerBlock) pseudo(name string) bool {
	switch name {
	case ":method", ":scheme", ":authority", ":path":
		return !h.response
	case ":status":
		return h.response
	}
	return false
}

// validName is RFC 9113, section 8.2.1, and RFC 9110's token.
func validName(name string) bool {
	for i := range len(name) {
		c := name[i]
		if 'A' <= c && c <= 'Z' || !httpguts.IsTokenRune(rune(c)) {
			return false
		}
	}
	return name != ""
}

// get returns the value of a field, "" if there is none.
func get(fields []Field, name string) string {
	for i := range fields {
		if fields[i].Name == name {
			return fields[i].Value
		}
	}
	return ""
}

// checkRequest is RFC 9113, section 8.3.1, and returns the body's declared length,
// -1 if it has none.
func checkRequest(fields []Field) (int64, error) {
	var method, scheme, authority, path, host string
	hosts := 0
	for i := range fields {
		switch f := &fields[i]; f.Name {
		case ":method":
			method = f.Value
		case ":scheme":
			scheme = f.Value
		case ":authority":
			if authority = f.Value; authority == "" {
				return -1, fmt.Errorf("%w: :authority is empty", ErrMalformed)
			}
		case ":path":
			path = f.Value
		case "host":
			host = f.Value
			hosts++
		}
	}
	switch {
	case !httpguts.ValidHeaderFieldName(method):
		return -1, fmt.Errorf("%w: :method %q", ErrMalformed, method)
	case method == "CONNECT":
		if scheme != "" || path != "" || authority == "" {
			return -1, fmt.Errorf("%w: CONNECT", ErrMalformed)
		}
	case !validScheme(scheme):
		return -1, fmt.Errorf("%w: :scheme %q", ErrMalformed, scheme)
	case !strings.HasPrefix(path, "/") && (path != "*" || method != "OPTIONS"), strings.ContainsAny(path, " \t"):
		return -1, fmt.Errorf("%w: :path %q", ErrMalformed, path)
	}
	if authority == "" {
		authority = host
	}
	if hosts > 1 || hosts == 1 && !strings.EqualFold(host, authority) {
		return -1, fmt.Errorf("%w: host %q, :authority %q", ErrMalformed, host, authority)
	}
	if authority == "" || !httpguts.ValidHostHeader(authority) {
		return -1, fmt.Errorf("%w: :authority %q", ErrMalformed, authority)
	}
	return contentLength(fields)
}

// validScheme is RFC 3986, section 3.1, in lower or upper case.
func validScheme(scheme string) bool {
	for i := range len(scheme) {
		switch c := scheme[i] | 0x20; { // letters become lower case
		case 'a' <= c && c <= 'z':
		case i > 0 && ('0' <= c && c <= '9' || strings.IndexByte("+-.", scheme[i]) >= 0):
		default:
			return false
		}
	}
	return scheme != ""
}

// checkResponse is section 8.3.2. It returns the status and the body's declared
// length, -1 if it has none.
func checkResponse(fields []Field) (int, int64, error) {
	text := get(fields, ":status")
	status, err := strconv.Atoi(text)
	if err != nil || len(text) != 3 || status < 100 || status == 101 {
		return 0, -1, fmt.Errorf("%w: :status %q", ErrMalformed, text)
	}
	length, err := contentLength(fields)
	return status, length, err
}

// checkTrailers is section 8.1: there are no pseudo-header fields.
func checkTrailers(fields []Field) error {
	if len(fields) > 0 && strings.HasPrefix(fields[0].Name, ":") {
		return fmt.Errorf("%w: %s in trailers", ErrMalformed, fields[0].Name)
	}
	return nil
}

// contentLength is RFC 9110, section 8.6. Several that are equal are one.
func contentLength(fields []Field) (int64, error) {
	length := int64(-1)
	for i := range fields {
		if fields[i].Name != "content-length" {
			continue
		}
		n, err := strconv.ParseUint(fields[i].Value, 10, 63)
		if err != nil || length >= 0 && length != int64(n) {
			return -1, fmt.Errorf("%w: content-length %q", ErrMalformed, fields[i].Value)
		}
		length = int64(n)
	}
	return length, nil
}
