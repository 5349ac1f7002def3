package model

import "testing"

func TestASelectorMeansWhatALabelSelectorMeans(t *testing.T) {
	labels := map[string]string{"app": "back", "tier": ""}
	in := func(o Operator, key string, values ...string) Selector { return Selector{{key, o, values}} }
	for _, tt := range []struct {
		promise  string
		selector Selector
		want     bool
	}{
		{"none is all", nil, true},
		{"one of the values", in(In, "app", "front", "back"), true},
		{"none of the values", in(In, "app", "front"), false},
		{"an empty value", in(In, "tier", ""), true},
		{"what is not there has no value", in(In, "gone", ""), false},
		{"not one of the values", in(NotIn, "app", "back"), false},
		{"another value", in(NotIn, "app", "front"), true},
		{"what is not there is not in", in(NotIn, "gone", "a"), true},
		{"is there", in(Exists, "tier"), true},
		{"is there, and is not", in(Exists, "gone"), false},
		{"is not there", in(DoesNotExist, "gone"), true},
		{"is not there, and is", in(DoesNotExist, "tier"), false},
		{"all of them", append(in(In, "app", "back"), in(Exists, "gone")...), false},
		{"what nobody knows", in("Gt", "app", "1"), false},
	} {
		if got := tt.selector.Matches(labels); got != tt.want {
			t.Errorf("%s: %t", tt.promise, got)
		}
	}
}
