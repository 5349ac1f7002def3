// Command crds says of objects what an API server would: whether the schema and the
// expressions of a CustomResourceDefinition let them pass. It is made of the API
// server's own packages, and so a module of its own, which no program of Weir's and
// no test of theirs is linked with.
//
//	crds CRD-FILE < DOCUMENTS
//
// Documents are YAML. For each there is a line with what is wrong with it, empty if
// nothing is. The CRD itself is checked first, the cost of its expressions too; that it
// is refused is an error.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/install"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crdvalidation "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/json"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "crds:", err)
		os.Exit(1)
	}
}

func run(args []string, in io.Reader, out io.Writer) error {
	if len(args) != 1 {
		return errors.New("name the file of one CustomResourceDefinition")
	}
	c, err := newChecker(args[0])
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	documents := utilyaml.NewYAMLReader(bufio.NewReader(in))
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Fprintln(out, strings.Join(strings.Fields(strings.Join(c.check(document), "; ")), " "))
	}
}

// checker checks objects by the first version of a CRD.
type checker struct {
	structural  *schema.Structural
	validator   validation.SchemaValidator
	expressions *cel.Validator
}

func newChecker(file string) (*checker, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var v1 apiextensionsv1.CustomResourceDefinition
	if err := yaml.UnmarshalStrict(content, &v1); err != nil {
		return nil, err
	}
	scheme := runtime.NewScheme()
	install.Install(scheme)
	scheme.Default(&v1)
	var crd apiextensions.CustomResourceDefinition
	if err := scheme.Convert(&v1, &crd, nil); err != nil {
		return nil, err
	}
	crd.Status.StoredVersions = []string{crd.Spec.Versions[0].Name} // as the API server itself does
	if errs := crdvalidation.ValidateCustomResourceDefinition(context.Background(), &crd); len(errs) > 0 {
		return nil, errs.ToAggregate()
	}
	version, err := apiextensions.GetSchemaForVersion(&crd, crd.Spec.Versions[0].Name)
	if err != nil {
		return nil, err
	}
	structural, err := schema.NewStructural(version.OpenAPIV3Schema)
	if err != nil {
		return nil, err
	}
	validator, _, err := validation.NewSchemaValidator(version.OpenAPIV3Schema)
	if err != nil {
		return nil, err
	}
	return &checker{structural, validator, cel.NewValidator(structural, true, celconfig.PerCallLimit)}, nil
}

// check does with an object what the API server does on a create whose
// fieldValidation is Strict.
func (c *checker) check(document []byte) []string {
	text, err := yaml.YAMLToJSONStrict(document)
	if err != nil {
		return []string{err.Error()}
	}
	var object map[string]any
	if err := json.Unmarshal(text, &object); err != nil {
		return []string{err.Error()}
	}
	var out []string
	track := schema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true}
	for _, path := range pruning.PruneWithOptions(object, c.structural, true, track) {
		out = append(out, fmt.Sprintf("unknown field %q", path))
	}
	defaulting.PruneNonNullableNullsWithoutDefaults(object, c.structural)
	defaulting.Default(object, c.structural)
	errs := validation.ValidateCustomResource(nil, object, c.validator)
	errs = append(errs, listtype.ValidateListSetsAndMaps(nil, c.structural, object)...)
	more, _ := c.expressions.Validate(context.Background(), nil, c.structural, object, nil, celconfig.RuntimeCELCostBudget)
	for _, err := range append(errs, more...) {
		out = append(out, err.Error())
	}
	return out
}
