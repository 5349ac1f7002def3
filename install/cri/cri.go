// Package cri asks a container runtime which CNI plugins it has loaded for pods.
//
// It is one question, Status of CRI v1 with "verbose", whose answer contains the
// configuration in use with containerd (since 1.2), drop-ins included where its
// libcni reads them; other runtimes do not tell. The answer's three fields are
// spelled out, as CRI's own package would bring all of Kubernetes'.
//
// It starts no container and asks for nothing else, and knows no files: place does.
package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/weirmesh/weir/install/unary"
)

const method = "/runtime.v1.RuntimeService/Status"

// ErrNotTold is a runtime that answers, and does not say what it has loaded.
var ErrNotTold = errors.New("the runtime does not tell its CNI configuration")

// Loaded returns the types of the plugins that the runtime behind a unix socket
// has loaded, those of the loopback network included.
func Loaded(ctx context.Context, socket string) ([]string, error) {
	verbose := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 1)
	answer, err := unary.Call(ctx, socket, method, verbose)
	if err != nil {
		return nil, fmt.Errorf("ask the runtime at %s: %w", socket, err)
	}
	info, err := entry(answer, "cniconfig")
	if err != nil {
		return nil, fmt.Errorf("ask the runtime at %s: %w", socket, err)
	}
	return types(info)
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
