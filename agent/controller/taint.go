package controller

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/agent/model"
)

// NotReadyTaint is the key of the taint that a node registers with (kubelet's
// --register-with-taints), whatever its value and effect: pods that do not tolerate
// it wait until the node's agent was ready once. Kubelet gives it to a Node that it
// makes, never to one that is there: after a reboot it is CNI STATUS that holds
// pods back. Nobody here adds it, so an agent that restarts costs a node nothing.
const NotReadyTaint = model.Prefix + "agent-not-ready"

// agentContainers are those of the agent's pod that must be ready: the first when
// the agent serves, the second when the node's CNI chain has weir-cni. A pod of the
// uninstall has no second one, and is ready without any capture.
var agentContainers = []string{"agent", "install"}

// clockSlack is how far the clocks of two API servers may be apart.
const clockSlack = 10 * time.Second

// node is what is known of a node.
type node struct {
	name     string
	version  string // resourceVersion
	made     time.Time
	taints   []corev1.Taint
	waiting  bool // has NotReadyTaint
	deletion bool // is being deleted
}

func toNode(n *corev1.Node) node {
	return node{
		name: n.Name, version: n.ResourceVersion, made: n.CreationTimestamp.Time, deletion: n.DeletionTimestamp != nil,
		taints: n.Spec.Taints, waiting: slices.ContainsFunc(n.Spec.Taints, isNotReady),
	}
}

func isNotReady(t corev1.Taint) bool { return t.Key == NotReadyTaint }

// agent is what is known of an agent's pod.
type agent struct {
	pod      string
	node     string
	made     time.Time
	deletion bool
	lacks    string    // what it is not ready for; empty: it is ready
	ready    time.Time // since when, by the node's clock
	ip       string
	serves   bool // can be asked, at ip
}

func toAgent(p *corev1.Pod) agent {
	a := agent{
		pod: p.Namespace + "/" + p.Name, node: p.Spec.NodeName,
		made: p.CreationTimestamp.Time, deletion: p.DeletionTimestamp != nil, lacks: "it is not ready", ip: p.Status.PodIP,
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			a.lacks, a.ready = "", c.LastTransitionTime.Time
		}
	}
	for _, name := range agentContainers {
		ready := slices.ContainsFunc(p.Status.ContainerStatuses, func(s corev1.ContainerStatus) bool {
			return s.Name == name && s.Ready
		})
		if !ready {
			a.lacks = "its container " + name + " is not ready"
		}
		if name == agentContainers[0] {
			a.serves = ready && a.ip != ""
		}
	}
	return a
}

// verdict is what to do about a node that has the taint.
type verdict struct {
	remove bool
	why    string
}

// judge says whether a tainted node may have its taint taken off, given the
// agents' pods that are bound to it.
func judge(n node, agents []agent) verdict {
	if n.deletion {
		return verdict{why: "the node is being deleted"}
	}
	why := "no pod of the agent's DaemonSet is on the node yet"
	for _, a := range agents {
		switch {
		case a.deletion:
			why = fmt.Sprintf("pod %s is ending, and another not ready yet", a.pod)
		case a.lacks != "":
			why = fmt.Sprintf("pod %s: %s", a.pod, a.lacks)
		case n.made.After(a.made.Add(clockSlack)) && !a.ready.After(n.made):
			// A machine may take the name of one that is gone before the pods of
			// that one are: their status is the old machine's.
			why = fmt.Sprintf("pod %s was ready before the node registered; if it does run there, delete it: the next one counts", a.pod)
		default:
			return verdict{remove: true, why: fmt.Sprintf("pod %s is ready", a.pod)}
		}
	}
	return verdict{why: why}
}

// withoutTaint is the merge patch that takes the taint off the node as it was seen:
// of one that has changed since, the API server says that there is a conflict.
func (n node) withoutTaint() ([]byte, error) {
	taints := slices.DeleteFunc(slices.Clone(n.taints), isNotReady)
	if len(taints) == 0 {
		taints = nil // null removes the field
	}
	type object = map[string]any
	return json.Marshal(object{
		"metadata": object{"resourceVersion": n.version},
		"spec":     object{"taints": taints},
	})
}
