package model

import "testing"

func TestWhichPodTheRuntimeMeans(t *testing.T) {
	tests := []struct {
		promise string
		pod     Pod
		uid     string
		want    bool
	}{
		{"the pod of that UID", Pod{UID: "a"}, "a", true},
		{"not a pod of another UID", Pod{UID: "a"}, "b", false},
		{"a static pod by its hash", Pod{UID: "a", MirrorHash: "h"}, "h", true},
		{"not a static pod of another hash", Pod{UID: "a", MirrorHash: "h"}, "i", false},
		{"any pod, for a runtime that names none", Pod{UID: "a"}, "", true},
		{"a manifest's pod that has no UID", Pod{}, "a", true},
	}
	for _, test := range tests {
		if got := test.pod.HasUID(test.uid); got != test.want {
			t.Errorf("%s: got %v", test.promise, got)
		}
	}
}

func TestAParentSaysItsPort(t *testing.T) {
	for want, p := range map[string]ParentRef{
		"shop/back":         {Namespace: "shop", Name: "back"},
		"shop/back:80":      {Namespace: "shop", Name: "back", Port: 80},
		"shop/back:http":    {Namespace: "shop", Name: "back", Section: "http"},
		"shop/back:80:http": {Namespace: "shop", Name: "back", Port: 80, Section: "http"},
	} {
		if got := p.String(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
