package main

import (
	"os"
	"slices"
	"strings"

	"github.com/weirmesh/weir/agent/attachpb"
)

// podArgs are what the runtime says about the pod, in CNI_ARGS.
type podArgs struct {
	Namespace, Name string
	UID             string // empty where the runtime sends none (containerd before 1.6)
}

// parseArgs reads CNI_ARGS: "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=front-0;…".
// Keys of others are passed over: which there are is between runtime and chain.
func parseArgs(s string) (podArgs, error) {
	var a podArgs
	for pair := range strings.SplitSeq(s, ";") {
		key, value, ok := strings.Cut(pair, "=")
		if !ok && pair != "" {
			return podArgs{}, attachpb.BadArgs.Fail("CNI_ARGS has %q, which is not KEY=VALUE", pair)
		}
		switch key {
		case "K8S_POD_NAMESPACE":
			a.Namespace = value
		case "K8S_POD_NAME":
			a.Name = value
		case "K8S_POD_UID":
			a.UID = value
		}
	}
	switch {
	case a.Namespace == "":
		return podArgs{}, attachpb.BadArgs.Fail("CNI_ARGS has no K8S_POD_NAMESPACE")
	case a.Name == "":
		return podArgs{}, attachpb.BadArgs.Fail("CNI_ARGS has no K8S_POD_NAME")
	}
	return a, nil
}

func (a podArgs) exempt(c conf) bool { return slices.Contains(c.ExemptNamespaces, a.Namespace) }

// node names this node in messages: who reads them has to find its agent.
func node() string {
	name, err := os.Hostname()
	if err != nil {
		return "this node"
	}
	return name
}
