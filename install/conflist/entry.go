package conflist

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"time"
)

// PluginType is our entry's type: the name of the program that runs it.
const PluginType = "weir-cni"

// Entry is what weir-cni is told on a node. It needs no capabilities.
type Entry struct {
	// Socket is the agent's unix socket, a path as the host sees it.
	Socket string
	// ExemptNamespaces are never captured and never asked about.
	ExemptNamespaces []string
	// Timeout bounds the whole of an ADD.
	Timeout time.Duration
	// Backend is auto, nftables or iptables.
	Backend string
}

// encode returns the entry as compact JSON. Every option is written, also one
// that has its default: what a node does can be read in its chain.
func (e Entry) encode() ([]byte, error) {
	exempt := e.ExemptNamespaces
	if exempt == nil {
		exempt = []string{} // null would mean the plugin's default
	}
	out, err := json.Marshal(struct {
		Type             string   `json:"type"`
		Socket           string   `json:"socket"`
		ExemptNamespaces []string `json:"exemptNamespaces"`
		Timeout          string   `json:"timeout"`
		Backend          string   `json:"backend"`
	}{PluginType, e.Socket, exempt, e.Timeout.String(), e.Backend})
	if err != nil {
		return nil, fmt.Errorf("encode the entry: %w", err)
	}
	return out, nil
}

// same says whether two JSON values mean the same.
func same(a, b []byte) bool {
	var left, right any
	if json.Unmarshal(a, &left) != nil || json.Unmarshal(b, &right) != nil {
		return false
	}
	return reflect.DeepEqual(left, right)
}

// layout is how the objects of a chain are written: what stands between "{" and
// the first key, and between the last value and "}". It is taken from the entry
// before ours, so that ours looks like it.
type layout struct {
	open, close string
}

func layoutOf(object []byte) layout {
	inside := object[1 : len(object)-1]
	open := inside[:len(inside)-len(bytes.TrimLeft(inside, space))]
	closing := inside[len(bytes.TrimRight(inside, space)):]
	if !bytes.ContainsRune(open, '\n') || !bytes.ContainsRune(closing, '\n') {
		return layout{} // on one line
	}
	return layout{string(open), string(closing)}
}

// write renders a compact JSON object of ours in this layout. Values are kept on
// one line.
func (l layout) write(compact []byte) ([]byte, error) {
	if l.open == "" {
		return compact, nil
	}
	members, err := membersOf(compact)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	out.WriteByte('{')
	for i, m := range members {
		if i > 0 {
			out.WriteByte(',')
		}
		fmt.Fprintf(&out, "%s%q: %s", l.open, m.key, compact[m.start:m.end])
	}
	out.WriteString(l.close)
	out.WriteByte('}')
	return out.Bytes(), nil
}
