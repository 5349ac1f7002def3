// Command crds says of objects what an API server would: whether the schema and the
// expressions of their CustomResourceDefinition let them pass. It is made of the API
// server's own packages, and so a module of its own, which no program of Weir's and
// no test of theirs is linked with.
//
//	crds CRD-FILE... < DOCUMENTS
//
// Documents are YAML. For each there is a line with what is wrong with it, empty if
// nothing is. The CRDs themselves are checked first, the cost of their expressions
// too; that one is refused is an error.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

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
	apiruntime "k8s.io/apimachinery/pkg/runtime"
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
	if len(args) == 0 {
		return errors.New("name the files of CustomResourceDefinitions")
	}
	served := checkers{}
	for _, file := range args {
		if err := served.add(file); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}
	documents, err := split(in)
	if err != nil {
		return err
	}
	for _, wrong := range served.checkAll(documents) {
		fmt.Fprintln(out, strings.Join(strings.Fields(strings.Join(wrong, "; ")), " "))
	}
	return nil
}

func split(in io.Reader) ([][]byte, error) {
	var out [][]byte
	reader := utilyaml.NewYAMLReader(bufio.NewReader(in))
	for {
		document, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		out = append(out, document)
	}
}

// checkers are by apiVersion and kind.
type checkers map[[2]string]checker

// checker checks objects by one version of a CRD.
type checker struct {
	structural  *schema.Structural
	validator   validation.SchemaValidator
	expressions *cel.Validator
}

// add makes checkers of the versions that a CRD has served.
func (c checkers) add(file string) error {
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var v1 apiextensionsv1.CustomResourceDefinition
	if err := yaml.UnmarshalStrict(content, &v1); err != nil {
		return err
	}
	scheme := apiruntime.NewScheme()
	install.Install(scheme)
	scheme.Default(&v1)
	var crd apiextensions.CustomResourceDefinition
	if err := scheme.Convert(&v1, &crd, nil); err != nil {
		return err
	}
	crd.Status.StoredVersions = []string{crd.Spec.Versions[0].Name} // as the API server itself does
	if errs := crdvalidation.ValidateCustomResourceDefinition(context.Background(), &crd); len(errs) > 0 {
		return errs.ToAggregate()
	}
	for _, version := range crd.Spec.Versions {
		if !version.Served {
			continue
		}
		one, err := newChecker(&crd, version.Name)
		if err != nil {
			return fmt.Errorf("%s: %w", version.Name, err)
		}
		c[[2]string{crd.Spec.Group + "/" + version.Name, crd.Spec.Names.Kind}] = one
	}
	return nil
}

func newChecker(crd *apiextensions.CustomResourceDefinition, version string) (checker, error) {
	of, err := apiextensions.GetSchemaForVersion(crd, version)
	if err != nil {
		return checker{}, err
	}
	structural, err := schema.NewStructural(of.OpenAPIV3Schema)
	if err != nil {
		return checker{}, err
	}
	validator, _, err := validation.NewSchemaValidator(of.OpenAPIV3Schema)
	if err != nil {
		return checker{}, err
	}
	return checker{structural, validator, cel.NewValidator(structural, true, celconfig.PerCallLimit)}, nil
}

// checkAll checks documents with all processors.
func (c checkers) checkAll(documents [][]byte) [][]string {
	out := make([][]string, len(documents))
	var next atomic.Int64
	var done sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		done.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(documents)); i = next.Add(1) - 1 {
				out[i] = c.check(documents[i])
			}
		})
	}
	done.Wait()
	return out
}

// check reads a document and has it checked by the CRD that it names.
func (c checkers) check(document []byte) []string {
	text, err := yaml.YAMLToJSONStrict(document)
	if err != nil {
		return []string{err.Error()}
	}
	var object map[string]any
	if err := json.Unmarshal(text, &object); err != nil {
		return []string{err.Error()}
	}
	version, _ := object["apiVersion"].(string)
	kind, _ := object["kind"].(string)
	one, served := c[[2]string{version, kind}]
	if !served {
		return []string{fmt.Sprintf("no CRD has %s %s", version, kind)}
	}
	return one.check(object)
}

// check does with an object what the API server does on a create whose
// fieldValidation is Strict.
func (c checker) check(object map[string]any) []string {
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
