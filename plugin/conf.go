package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/weirmesh/weir/agent/attachpb"
)

// conf is weir-cni's entry in the CNI chain. weir-install writes it.
type conf struct {
	// cni is the runtime's part, with the result of the plugin before this one.
	cni types.PluginConf

	// Socket is the agent's unix socket; beside it lies the boot marker.
	Socket string
	// ExemptNamespaces are never captured and never asked about, so that what
	// the cluster itself needs starts without an agent.
	ExemptNamespaces []string
	// Timeout bounds the whole of ADD.
	Timeout time.Duration
	// Backend is auto, nftables or iptables.
	Backend string
	// LockDir is where iptables' lock files go, one per container: with the
	// common one, every pod of the node would wait for every other.
	LockDir string
}

const (
	backendAuto     = "auto"
	backendNFTables = "nftables"
	backendIPTables = "iptables"

	minTimeout = 100 * time.Millisecond
	// A hung ADD can block every ADD of a node.
	maxTimeout = time.Minute

	readyMarker = "ready" // in the socket's folder; the agent writes it once per boot
	maxSunPath  = 107     // bytes of a unix socket's path, sun_path of unix(7)
)

func defaults() conf {
	return conf{
		Socket:           "/run/weir/attach.sock",
		ExemptNamespaces: []string{"kube-system", "weir-system"},
		Timeout:          5 * time.Second,
		Backend:          backendAuto,
		LockDir:          "/run/weir/lock",
	}
}

// ourKeys are compared as they are written: encoding/json would take "Socket" for
// "socket".
var ourKeys = []string{"type", "socket", "exemptNamespaces", "timeout", "backend", "lockDir"}

// ours is the wire form of what is ours. Pointers tell "left out" from "empty":
// an empty list of exempt namespaces means none.
type ours struct {
	Type             *string   `json:"type"`
	Socket           *string   `json:"socket"`
	ExemptNamespaces *[]string `json:"exemptNamespaces"`
	Timeout          *string   `json:"timeout"`
	Backend          *string   `json:"backend"`
	LockDir          *string   `json:"lockDir"`
}

// runtimeKeys belong to the runtime or to the specification. Keys that begin
// with "cni.dev/" do too.
var runtimeKeys = []string{"cniVersion", "cniVersions", "name", "prevResult", "runtimeConfig", "capabilities", "args", "dns", "ipam"}

// parseConf reads a configuration strictly: a key that is misspelt would
// otherwise be a setting that silently is not there.
func parseConf(stdin []byte) (conf, error) {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(stdin, &keys); err != nil {
		return conf{}, attachpb.BadInput.Fail("standard input is not a JSON object: %v", err)
	}
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		if !slices.Contains(ourKeys, k) && !slices.Contains(runtimeKeys, k) && !strings.HasPrefix(k, "cni.dev/") {
			return conf{}, attachpb.BadConfig.Fail("unknown key %q", k)
		}
	}
	var in ours
	if err := json.Unmarshal(stdin, &in); err != nil {
		return conf{}, attachpb.BadConfig.Fail("%v", strings.TrimPrefix(err.Error(), "json: "))
	}
	c := defaults()
	if err := in.into(&c); err != nil {
		return conf{}, attachpb.BadConfig.Fail("%v", err)
	}
	if err := json.Unmarshal(stdin, &c.cni); err != nil {
		return conf{}, attachpb.BadInput.Fail("%v", err)
	}
	return c, nil
}

func (in ours) into(c *conf) error {
	if in.Type == nil || *in.Type == "" {
		return fmt.Errorf("type is missing")
	}
	if in.Socket != nil {
		c.Socket = *in.Socket
	}
	if !filepath.IsAbs(c.Socket) || len(c.Socket) > maxSunPath {
		return fmt.Errorf("socket: %q is not an absolute path of at most %d bytes", c.Socket, maxSunPath)
	}
	if in.ExemptNamespaces != nil {
		c.ExemptNamespaces = *in.ExemptNamespaces
	}
	if slices.Contains(c.ExemptNamespaces, "") {
		return fmt.Errorf("exemptNamespaces: there is an empty name")
	}
	if in.Timeout != nil {
		d, err := time.ParseDuration(*in.Timeout)
		if err != nil {
			return fmt.Errorf("timeout: %q is not a duration like 5s", *in.Timeout)
		}
		if d < minTimeout || d > maxTimeout {
			return fmt.Errorf("timeout: %s is not between %s and %s", d, minTimeout, maxTimeout)
		}
		c.Timeout = d
	}
	if in.Backend != nil {
		c.Backend = *in.Backend
	}
	if !slices.Contains([]string{backendAuto, backendNFTables, backendIPTables}, c.Backend) {
		return fmt.Errorf("backend: %q is none of auto, nftables, iptables", c.Backend)
	}
	if in.LockDir != nil {
		c.LockDir = *in.LockDir
	}
	if !filepath.IsAbs(c.LockDir) {
		return fmt.Errorf("lockDir: %q is not an absolute path", c.LockDir)
	}
	return nil
}

// prevResult reads the result of the plugin before this one, which is what there
// is to pass on.
func (c *conf) prevResult() (types.Result, error) {
	if c.cni.RawPrevResult == nil {
		return nil, attachpb.NoPrevResult.Fail("")
	}
	// The conversions of package types (1.3.1) follow null pointers.
	for _, list := range []string{"ips", "interfaces", "routes"} {
		if items, ok := c.cni.RawPrevResult[list].([]any); ok && slices.Contains(items, any(nil)) {
			return nil, attachpb.BadInput.Fail("prevResult: %s has a null in it", list)
		}
	}
	if err := version.ParsePrevResult(&c.cni); err != nil {
		return nil, attachpb.BadInput.Fail("prevResult: %v", err)
	}
	return c.cni.PrevResult, nil
}
