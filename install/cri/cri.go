// Package cri asks a container runtime which CNI plugins it has loaded for pods.
//
// It is one question, Status of CRI v1 with "verbose", whose answer contains the
// configuration in use with containerd (since 1.2), drop-ins included where its
// libcni reads them; other runtimes do not tell. gRPC and the answer's three
// fields are spelled out, as CRI's own package would bring all of Kubernetes'.
//
// It starts no container and asks for nothing else, and knows no files: place does.
package cri

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"

	"google.golang.org/protobuf/encoding/protowire"
)

const (
	method    = "/runtime.v1.RuntimeService/Status"
	maxAnswer = 16 << 20 // bytes, what containerd sends at most
)

// ErrNotTold is a runtime that answers, and does not say what it has loaded.
var ErrNotTold = errors.New("the runtime does not tell its CNI configuration")

// Loaded returns the types of the plugins that the runtime behind a unix socket
// has loaded, those of the loopback network included.
func Loaded(ctx context.Context, socket string) ([]string, error) {
	answer, err := call(ctx, socket)
	if err != nil {
		return nil, fmt.Errorf("ask the runtime at %s: %w", socket, err)
	}
	info, err := entry(answer, "cniconfig")
	if err != nil {
		return nil, fmt.Errorf("ask the runtime at %s: %w", socket, err)
	}
	return types(info)
}

// call makes the one request, and returns the message that answers it.
func call(ctx context.Context, socket string) ([]byte, error) {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{
		Protocols: protocols,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}
	defer transport.CloseIdleConnections()
	message := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 1) // verbose
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

// entry finds a value of StatusResponse's map "info", field 2.
func entry(message []byte, key string) ([]byte, error) {
	for pair, err := range fields(message, 2) {
		if err != nil {
			return nil, err
		}
		var name, value []byte
		for v := range fields(pair, 1) {
			name = v
		}
		for v := range fields(pair, 2) {
			value = v
		}
		if string(name) == key {
			return value, nil
		}
	}
	return nil, ErrNotTold
}

// fields are the values of a message's fields with a number and a length.
func fields(message []byte, number protowire.Number) func(func([]byte, error) bool) {
	return func(yield func([]byte, error) bool) {
		for rest := message; len(rest) > 0; {
			n, kind, size := protowire.ConsumeTag(rest)
			if size < 0 {
				yield(nil, protowire.ParseError(size))
				return
			}
			rest = rest[size:]
			size = protowire.ConsumeFieldValue(n, kind, rest)
			if size < 0 {
				yield(nil, protowire.ParseError(size))
				return
			}
			if n == number && kind == protowire.BytesType {
				if value, _ := protowire.ConsumeBytes(rest); !yield(value, nil) {
					return
				}
			}
			rest = rest[size:]
		}
	}
}

// types reads what containerd has loaded, as go-cni prints it: each plugin with
// its source.
func types(info []byte) ([]string, error) {
	var loaded struct {
		Networks []struct {
			Config struct {
				Plugins []struct{ Source string }
			}
		}
	}
	if err := json.Unmarshal(info, &loaded); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotTold, err)
	}
	if len(loaded.Networks) == 0 {
		return nil, fmt.Errorf("%w: it has none", ErrNotTold)
	}
	var out []string
	for _, network := range loaded.Networks {
		for _, plugin := range network.Config.Plugins {
			var p struct{ Type string }
			if err := json.Unmarshal([]byte(plugin.Source), &p); err != nil {
				return nil, fmt.Errorf("%w: %w", ErrNotTold, err)
			}
			out = append(out, p.Type)
		}
	}
	return out, nil
}
