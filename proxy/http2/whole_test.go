package http2

import (
	"bytes"
	"errors"
	"net"
	"strings"
	"testing"

	"golang.org/x/net/http2"
)

// dry is a connection of which nothing more comes.
type dry struct{ net.Conn }

var errDry = errors.New("who polls has read further")

func (dry) Read([]byte) (int, error) { return 0, errDry }

// FuzzWhole: of frames that are said to be there nothing has to be waited for, whatever
// they are.
func FuzzWhole(f *testing.F) {
	var buf bytes.Buffer
	framer := http2.NewFramer(&buf, nil)
	framer.AllowIllegalWrites = true
	seed := func(write func()) {
		buf.Reset()
		write()
		f.Add(bytes.Clone(buf.Bytes()))
	}
	seed(func() {
		_ = framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
		_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x82}})
		_ = framer.WriteContinuation(1, false, []byte{0x86})
		_ = framer.WriteContinuation(1, true, []byte{0x84})
		_ = framer.WriteDataPadded(1, true, []byte("body"), []byte{0, 0})
	})
	seed(func() {
		for range maxContinuations + 2 {
			_ = framer.WriteContinuation(1, false, nil)
		}
	})
	seed(func() { _ = framer.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersPriority, 1, []byte{1}) })
	seed(func() {
		_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1})
		_ = framer.WritePing(false, [8]byte{})
	})
	f.Add([]byte{0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1})
	f.Add([]byte(strings.Repeat("\x00", frameHeader)))
	f.Fuzz(func(t *testing.T, sent []byte) {
		here, there := net.Pipe()
		defer there.Close()
		server := &Server{Handler: func(turn *Turn, s *Stream) { s.Respond(turn, 204, nil, nil) }}
		c := server.NewConn(dry{here}, sent)
		defer c.Close()
		var err error
		for err == nil && c.in.whole() {
			err = c.frame()
		}
		if errors.Is(err, errDry) {
			t.Error(err)
		}
	})
}
