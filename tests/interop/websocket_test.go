package interop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// patience is how long one exchange may take.
const patience = 20 * time.Second

const (
	webSocketPort = 8090
	idlePort      = 8091
)

var (
	toWebSocket  = declare("websocket", webSocketPort, "http")
	toDeclaredWS = declare("websocket-ws", webSocketPort, "kubernetes.io/ws")
	toIdle       = declare("idle", idlePort, "http")
)

// closePath is where a server closes, with the code and the reason of the message
// it gets.
const closePath = "/close"

// serveWebSocket serves echoes on a port of called until the test ends. A message
// is sent back in fragments of 1000 bytes.
func serveWebSocket(t *testing.T, port uint16) {
	t.Helper()
	upgrader := websocket.Upgrader{WriteBufferSize: 1000}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ws, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return // the client was told
		}
		defer ws.Close()
		for {
			kind, message, err := ws.ReadMessage()
			if err != nil {
				return // the client has closed, and was answered
			}
			if r.URL.Path == closePath {
				kind = websocket.CloseMessage
			}
			if err := sendFragments(ws, kind, message); err != nil {
				return
			}
		}
	})}
	l := listen(t, port)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
}

// sendFragments sends a message in frames of the connection's write buffer; those
// of control have one.
func sendFragments(ws *websocket.Conn, kind int, message []byte) error {
	if kind == websocket.CloseMessage {
		return ws.WriteControl(kind, message, time.Now().Add(patience))
	}
	w, err := ws.NextWriter(kind)
	if err != nil {
		return err
	}
	if _, err := w.Write(message); err != nil {
		return err
	}
	return w.Close()
}

// openWebSocket connects from caller. The connection ends with the test.
func openWebSocket(t *testing.T, url string) *websocket.Conn {
	t.Helper()
	dialer := websocket.Dialer{
		NetDialContext:   func(ctx context.Context, _, addr string) (net.Conn, error) { return dial(ctx, addr) },
		HandshakeTimeout: patience, WriteBufferSize: 1000,
	}
	ws, response, err := dialer.Dial(url, nil)
	if err != nil {
		t.Fatalf("%s: %v", url, err)
	}
	response.Body.Close()
	t.Cleanup(func() { ws.Close() })
	return ws
}

// expectEcho sends a message and waits for it.
func expectEcho(ws *websocket.Conn, kind int, message []byte) error {
	_ = ws.SetReadDeadline(time.Now().Add(patience))
	sent := make(chan error, 1)
	go func() { sent <- sendFragments(ws, kind, message) }()
	gotKind, got, err := ws.ReadMessage()
	if err := errors.Join(err, <-sent); err != nil {
		return err
	}
	if gotKind != kind || !bytes.Equal(got, message) {
		return fmt.Errorf("got %d bytes of kind %d, want the %d of kind %d that were sent", len(got), gotKind, len(message), kind)
	}
	return nil
}

func TestWebSocketIsPassedOnFrameByFrame(t *testing.T) {
	throughBoth(t)
	serveWebSocket(t, webSocketPort)
	for name, host := range map[string]string{
		"declared http": toWebSocket.String(),
		"declared ws":   toDeclaredWS.String(),
		"undeclared":    on(webSocketPort).String(),
	} {
		t.Run(name, func(t *testing.T) {
			t.Run("messages in fragments", func(t *testing.T) {
				ws := openWebSocket(t, "ws://"+host+"/")
				random := rand.NewChaCha8([32]byte{8})
				for _, size := range []int{0, 1, 125, 126, 999, 1001, 64 << 10, 16 << 20} {
					message := make([]byte, size)
					_, _ = random.Read(message)
					if err := expectEcho(ws, websocket.BinaryMessage, message); err != nil {
						t.Errorf("%d bytes: %v", size, err)
					}
				}
			})
			t.Run("control frames between fragments", func(t *testing.T) { expectControlBetween(t, "ws://"+host+"/") })
			t.Run("close codes", func(t *testing.T) {
				for _, code := range []int{
					websocket.CloseNormalClosure, websocket.CloseGoingAway, websocket.CloseProtocolError, websocket.CloseUnsupportedData,
					websocket.CloseInvalidFramePayloadData, websocket.CloseMessageTooBig, websocket.CloseInternalServerErr, 3000, 4999,
				} {
					// The client begins, the server answers; then the other way round.
					for _, path := range []string{"/", closePath} {
						ws := openWebSocket(t, "ws://"+host+path)
						kind := map[string]int{"/": websocket.CloseMessage, closePath: websocket.BinaryMessage}[path]
						_ = ws.SetReadDeadline(time.Now().Add(patience))
						reason := "because"
						if path == "/" {
							reason = "" // gorilla answers with the code alone
						}
						if err := sendFragments(ws, kind, websocket.FormatCloseMessage(code, reason)); err != nil {
							t.Fatal(err)
						}
						var closed *websocket.CloseError
						if _, _, err := ws.ReadMessage(); !errors.As(err, &closed) || closed.Code != code || closed.Text != reason {
							t.Errorf("%s: %v, want %d %q", path, err, code, reason)
						}
					}
				}
			})
		})
	}
}

// expectControlBetween sends pings between a message's fragments, and expects each
// pong while the message is not complete, then the message.
func expectControlBetween(t *testing.T, url string) {
	ws := openWebSocket(t, url)
	pongs := make(chan string, 10)
	ws.SetPongHandler(func(said string) error {
		pongs <- said
		return nil
	})
	received := make(chan []byte, 1)
	failed := make(chan error, 1)
	go func() {
		_, message, err := ws.ReadMessage()
		if err != nil {
			failed <- err
			return
		}
		received <- message
	}()
	w, err := ws.NextWriter(websocket.TextMessage)
	if err != nil {
		t.Fatal(err)
	}
	var message []byte
	for i := range 5 {
		fragment := bytes.Repeat([]byte{byte('a' + i)}, 1500) // more than a frame
		message = append(message, fragment...)
		if _, err := w.Write(fragment); err != nil {
			t.Fatal(err)
		}
		if err := ws.WriteControl(websocket.PingMessage, fragment[:1], time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		select {
		case said := <-pongs:
			if said != string(fragment[:1]) {
				t.Errorf("pong %q, want %q", said, fragment[:1])
			}
		case err := <-failed:
			t.Fatal(err)
		case <-time.After(patience):
			t.Fatal("no pong")
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-received:
		if !bytes.Equal(got, message) {
			t.Errorf("got %d bytes, want the %d that were sent", len(got), len(message))
		}
	case err := <-failed:
		t.Fatal(err)
	case <-time.After(patience):
		t.Fatal("no message")
	}
}

// TestIdleWebSocketsStillWork after longer than any deadline of the proxies that
// is for heads and for sniffing.
func TestIdleWebSocketsStillWork(t *testing.T) {
	throughBoth(t)
	t.Parallel()
	serveWebSocket(t, idlePort)
	url := "ws://" + toIdle.String() + "/"
	var all []*websocket.Conn
	for range 200 {
		ws := openWebSocket(t, url)
		if err := expectEcho(ws, websocket.TextMessage, []byte("before")); err != nil {
			t.Fatal(err)
		}
		all = append(all, ws)
	}
	time.Sleep(idleTime)
	for i, ws := range all {
		if err := expectEcho(ws, websocket.TextMessage, []byte("after")); err != nil {
			t.Errorf("connection %d: %v", i, err)
		}
	}
}

// idleTime is longer than a head may take (30 s).
const idleTime = 32 * time.Second
