package http1

import "bytes"

// Kind is how a message goes on after its head.
type Kind uint8

// The kinds.
const (
	None       Kind = iota // it does not
	Length                 // as many bytes as Content-Length says
	Chunked                // chunks, then trailers
	UntilClose             // until its sender closes the connection
	Tunnel                 // it is HTTP no more, in both directions
)

// Body follows a message's body through the bytes that come, and refuses chunks
// that two readers could take for different ones.
type Body struct {
	Kind Kind
	// Withheld is the name of a field, in lower case, that is not to be passed on as a
	// trailer: it is refused, in any case and with _ for -. Empty: any is passed on.
	Withheld string

	left  int64 // of the length, or of this chunk's data
	state chunkState
	line  int // bytes of this line, or of the trailer section
	alike int // bytes of this trailer's name that are those of Withheld; -1: one is another
}

type chunkState uint8

const (
	sizeStart  chunkState = iota // a digit must come
	size                         // digits
	extension                    // after ";"
	sizeLF                       // after the size line's CR
	data                         // left bytes
	dataCR                       // after the data
	dataLF                       //
	lineStart                    // of a trailer, or the last line
	name                         // of a trailer
	fieldValue                   // of a trailer
	fieldLF                      // after its CR
	lastLF                       // after the last line's CR
	complete
)

// maxChunkLine bounds a chunk's size line, extensions included, in bytes.
const maxChunkLine = 4 << 10

// Done reports whether all of the body has gone by. One that lasts until its
// sender closes is never done.
func (b *Body) Done() bool {
	switch b.Kind {
	case None:
		return true
	case Length:
		return b.left == 0
	case Chunked:
		return b.state == complete
	}
	return false
}

// Left is how many bytes are to come, -1 if nobody knows.
func (b *Body) Left() int64 {
	switch b.Kind {
	case None:
		return 0
	case Length:
		return b.left
	}
	return -1
}

// Skip says that n bytes of a body of known length have gone by unseen.
func (b *Body) Skip(n int64) { b.left -= n }

// Next returns how many bytes at the beginning of buf are the body's. The error is
// an *Error; the bytes before it must not be passed on as if they were all.
func (b *Body) Next(buf []byte) (int, error) {
	switch b.Kind {
	case None:
		return 0, nil
	case Length:
		n := int(min(b.left, int64(len(buf))))
		b.left -= int64(n)
		return n, nil
	case Chunked:
		return b.chunks(buf)
	}
	return len(buf), nil
}

// chunks is Next of a chunked body (RFC 9112, section 7.1).
func (b *Body) chunks(buf []byte) (int, error) {
	pos := 0
	for pos < len(buf) && b.state != complete {
		if b.state == data {
			n := int(min(b.left, int64(len(buf)-pos)))
			b.left -= int64(n)
			pos += n
			if b.left == 0 {
				b.state = dataCR
			}
			continue
		}
		if err := b.step(buf[pos]); err != nil {
			return pos, err
		}
		pos++
	}
	return pos, nil
}

// step takes one byte that is not data.
func (b *Body) step(c byte) error {
	switch b.state {
	case sizeStart, size:
		return b.sizeByte(c)
	case extension:
		if b.line++; b.line > maxChunkLine {
			return broken("a chunk's size line is longer than %d bytes", maxChunkLine)
		}
		if c == '\r' {
			b.state = sizeLF
		} else if class[c]&value == 0 {
			return broken("a chunk's extension has a control character")
		}
	case sizeLF, dataLF, fieldLF, lastLF:
		if c != '\n' {
			return broken("CR without LF in a chunked body")
		}
		b.nextLine()
	case dataCR:
		if c != '\r' {
			return broken("a chunk is longer than its size")
		}
		b.state = dataLF
	default:
		return b.trailer(c)
	}
	return nil
}

func (b *Body) sizeByte(c byte) error {
	digit := bytes.IndexByte(hexDigits, lower[c])
	switch {
	case digit >= 0:
		if b.left > 1<<58 {
			return broken("a chunk's size is too large")
		}
		if b.line++; b.line > maxChunkLine { // zeros
			return broken("a chunk's size line is longer than %d bytes", maxChunkLine)
		}
		b.left, b.state = b.left<<4|int64(digit), size
	case b.state == sizeStart:
		return broken("a chunk does not begin with its size")
	case c == ';':
		b.state = extension
	case c == '\r':
		b.state = sizeLF
	default:
		return broken("a chunk's size is not a number")
	}
	return nil
}

var hexDigits = []byte("0123456789abcdef")

// nextLine is after a line's LF.
func (b *Body) nextLine() {
	switch {
	case b.state == lastLF:
		b.state = complete
	case b.state == fieldLF:
		b.state = lineStart
	case b.state == dataLF:
		b.state, b.line = sizeStart, 0
	case b.left > 0:
		b.state = data
	default:
		b.state, b.line = lineStart, 0
	}
}

// trailer takes a byte of the trailer section, whose size is bounded as a head's.
func (b *Body) trailer(c byte) error {
	if b.line++; b.line > MaxHead {
		return ErrTooLarge
	}
	switch b.state {
	case lineStart:
		switch {
		case c == '\r':
			b.state = lastLF
		case class[c]&token != 0:
			b.state, b.alike = name, 0
			b.compare(c)
		default:
			return broken("a trailer does not begin with NAME:")
		}
	case name:
		switch {
		case c == ':' && b.Withheld != "" && b.alike == len(b.Withheld):
			return broken("there is a trailer %s", b.Withheld)
		case c == ':':
			b.state = fieldValue
		case class[c]&token == 0:
			return broken("a trailer does not begin with NAME:")
		default:
			b.compare(c)
		}
	default: // fieldValue
		if c == '\r' {
			b.state = fieldLF
		} else if class[c]&value == 0 {
			return broken("a trailer has a control character")
		}
	}
	return nil
}

// compare takes a byte of a trailer's name.
func (b *Body) compare(c byte) {
	if c == '_' {
		c = '-'
	}
	if b.alike >= 0 && b.alike < len(b.Withheld) && lower[c] == b.Withheld[b.alike] {
		b.alike++
	} else {
		b.alike = -1
	}
}
