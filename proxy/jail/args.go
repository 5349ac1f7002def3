package jail

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/agent/proxypb"
)

// ServeArg is the first argument of the second stage.
const ServeArg = "serve"

// keepNetRawArg follows the pod's name where it is so, and after it comes identityArg
// with the descriptor of a memory file where there is one.
const (
	keepNetRawArg = "keep-net-raw"
	identityArg   = "identity="
)

// Launched is what the second stage knows of its launch.
type Launched struct {
	ContainerID string
	Generation  uint32
	Pod         string // "namespace/name"
	KeepNetRaw  bool   // it has CAP_NET_RAW, to use callers' addresses
	Identity    int    // descriptor of the memory file of an earlier proxy's identity; -1: none
	Listeners   []Listener
}

// Args renders the second stage's argument list. identity is the descriptor of a memory
// file; -1: none.
func Args(msg *proxypb.Launch, listeners []Listener, identity int) []string {
	args := []string{
		"weir-proxy", ServeArg, msg.GetContainerId(), strconv.FormatUint(uint64(msg.GetGeneration()), 10),
		msg.GetPodNamespace() + "/" + msg.GetPodName(),
	}
	if msg.GetKeepNetRaw() {
		args = append(args, keepNetRawArg)
	}
	if identity >= 0 {
		args = append(args, identityArg+strconv.Itoa(identity))
	}
	for _, l := range listeners {
		args = append(args, strings.Join([]string{l.GetName(), l.GetNetwork(), l.GetAddress(), strconv.Itoa(l.FD)}, ","))
	}
	return args
}

// ParseArgs is the inverse of Args.
func ParseArgs(args []string) (Launched, error) {
	if len(args) < 6 || args[1] != ServeArg {
		return Launched{}, fmt.Errorf("%q: these arguments come from the first stage", args)
	}
	generation, err := strconv.ParseUint(args[3], 10, 32)
	if err != nil {
		return Launched{}, fmt.Errorf("generation: %w", err)
	}
	out := Launched{ContainerID: args[2], Generation: uint32(generation), Pod: args[4], Identity: -1}
	rest := args[5:]
	if rest[0] == keepNetRawArg {
		out.KeepNetRaw, rest = true, rest[1:]
	}
	if len(rest) > 0 && strings.HasPrefix(rest[0], identityArg) {
		fd, err := strconv.ParseUint(rest[0][len(identityArg):], 10, 31)
		if err != nil {
			return Launched{}, fmt.Errorf("identity %q: %w", rest[0], err)
		}
		out.Identity, rest = int(fd), rest[1:]
	}
	for _, arg := range rest {
		f := strings.Split(arg, ",")
		if len(f) != 4 {
			return Launched{}, fmt.Errorf("listener %q: want name,network,address,descriptor", arg)
		}
		fd, err := strconv.ParseUint(f[3], 10, 31)
		if err != nil {
			return Launched{}, fmt.Errorf("listener %q: %w", arg, err)
		}
		l := &proxypb.Listener{Name: f[0], Network: f[1], Address: f[2]}
		if _, err := listenAddress(l); err != nil {
			return Launched{}, err
		}
		out.Listeners = append(out.Listeners, Listener{Listener: l, FD: int(fd)})
	}
	return out, nil
}

// kept are the variables that reach the second stage: an empty root blinds the Go
// runtime to its cgroup's limits.
var kept = []string{"GOMAXPROCS", "GOMEMLIMIT", "GODEBUG"}

// environment leaves only what is kept.
func environment(env []string) []string {
	var out []string
	for _, kv := range env {
		if name, _, ok := strings.Cut(kv, "="); ok && slices.Contains(kept, name) {
			out = append(out, kv)
		}
	}
	return out
}
