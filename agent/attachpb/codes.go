// Package attachpb is what the plugin and the agent say to each other: the gRPC
// service on the attach socket, capture.Spec on the wire, and the codes of errors
// that a pod's owner gets to see.
package attachpb

import "fmt"

// Code is one way an attachment fails, as the pod's owner sees it at the end of
// the message: "… [WEIR-C003]". plugin/CODES.md lists them all, held to this
// table by a test.
type Code struct {
	ID     string
	CNI    uint   // error code of the CNI specification ("Error", 1.1.0), or ≥ 100 for ours
	Cause  string // what happened
	Next   string // what happens next
	Remedy string // what to do
}

// Error codes of the CNI specification 1.1.0, section "Error".
const (
	cniContainerUnknown = 3
	cniInvalidEnv       = 4
	cniIO               = 5
	cniDecode           = 6
	cniInvalidConfig    = 7
	cniTryAgainLater    = 11
	cniNotAvailable     = 50
	cniRefused          = 100 // ours: the pod asks for what cannot be had
)

// All codes, in order of number. IDs are never reused.
var (
	BadConfig = Code{"WEIR-C001", cniInvalidConfig, "the plugin's configuration is not valid",
		"no pod starts on this node", "correct the weir-cni entry in the CNI chain, or run weir-install again"}
	BadArgs = Code{"WEIR-C002", cniInvalidEnv, "the container runtime left out an argument",
		"the pod waits, kubelet retries", "use a runtime that sets what the CNI specification asks for, and K8S_POD_NAMESPACE and K8S_POD_NAME in CNI_ARGS"}
	AgentAway = Code{"WEIR-C003", cniTryAgainLater, "the node's agent does not answer",
		"the pod waits, kubelet retries", "kubectl -n weir-system logs -l app=weir-agent"}
	PodUnknown = Code{"WEIR-C004", cniTryAgainLater, "the agent does not know this pod, or knows another of its name",
		"the pod waits, kubelet retries", "if it stays so, check the agent's connection to the API server"}
	WrongNamespace = Code{"WEIR-C005", cniContainerUnknown, "the network namespace is gone or is not the pod's",
		"the pod waits, kubelet retries with a new sandbox", "if it stays so, look at the container runtime's log"}
	InvalidRequest = Code{"WEIR-C006", cniRefused, "a weirmesh.io label or annotation means nothing",
		"the pod waits until it is corrected", "correct the label or annotation named in the message"}
	ProxyFailed = Code{"WEIR-C007", cniTryAgainLater, "the pod's proxy did not start",
		"the pod waits, kubelet retries", "kubectl -n weir-system logs -l app=weir-agent"}
	RulesFailed = Code{"WEIR-C008", cniIO, "the capture rules could not be put into the pod's namespace",
		"the pod waits, kubelet retries", "the node needs nf_tables (Linux 5.13) or iptables with the cgroup match"}
	NoPrevResult = Code{"WEIR-C009", cniInvalidConfig, "there is no prevResult",
		"no pod starts on this node", "weir-cni must be chained behind a primary CNI plugin"}
	Unsupported = Code{"WEIR-C010", cniRefused, "this pod cannot be captured on this node",
		"the pod waits", "label it weirmesh.io/capture=disabled, or see the message"}
	NotReady = Code{"WEIR-C011", cniNotAvailable, "the node's agent has not been ready since this boot",
		"the node is not ready for pods yet", "kubectl -n weir-system get pods -l app=weir-agent -o wide"}
	Drifted = Code{"WEIR-C013", cniRefused + 1, "the pod's capture is not as it should be",
		"the agent repairs it within 30 s", "kubectl -n weir-system logs -l app=weir-agent"}
	BadInput = Code{"WEIR-C012", cniDecode, "the configuration on standard input cannot be decoded",
		"no pod starts on this node", "look at the file in the CNI configuration folder"}
)

// Codes lists every code.
func Codes() []Code {
	return []Code{BadConfig, BadArgs, AgentAway, PodUnknown, WrongNamespace, InvalidRequest, ProxyFailed,
		RulesFailed, NoPrevResult, Unsupported, NotReady, BadInput, Drifted}
}

// CodeByID finds a code by its ID.
func CodeByID(id string) (Code, bool) {
	for _, c := range Codes() {
		if c.ID == id {
			return c, true
		}
	}
	return Code{}, false
}

// Failure is an error with a code. Its text is one line: cause, what happens
// next, what to do, the code.
type Failure struct {
	Code   Code
	Detail string // the cause in this case; empty: the code's own words
}

// Fail makes a Failure; detail says what happened in this case.
func (c Code) Fail(format string, args ...any) *Failure {
	return &Failure{Code: c, Detail: fmt.Sprintf(format, args...)}
}

func (f *Failure) Error() string {
	cause := f.Detail
	if cause == "" {
		cause = f.Code.Cause
	}
	return fmt.Sprintf("weir: %s; %s. %s [%s]", cause, f.Code.Next, f.Code.Remedy, f.Code.ID)
}
