package cluster

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1alpha2 "sigs.k8s.io/gateway-api/apis/v1alpha2"
	gatewayv1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"

	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/model"
)

// manifestKinds is what a manifest may hold, in words.
const manifestKinds = "Pod, Namespace and Service (v1), EndpointSlice (discovery.k8s.io/v1), " +
	"HTTPRoute, GRPCRoute and TCPRoute (gateway.networking.k8s.io/v1), TrafficPolicy, AuthorizationPolicy and PeerAuthentication (policy.weirmesh.io/v1alpha1)"

// manifests collects the documents of a directory into a view.
type manifests struct {
	decoder runtime.Decoder
	view    view
	where   map[string]string     // "Pod shop/front" → "shop.yaml: document 2"
	owner   map[netip.Addr]string // cluster IP → Service
}

// readDir reads every *.yaml, *.yml and *.json of a directory, hidden files and
// subdirectories excepted. The error names file, document and field of the first
// mistake.
func readDir(dir string) (view, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return view{}, err
	}
	m, err := newManifests()
	if err != nil {
		return view{}, err
	}
	for _, entry := range entries {
		name := entry.Name()
		if entry.IsDir() || strings.HasPrefix(name, ".") || !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name)) {
			continue
		}
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return view{}, err
		}
		if err := m.file(name, content); err != nil {
			return view{}, err
		}
	}
	return m.view, nil
}

func newManifests() (*manifests, error) {
	scheme := runtime.NewScheme()
	for _, install := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, discoveryv1.AddToScheme, gatewayv1.Install, gatewayv1beta1.Install, gatewayv1alpha2.Install, v1alpha1.Install,
	} {
		if err := install(scheme); err != nil {
			return nil, err
		}
	}
	return &manifests{
		decoder: json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme, scheme, json.SerializerOptions{Yaml: true, Strict: true}),
		view:    newView(),
		where:   map[string]string{},
		owner:   map[netip.Addr]string{},
	}, nil
}

// file reads the documents of one file. They are counted from 1.
func (m *manifests) file(name string, content []byte) error {
	reader := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(content)))
	for n := 1; ; n++ {
		doc, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		where := fmt.Sprintf("%s: document %d", name, n)
		if err != nil {
			return fmt.Errorf("%s: %w", where, err)
		}
		if blank(doc) {
			continue
		}
		if err := m.document(where, doc); err != nil {
			return fmt.Errorf("%s: %w", where, err)
		}
	}
}

// blank reports whether a document has nothing but comments.
func blank(doc []byte) bool {
	for line := range bytes.Lines(doc) {
		line = bytes.TrimSpace(line)
		if len(line) > 0 && line[0] != '#' && string(line) != "---" {
			return false
		}
	}
	return true
}

func (m *manifests) document(where string, doc []byte) error {
	obj, gvk, err := m.decoder.Decode(doc, nil, nil)
	if err != nil {
		return decodeError(gvk, err)
	}
	switch o := obj.(type) {
	case *corev1.Pod:
		if _, mirror := o.Annotations[corev1.MirrorPodAnnotationKey]; o.Spec.ServiceAccountName == "" && !mirror {
			o.Spec.ServiceAccountName = "default" // as an API server has it
		}
		return add(m, where, gvk.Kind, o, toCompactPod, m.view.pods, podKey)
	case *corev1.Namespace:
		return add(m, where, gvk.Kind, o, toNamespace, m.view.namespaces, namespaceKey)
	case *corev1.Service:
		if err := add(m, where, gvk.Kind, o, Service, m.view.services, serviceKey); err != nil {
			return err
		}
		return m.claimClusterIPs(key{o.Namespace, o.Name})
	case *discoveryv1.EndpointSlice:
		if o.Labels[discoveryv1.LabelServiceName] == "" {
			return fmt.Errorf("EndpointSlice %s: metadata.labels: %s is missing", o.Name, discoveryv1.LabelServiceName)
		}
		return add(m, where, gvk.Kind, o, toSlice, m.view.slices, sliceKey)
	case *gatewayv1.HTTPRoute:
		return addRoute(m, where, gvk.Kind, doc, o, validateHTTPRoute, HTTPRoute)
	case *gatewayv1beta1.HTTPRoute:
		return addRoute(m, where, gvk.Kind, doc, (*gatewayv1.HTTPRoute)(o), validateHTTPRoute, HTTPRoute)
	case *gatewayv1.GRPCRoute:
		return addRoute(m, where, gvk.Kind, doc, o, validateGRPCRoute, GRPCRoute)
	case *gatewayv1.TCPRoute:
		return addRoute(m, where, gvk.Kind, doc, o, validateTCPRoute, TCPRoute)
	case *gatewayv1alpha2.TCPRoute:
		return addRoute(m, where, gvk.Kind, doc, o, validateTCPRouteV1Alpha2, TCPRouteV1Alpha2)
	case *v1alpha1.TrafficPolicy:
		return add(m, where, gvk.Kind, o, TrafficPolicy, m.view.policies, policyKey)
	case *v1alpha1.AuthorizationPolicy:
		return add(m, where, gvk.Kind, o, validated(doc, AuthorizationPolicy), m.view.authz, authzKey)
	case *v1alpha1.PeerAuthentication:
		return add(m, where, gvk.Kind, o, validated(doc, PeerAuthentication), m.view.peerAuth, peerAuthKey)
	}
	return fmt.Errorf("%s: not a kind for a manifest, which holds %s", gvk.Kind, manifestKinds)
}

// decodeError says on one line what is wrong with a document; gvk is what it says
// it is.
func decodeError(gvk *schema.GroupVersionKind, err error) error {
	strict, isStrict := runtime.AsStrictDecodingError(err)
	switch {
	case runtime.IsMissingKind(err):
		return errors.New("kind is missing")
	case runtime.IsMissingVersion(err):
		return errors.New("apiVersion is missing")
	case runtime.IsNotRegisteredError(err):
		return fmt.Errorf("%s %s: unknown kind; a manifest holds %s", gvk.GroupVersion(), gvk.Kind, manifestKinds)
	case isStrict:
		var texts []string
		for _, e := range strict.Errors() {
			texts = append(texts, strings.Join(strings.Fields(e.Error()), " "))
		}
		return fmt.Errorf("%s: %s", gvk.Kind, strings.Join(texts, ", "))
	}
	return err
}

// add converts an object and puts it into one kind's map.
func add[O metav1.Object, K comparable, M any](
	m *manifests, where, kind string, o O, convert func(O) (M, error), into map[K]M, keyOf func(M) K,
) error {
	if o.GetName() == "" {
		return fmt.Errorf("%s: metadata.name is missing", kind)
	}
	id := kind + " " + o.GetName()
	if kind != "Namespace" {
		if o.GetNamespace() == "" {
			o.SetNamespace(metav1.NamespaceDefault)
		}
		id = kind + " " + o.GetNamespace() + "/" + o.GetName()
	}
	if other, twice := m.where[id]; twice {
		return fmt.Errorf("%s: is in %s already", id, other)
	}
	m.where[id] = where
	converted, err := convert(o)
	if err != nil {
		return fmt.Errorf("%s: %w", id, err)
	}
	into[keyOf(converted)] = converted
	return nil
}

// addRoute is add, for a kind whose values an API server checks by its CRD.
func addRoute[O metav1.Object](
	m *manifests, where, kind string, doc []byte, o O, validate func(O) error, convert func(O) (model.Route, error),
) error {
	return add(m, where, kind, o, validated(doc, func(o O) (model.Route, error) {
		if err := validate(o); err != nil {
			return model.Route{}, err
		}
		return convert(o)
	}), m.view.routes, keyOfRoute)
}

// validated is convert, of a document that validateDocument lets pass.
func validated[O, M any](doc []byte, convert func(O) (M, error)) func(O) (M, error) {
	return func(o O) (M, error) {
		if err := validateDocument(doc); err != nil {
			var none M
			return none, err
		}
		return convert(o)
	}
}

// claimClusterIPs refuses a cluster IP that another Service has.
func (m *manifests) claimClusterIPs(k key) error {
	svc := m.view.services[k]
	for _, ip := range svc.ClusterIPs {
		if other, taken := m.owner[ip]; taken {
			return fmt.Errorf("Service %s: spec.clusterIPs: %s is Service %s's", svc.ID(), ip, other)
		}
		m.owner[ip] = svc.ID()
	}
	return nil
}
