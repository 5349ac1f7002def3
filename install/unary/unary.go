// Package unary makes gRPC calls of one message each way over a unix socket: two
// questions are all that the installer has, one to the container runtime and one
// to the agent, and gRPC's own package is larger than all the rest of it.
//
// Messages are bytes here; who calls knows their fields.
package unary

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
)

const maxAnswer = 16 << 20 // bytes, what containerd sends at most

// Call sends one message to a method, "/package.Service/Method", of the server
// behind a unix socket, and returns the message that answers it.
func Call(ctx context.Context, socket, method string, message []byte) ([]byte, error) {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{
		Protocols: protocols,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://localhost"+method, bytes.NewReader(frame(message)))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Content-Type", "application/grpc")
	request.Header.Set("TE", "trailers")
	response, err := transport.RoundTrip(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return nil, err
	}
	status := response.Trailer
	if status.Get("Grpc-Status") == "" {
		status = response.Header // an answer without a message
	}
	if code := status.Get("Grpc-Status"); code != "0" {
		return nil, fmt.Errorf("HTTP %d, gRPC status %q: %s", response.StatusCode, code, status.Get("Grpc-Message"))
	}
	return unframe(body)
}

// frame puts gRPC's five bytes before a message: not compressed, its length.
func frame(message []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
}

func unframe(body []byte) ([]byte, error) {
	if len(body) < 5 || body[0] != 0 || uint64(binary.BigEndian.Uint32(body[1:])) != uint64(len(body)-5) {
		return nil, errors.New("not one gRPC message")
	}
	return body[5:], nil
}
