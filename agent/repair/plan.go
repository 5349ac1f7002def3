package repair

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"

	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/agent/decide"
	"github.com/weirmesh/weir/agent/launch"
	"github.com/weirmesh/weir/agent/model"
)

// todo is what a round has to do.
type todo struct {
	capture    []attempt
	release    []release
	change     []change
	complaints []complaint
}

type attempt struct {
	pod model.Pod
	dec decide.Decision
}

type release struct {
	pod        model.Pod
	attachment launch.Attachment
	reason     string
}

type change struct {
	pod        model.Pod
	attachment launch.Attachment
	traffic    launch.Traffic
}

// plan says what has to be done for each pod of the node to be as decide has it.
// A pod whose labels or annotations mean nothing stays as it is.
func plan(pods []model.Pod, namespace func(string) model.Namespace, attachments []launch.Attachment, opts decide.Options) todo {
	var out todo
	for _, pod := range pods {
		i := slices.IndexFunc(attachments, func(a launch.Attachment) bool {
			return a.PodNamespace == pod.Namespace && a.PodName == pod.Name && pod.HasUID(a.PodUID)
		})
		dec, err := decide.Capture(pod, namespace(pod.Namespace), opts)
		switch {
		case i < 0 && pod.Leaving:
			// Its namespace may be gone already.
		case err != nil:
			out.complaints = append(out.complaints, complaint{pod, reasonOf(err), err.Error()})
		case dec.Warning != "":
			out.complaints = append(out.complaints, complaint{pod, "CaptureFailed", dec.Warning})
		case i < 0 && dec.Captured && pod.Phase == model.PodRunning && len(pod.Addresses) > 0:
			// A pod that is still being created is its ADD's business.
			out.capture = append(out.capture, attempt{pod, dec})
		case i >= 0 && !attachments[i].Committed, i >= 0 && attachments[i].Released:
			// An ADD is under way, or the last connections are.
		case i >= 0 && !dec.Captured:
			out.release = append(out.release, release{pod, attachments[i], dec.Reason})
		case i >= 0 && !sameTraffic(attachments[i].Spec, dec.Spec):
			out.change = append(out.change, change{pod, attachments[i], dec.Spec})
		}
	}
	return out
}

func reasonOf(err error) string {
	if f, ok := errors.AsType[*attachpb.Failure](err); ok && f.Code.ID == attachpb.InvalidRequest.ID {
		return "InvalidAnnotation"
	}
	return "CaptureFailed"
}

// sameTraffic compares what two Specs capture, not how: the ports, the bypass, and
// whether callers' addresses are kept stay what they were when the proxy started.
func sameTraffic(a, b launch.Traffic) bool {
	b.OutboundPort, b.InboundPort, b.Bypass = a.OutboundPort, a.InboundPort, a.Bypass
	b.KeepClient = a.KeepClient
	return reflect.DeepEqual(a, b)
}

// find finds the namespace that holds all of a pod's addresses. There must be
// exactly one: an address in two namespaces proves nothing.
func find(sandboxes []launch.Sandbox, pod model.Pod) (launch.Sandbox, error) {
	var found []launch.Sandbox
	for _, s := range sandboxes {
		if !slices.ContainsFunc(pod.Addresses, func(a netip.Addr) bool { return !slices.Contains(s.Addresses, a.Unmap()) }) {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		return launch.Sandbox{}, fmt.Errorf("%d network namespaces hold %v", len(found), pod.Addresses)
	}
	return found[0], nil
}

// findPod finds the pod whose addresses an attachment's namespace holds. There must
// be exactly one, as for find.
func findPod(pods []model.Pod, a launch.Attachment) (model.Pod, error) {
	var found []model.Pod
	for _, pod := range pods {
		if len(pod.Addresses) == 0 || pod.HostNetwork || pod.Phase.Finished() {
			continue
		}
		if _, err := find([]launch.Sandbox{{Addresses: a.Addresses}}, pod); err == nil {
			found = append(found, pod)
		}
	}
	if len(found) != 1 {
		return model.Pod{}, fmt.Errorf("%d pods have the addresses of its namespace, %v", len(found), a.Addresses)
	}
	return found[0], nil
}
