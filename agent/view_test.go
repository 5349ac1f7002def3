package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/agent/launch"
)

func TestCapturedIsWhatTheRulesTurnAside(t *testing.T) {
	attachment := func(uid string, committed, released bool) launch.Attachment {
		return launch.Attachment{PodName: "pod", PodUID: uid, Committed: committed, Released: released}
	}
	all := []launch.Attachment{attachment("starting", false, false), attachment("captured", true, false), attachment("released", true, true)}
	got, known := capturedPods(all)
	if diff := cmp.Diff(map[string]bool{"captured": true}, got); diff != "" || !known {
		t.Errorf("known %v (-want +got):\n%s", known, diff)
	}
	rebuilt := launch.Attachment{Committed: true} // of which pod it is, nobody knows yet
	if got, known := capturedPods(append(all, rebuilt)); known || len(got) != 1 {
		t.Errorf("%v, known %v", got, known)
	}
}
