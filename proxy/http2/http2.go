// Package http2 carries HTTP/2 streams from connections that clients made to
// connections that it makes itself (RFC 9113, prior knowledge).
//
// A [ServerConn] reads a client's frames and calls its Handler once per new
// stream. The handler answers by itself ([Stream.Respond]) or lets a [Client],
// which holds the connections to one endpoint, open a stream there
// ([Client.Open]). From then on the two are one: header blocks, bodies, trailers,
// resets and ends go from either side to the other, on the goroutine that reads
// them: a [Poller]'s, for as long as nothing must be waited for, else the
// connection's. There is no goroutine per stream; one that writes exists only while
// a socket has no room.
//
// Flow control is chained. A sender gets back the window of its stream as the
// other side takes the bytes, and that of its connection at once, so a stream that
// nobody reads stands still alone. What it holds is bounded: see streamWindow.
// Frames are gathered, those of many connections for one too, and written when there
// is nothing left to read.
//
// What a request means, where it goes and whether it is tried again is not for
// this package; see [Observer] for what it tells about a stream's life.
package http2

import (
	"errors"
	"fmt"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Code is an error code of HTTP/2 (RFC 9113, section 7).
type Code = xhttp2.ErrCode

// Field is a header field. Names are in lower case; those of pseudo-header fields
// begin with a colon and come first.
type Field = hpack.HeaderField

// What a peer can make the proxy keep.
const (
	// streamWindow is what a peer may send on a stream before the other side has
	// taken it. A stream whose bytes move on gets more, up to maxStreamWindow, of
	// what all streams of the connection share: sharedWindow. So a connection with
	// one stream holds at most 128 KiB in a direction, and each stream more 32 KiB.
	streamWindow    = 32 << 10
	maxStreamWindow = 128 << 10
	sharedWindow    = maxStreamWindow - streamWindow

	// connWindow is what a peer may have under way on a connection. It gets it back
	// as it arrives, whatever becomes of the streams.
	connWindow = 1 << 20

	defaultWindow = 65535 // RFC 9113, section 6.9.2: until SETTINGS say otherwise

	// maxFrame is the largest frame read, and the largest written, which is the
	// least that any peer takes.
	maxFrame = 16 << 10

	// outputLimit is up to what bodies are queued for a socket that has no room.
	// Frames that may not wait go beyond it, up to outputCap.
	outputLimit = 32 << 10
	outputCap   = 1 << 20

	// A header block, decoded, as SETTINGS_MAX_HEADER_LIST_SIZE counts it. A request
	// over maxHeaderList is answered 431; one over maxBlock, or in more than
	// maxContinuations frames more, ends the connection.
	maxHeaderList    = 64 << 10
	maxBlock         = 16 * maxHeaderList
	maxContinuations = 32

	headerTable = 4 << 10 // of either direction's compression

	lingering = time.Second // for a peer to read why its connection ends

	// assumedStreams is how many streams a peer takes until it says (section 6.5.2).
	assumedStreams = 100

	maxStreamID = 1<<31 - 1
	maxWindow   = 1<<31 - 1 // section 6.9.1
)

// Timeouts of a connection. Zero values stand for the defaults. They are looked at
// now and then, so each may last a quarter longer.
type Timeouts struct {
	// Frame is the time for a frame to arrive that has begun, for a header block
	// with all its frames, and for a client's preface. 20 s.
	Frame time.Duration
	// Write is how long a peer may take nothing of what is written to it. 60 s.
	Write time.Duration
	// Idle is how long a connection without streams is kept. 10 minutes.
	Idle time.Duration
	// Ping is after how much silence a peer is asked whether it is there; it then
	// has half of that to answer. Zero: never. Servers of gRPC end a connection on
	// which they are asked more than once in five minutes, or two hours while it is
	// idle; for those TCP's keepalive must do, which is always on.
	Ping time.Duration
}

func (t Timeouts) withDefaults() Timeouts {
	for _, d := range []struct {
		value    *time.Duration
		fallback time.Duration
	}{{&t.Frame, 20 * time.Second}, {&t.Write, time.Minute}, {&t.Idle, 10 * time.Minute}} {
		if *d.value == 0 {
			*d.value = d.fallback
		}
	}
	return t
}

// interval is how often the deadlines are looked at.
func (t Timeouts) interval() time.Duration {
	shortest := min(t.Frame, t.Write, t.Idle)
	if t.Ping > 0 {
		shortest = min(shortest, t.Ping/2)
	}
	return shortest / 4
}

// Errors of streams and connections. They are wrapped; test with errors.Is.
var (
	// ErrClosed is a connection that its owner closed.
	ErrClosed = errors.New("closed")
	// ErrMalformed is a message that breaks a rule of HTTP.
	ErrMalformed = errors.New("malformed message")
	// ErrHeaderTooLarge is a header block over 64 KiB.
	ErrHeaderTooLarge = errors.New("header block over 64 KiB")
	// ErrAbuse is a peer that makes work without purpose, or does not take what it
	// asked for.
	ErrAbuse = errors.New("peer floods")
	// ErrTimeout is one of the Timeouts.
	ErrTimeout = errors.New("timeout")
	// ErrAttemptTimeout is an attempt that took longer than Stream.Attempt.
	ErrAttemptTimeout = errors.New("the attempt's time is over")
	// ErrGoAway is a stream that the upstream's GOAWAY excludes.
	ErrGoAway = errors.New("upstream goes away")
	// ErrBusy is an upstream that takes no more streams on as many connections as
	// are allowed.
	ErrBusy = errors.New("upstream takes no more streams")
	// ErrClient is a stream that ends by the client's doing: it broke a rule, or its
	// connection is gone.
	ErrClient = errors.New("client")
	// ErrDial is a connection that could not be made.
	ErrDial = errors.New("dial")
	// ErrNotReplayable is a stream opened anew of which more had gone up than was kept.
	ErrNotReplayable = errors.New("request cannot be sent again")
	// ErrDeclined is an answer that the Observer did not want.
	ErrDeclined = errors.New("answer declined")
)

// ResetError is a RST_STREAM that was received.
type ResetError struct {
	Code     Code
	Upstream bool // it was the upstream's, not the client's
}

func (e *ResetError) Error() string {
	who := "client"
	if e.Upstream {
		who = "upstream"
	}
	return fmt.Sprintf("stream reset by the %s: %v", who, e.Code)
}

// connError ends a connection with GOAWAY.
type connError struct {
	code Code
	err  error
}

func (e *connError) Error() string { return fmt.Sprintf("%v: %v", e.code, e.err) }
func (e *connError) Unwrap() error { return e.err }

func protocolError(what string) error {
	return &connError{code: xhttp2.ErrCodeProtocol, err: fmt.Errorf("%w: %s", ErrMalformed, what)}
}
