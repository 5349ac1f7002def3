package cluster

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"sigs.k8s.io/yaml"
)

// validateDocument checks what of a route is not to be seen in the typed object any
// more: what is null there, and what is missing and what is the zero value.
func validateDocument(doc []byte) error {
	var object map[string]any
	if err := yaml.Unmarshal(doc, &object); err != nil {
		return err
	}
	if object["spec"] == nil {
		return errors.New("spec: is missing")
	}
	return validateValue("spec", object["spec"])
}

func validateValue(path string, v any) error {
	switch v := v.(type) {
	case []any:
		for i, entry := range v {
			path := fmt.Sprintf("%s[%d]", path, i)
			if entry == nil {
				return fmt.Errorf("%s: is null", path)
			}
			if err := validateValue(path, entry); err != nil {
				return err
			}
		}
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(v)) {
			path := path + "." + name
			if err := validateField(path, name, v[name]); err != nil {
				return err
			}
			if err := validateValue(path, v[name]); err != nil {
				return err
			}
		}
	}
	return nil
}

// validateField knows the fields by their names, which no two of a route share.
func validateField(path, name string, v any) error {
	fields, _ := v.(map[string]any)
	switch {
	case name == "fraction" && fields != nil && fields["numerator"] == nil:
		return fmt.Errorf("%s.numerator: is missing", path)
	case name == "extensionRef" && fields != nil && fields["group"] == nil:
		return fmt.Errorf("%s.group: is missing", path)
	case name == "maxAge" && v == 0.0:
		return fmt.Errorf("%s: 0 is less than 1", path)
	case name == "useDefaultGateways" && v == "":
		return fmt.Errorf("%s: is empty", path)
	case name == "http" && fields["path"] == "":
		return fmt.Errorf("%s.path: is empty", path)
	}
	return nil
}
