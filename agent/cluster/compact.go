package cluster

import (
	"maps"
	"slices"

	"github.com/weirmesh/weir/agent/model"
)

// compactPod is a pod as the Store keeps it: a map of one label would take more
// memory than all the rest.
type compactPod struct {
	pod                 model.Pod // without labels and annotations
	labels, annotations []pair
}

type pair struct{ key, value string }

func compact(p model.Pod) compactPod {
	c := compactPod{pod: p, labels: pairs(p.Labels), annotations: pairs(p.Annotations)}
	c.pod.Labels, c.pod.Annotations = nil, nil
	return c
}

// expand is the inverse of compact.
func (c compactPod) expand() model.Pod {
	p := c.pod
	p.Labels, p.Annotations = fromPairs(c.labels), fromPairs(c.annotations)
	return p
}

func pairs(m map[string]string) []pair {
	if len(m) == 0 {
		return nil
	}
	out := make([]pair, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, pair{k, m[k]})
	}
	return out
}

func fromPairs(list []pair) map[string]string {
	if len(list) == 0 {
		return nil
	}
	m := make(map[string]string, len(list))
	for _, p := range list {
		m[p.key] = p.value
	}
	return m
}
