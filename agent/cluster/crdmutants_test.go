package cluster

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// crdSchema is what is read of a CRD's.
type crdSchema struct {
	Type, Pattern        string
	Properties           map[string]*crdSchema
	Items                *crdSchema
	Required             []string
	Enum                 []any
	Minimum, Maximum     *float64
	MinLength, MaxLength *int
	MinItems, MaxItems   *int
	ListType             string    `json:"x-kubernetes-list-type"`
	Expressions          []crdRule `json:"x-kubernetes-validations"`
}

type crdRule struct{ Message string }

// crdSchemas reads the schema of each version that CRDs have served. The key is as in
// "gateway.networking.k8s.io/v1 HTTPRoute".
func crdSchemas(t *testing.T, files []string) map[string]*crdSchema {
	t.Helper()
	out := map[string]*crdSchema{}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var crd struct {
			Spec struct {
				Group    string
				Names    struct{ Kind string }
				Versions []struct {
					Name   string
					Served bool
					Schema struct {
						OpenAPIV3Schema *crdSchema `json:"openAPIV3Schema"`
					}
				}
			}
		}
		if err := yaml.Unmarshal(content, &crd); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		for _, v := range crd.Spec.Versions {
			if v.Served {
				out[crd.Spec.Group+"/"+v.Name+" "+crd.Spec.Names.Kind] = v.Schema.OpenAPIV3Schema
			}
		}
	}
	return out
}

// walk calls each for a schema and all below it, but for metadata and status. A path is
// as in spec.rules[].name.
func (s *crdSchema) walk(path string, each func(path string, s *crdSchema)) {
	each(path, s)
	for _, name := range slices.Sorted(maps.Keys(s.Properties)) {
		if path != "" || name == "spec" {
			s.Properties[name].walk(strings.TrimPrefix(path+"."+name, "."), each)
		}
	}
	if s.Items != nil {
		s.Items.walk(path+"[]", each)
	}
}

// expressions are those of a schema and below it, each as a path and what an API
// server says if one is not true.
func (s *crdSchema) expressions() []string {
	var out []string
	s.walk("", func(path string, s *crdSchema) {
		for _, r := range s.Expressions {
			out = append(out, path+": "+r.Message)
		}
	})
	return out
}

// limits are what a schema says without expressions, in the form of those.
func (s *crdSchema) limits() []string {
	var out []string
	s.walk("", func(path string, s *crdSchema) { out = append(out, s.ownLimits(path)...) })
	return out
}

func (s *crdSchema) ownLimits(path string) []string {
	var out []string
	add := func(is bool, words string) {
		if is {
			out = append(out, path+": "+words)
		}
	}
	add(s.Pattern != "", "should match")
	add(len(s.Enum) > 0, "Unsupported value")
	add(s.Minimum != nil, "should be greater than or equal to")
	add(s.Maximum != nil, "should be less than or equal to")
	add(s.MinLength != nil, "should be at least")
	add(s.MaxLength != nil, "Too long")
	add(s.MinItems != nil, "should have at least")
	add(s.MaxItems != nil, "Too many")
	if s.ListType == "map" || s.ListType == "set" {
		out = append(out, path+"[]: Duplicate value")
	}
	for _, name := range s.Required {
		out = append(out, strings.TrimPrefix(path+"."+name, ".")+": Required value")
	}
	return out
}

// mutation is a copy of a value that differs in one place. By its key it is known that
// another is in the same place, in objects of the same types, and the same.
type mutation struct {
	key   string
	value any
}

// mutations are in all that a schema says something of: too little, too much, just
// enough, of another type.
func (s *crdSchema) mutations(value any, yield func(mutation)) {
	to := func(others ...any) {
		for _, other := range others {
			text, _ := json.Marshal(other)
			yield(mutation{"=" + string(text), other})
		}
	}
	to(nil, zeros[s.Type], map[string]any{"a": 1}, []any{"a"})
	switch v := value.(type) {
	case map[string]any:
		s.ofObject(v, yield)
	case []any:
		s.ofList(v, yield)
	case string:
		to(s.texts(v)...)
	case float64:
		to(-1, 0, 1.5, "1", 1<<31)
		for _, limit := range []*float64{s.Minimum, s.Maximum} {
			if limit != nil {
				to(*limit-1, *limit, *limit+1)
			}
		}
	}
}

// zeros are the empty values of types.
var zeros = map[string]any{"string": "", "integer": 0, "boolean": false, "array": []any{}, "object": map[string]any{}}

func (s *crdSchema) ofObject(object map[string]any, yield func(mutation)) {
	with := func(name string, m mutation) {
		other := maps.Clone(object)
		if other[name] = m.value; m.value == absent {
			delete(other, name)
		}
		yield(mutation{fmt.Sprint(object["type"], object["protocol"], ".", name, m.key), other})
	}
	with("extra", mutation{"=1", 1})
	for name, field := range s.Properties {
		if value, has := object[name]; has {
			with(name, mutation{" is absent", absent})
			field.mutations(value, func(m mutation) { with(name, m) })
			continue
		}
		for _, value := range field.samples() {
			text, _ := json.Marshal(value)
			with(name, mutation{"=" + string(text), value})
		}
	}
}

// absent is the value of a field that is not there.
var absent = any(struct{ is string }{"absent"})

// samples are values for a field that is not there.
func (s *crdSchema) samples() []any {
	out := []any{nil, zeros[s.Type]}
	switch s.Type {
	case "array":
		out = append(out, []any{nil})
	case "integer":
		out = append(out, 1)
	case "string":
		out = append(append(out, "1s"), s.Enum...)
	}
	return out
}

func (s *crdSchema) ofList(list []any, yield func(mutation)) {
	for i, entry := range list {
		yield(mutation{"[] is absent", slices.Delete(slices.Clone(list), i, i+1)})
		yield(mutation{"[] is there twice", append(slices.Clone(list), entry)})
		s.Items.mutations(entry, func(m mutation) {
			other := slices.Clone(list)
			other[i] = m.value
			yield(mutation{"[]" + m.key, other})
		})
	}
	yield(mutation{"[] is null", append(slices.Clone(list), nil)})
	if s.MaxItems != nil && len(list) > 0 {
		many := make([]any, *s.MaxItems+1)
		for i := range many {
			many[i] = numbered(list[0], i)
		}
		of := fmt.Sprint(list[0])
		yield(mutation{"[] are too many of " + of, many})
		yield(mutation{"[] are many of " + of, many[1:]})
	}
}

// numbered makes entries of a list differ, if it can be.
func numbered(entry any, i int) any {
	switch v := entry.(type) {
	case string:
		return v + strconv.Itoa(i)
	case float64:
		return v + float64(i)
	case map[string]any:
		if name, has := v["name"]; has {
			v = maps.Clone(v)
			v["name"] = numbered(name, i)
		}
		return v
	}
	return entry
}

// wordings are texts that patterns and expressions are about.
var wordings = []any{"A", "a-", "a.b", "a..b", "*.a", "a\nb", "/a//b", "1s1ms", "1s1s1s1s1s", "https://*.a:1"}

func (s *crdSchema) texts(text string) []any {
	out := append([]any{"exact", 1}, s.Enum...)
	if len(s.Enum) == 0 {
		out = append(out, wordings...)
	}
	if s.MaxLength != nil {
		last := "a"
		if text != "" {
			last = text[len(text)-1:]
		}
		out = append(out, text+strings.Repeat(last, *s.MaxLength-len(text)), text+strings.Repeat(last, *s.MaxLength-len(text)+1),
			strings.Repeat("é", *s.MaxLength))
	}
	return out
}

// mutants are the mutations of the spec of documents, as documents, each once.
func mutants(t *testing.T, schemas map[string]*crdSchema, documents []string) []string {
	t.Helper()
	seen := map[string]bool{}
	var out []string
	for _, document := range documents {
		var object map[string]any
		if err := yaml.Unmarshal([]byte(document), &object); err != nil {
			t.Fatalf("%s: %v", document, err)
		}
		id := fmt.Sprint(object["apiVersion"], " ", object["kind"])
		s := schemas[id]
		if s == nil {
			t.Fatalf("there is no schema for %s", id)
		}
		add := func(m mutation) {
			if seen[id+m.key] {
				return
			}
			seen[id+m.key] = true
			other := maps.Clone(object)
			if other["spec"] = m.value; m.value == absent {
				delete(other, "spec")
			}
			text, err := json.Marshal(other)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, string(text))
		}
		add(mutation{" is absent", absent})
		s.Properties["spec"].mutations(object["spec"], add)
	}
	return out
}
