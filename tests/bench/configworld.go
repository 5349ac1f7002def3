package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gateway "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"

	"github.com/weirmesh/weir/tests/cluster"
	"github.com/weirmesh/weir/tests/pod"
)

const (
	// endpointsEach is how many endpoints each Service has, in one slice.
	endpointsEach = 10
	// used is how many Services each proxy uses: those whose changes are measured,
	// and others of its own.
	used = 10
	// routeEach: one in so many Services has an HTTPRoute.
	routeEach = 10
	// slicesProbe and routesProbe are the Services whose slice and whose route the
	// measured changes are to.
	slicesProbe, routesProbe = 0, routeEach
	// authorizationProbe is no Service: it counts the changes of the policy.
	authorizationProbe = -1
	// policyName is that of the namespace's AuthorizationPolicy and PeerAuthentication.
	policyName = "all"
	// maxServices is what endpointAddress has room for.
	maxServices = 1 << 14
	// generations are the sets of addresses a Service's endpoints have by turns.
	generations = 4
	// writers write at the same time where the order does not matter.
	writers = 8
)

// endpointRange are the addresses of all endpoints there will be: they are the
// node's own, and one server answers on them all.
var endpointRange = netip.MustParsePrefix("172.16.0.0/12")

// endpointAddress is that of a Service's endpoint, in one of its generations.
func endpointAddress(service, generation, endpoint int) netip.Addr {
	offset := (generation%generations)<<18 | service<<4 | endpoint // of 20 bits
	base := endpointRange.Addr().As4()
	return netip.AddrFrom4([4]byte{base[0], base[1] + byte(offset>>16), byte(offset >> 8), byte(offset)})
}

// configBench is what the measurements share.
type configBench struct {
	f        configFlags
	node     *pod.Node
	chain    *pod.Chain
	agent    *pod.Agent
	progress io.Writer

	client   kubernetes.Interface
	gateway  gateway.Interface
	policies dynamic.Interface
	// ips are the ClusterIPs of the Services, by number.
	ips     []netip.Addr
	callers []*caller

	mu         sync.Mutex
	generation map[int]int // of a Service's endpoints, or its route's rule
}

// newConfigBench brings up the API server, what is in it, the agent, and the pods
// whose proxies use it.
func newConfigBench(ctx context.Context, f configFlags, node *pod.Node, progress io.Writer) (*configBench, error) {
	binaries, err := findBinaries(f.bin)
	if err != nil {
		return nil, err
	}
	c := &configBench{f: f, node: node, progress: progress, ips: make([]netip.Addr, f.grown), generation: map[int]int{}}
	fmt.Fprintln(progress, "starting etcd and the API server")
	kubernetes, err := cluster.FindBinaries("")
	if err != nil {
		return nil, err
	}
	control, err := cluster.StartControlPlane(ctx, kubernetes, pod.NodeDir+"/control-plane")
	if err != nil {
		return nil, err
	}
	if err := c.connect(control.Kubeconfig); err != nil {
		return nil, err
	}
	if err := installCRDs(ctx, filepath.Join(kubernetes.Kubernetes, "kubectl"), control.Kubeconfig); err != nil {
		return nil, err
	}
	fmt.Fprintf(progress, "%d Services with %d endpoints\n", f.services, f.services*endpointsEach)
	if err := errors.Join(serveEndpoints(ctx), c.createNamespace(ctx)); err != nil {
		return nil, err
	}
	if err := c.createServices(ctx, 0, f.services); err != nil {
		return nil, err
	}
	if err := c.createPolicies(ctx); err != nil {
		return nil, err
	}
	if c.agent, err = node.StartAgent(ctx, binaries, io.Discard, "--manifests", "", "--kubeconfig", control.Kubeconfig); err != nil {
		return nil, err
	}
	if c.chain, err = node.NewChain(binaries.Folders(), nil); err != nil {
		return nil, err
	}
	fmt.Fprintf(progress, "%d captured pods\n", f.proxies)
	for i := range f.proxies {
		p, err := c.addPod(ctx, fmt.Sprintf("caller-%d", i))
		if err != nil {
			return nil, err
		}
		if err := pod.In(p.Netns, func() error { return serve(ctx) }); err != nil {
			return nil, err
		}
		caller := &caller{pod: p}
		if err := caller.use(ctx, c.servicesOf(i*used, used, f.services)); err != nil {
			return nil, err
		}
		c.callers = append(c.callers, caller)
	}
	return c, nil
}

func (c *configBench) connect(kubeconfig string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	config.QPS = -1 // no limit
	custom := rest.CopyConfig(config)
	config.ContentType = "application/vnd.kubernetes.protobuf"
	if c.client, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if c.gateway, err = gateway.NewForConfig(custom); err != nil {
		return err
	}
	c.policies, err = dynamic.NewForConfig(custom)
	return err
}

// installCRDs has the API server know the Gateway API's standard kinds, and Weir's.
func installCRDs(ctx context.Context, kubectl, kubeconfig string) error {
	dir, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api").Output()
	if err != nil {
		return fmt.Errorf("the Gateway API's CRDs: %w", err)
	}
	root, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return fmt.Errorf("the CRDs of this repository: %w", err)
	}
	for _, args := range [][]string{
		{
			"apply", "--server-side", "-f", filepath.Join(strings.TrimSpace(string(dir)), "config/crd/standard"),
			"-f", filepath.Join(strings.TrimSpace(string(root)), "manifests/base/crds"),
		},
		{"wait", "--for=condition=Established", "--timeout=30s", "customresourcedefinitions", "--all"},
	} {
		cmd := exec.CommandContext(ctx, kubectl, append([]string{"--kubeconfig", kubeconfig}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("CRDs: %w: %s", err, out)
		}
	}
	return nil
}

// serveEndpoints makes all endpoints' addresses the node's, and answers on them,
// until ctx is done, with the address that was asked in a header.
func serveEndpoints(ctx context.Context) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	local := &netlink.Route{
		LinkIndex: lo.Attrs().Index, Table: 255 /* local */, Type: 2 /* RTN_LOCAL */, Scope: netlink.SCOPE_HOST,
		Dst: &net.IPNet{IP: endpointRange.Addr().AsSlice(), Mask: net.CIDRMask(endpointRange.Bits(), 32)},
	}
	if err := netlink.RouteAdd(local); err != nil {
		return fmt.Errorf("endpoints' addresses: %w", err)
	}
	return serve(ctx)
}

// serve answers on the server's port, in the network namespace that it is called in, until
// ctx is done.
func serve(ctx context.Context) error {
	listener, err := net.Listen("tcp4", fmt.Sprintf(":%d", serverPort))
	if err != nil {
		return err
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr); ok {
			w.Header().Set(endpointHeader, local.AddrPort().Addr().Unmap().String())
		}
	})}
	go func() { _ = server.Serve(listener) }()
	context.AfterFunc(ctx, func() { _ = server.Close() })
	return nil
}

// createNamespace makes the namespace, and the service account of its pods that a
// controller would make.
func (c *configBench) createNamespace(ctx context.Context) error {
	core := c.client.CoreV1()
	_, err := core.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: namespace, Labels: map[string]string{"weirmesh.io/capture": "enabled"},
	}}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	_, err = core.ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	return err
}

// createPolicies makes the policies whose changes are measured: one refuses a path, by the
// other nothing is demanded.
func (c *configBench) createPolicies(ctx context.Context) error {
	for _, p := range []struct {
		of         schema.GroupVersionResource
		kind, spec string
	}{
		{authorizations, "AuthorizationPolicy", `{"action": "DENY", "rules": [{"http": {"paths": [{"type": "Exact", "value": "/refused/0"}]}}]}`},
		{peerings, "PeerAuthentication", `{"mode": "Permissive"}`},
	} {
		object := &unstructured.Unstructured{}
		err := object.UnmarshalJSON(fmt.Appendf(nil, `{"apiVersion": %q, "kind": %q, "metadata": {"name": %q}, "spec": %s}`,
			p.of.GroupVersion(), p.kind, policyName, p.spec))
		if err == nil {
			_, err = c.policies.Resource(p.of).Namespace(namespace).Create(ctx, object, metav1.CreateOptions{})
		}
		if err != nil {
			return fmt.Errorf("%s: %w", p.kind, err)
		}
	}
	return nil
}

// createServices makes the Services from one number up to another, with their slices
// and routes.
func (c *configBench) createServices(ctx context.Context, from, to int) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(writers)
	for i := from; i < to; i++ {
		group.Go(func() error { return c.createService(ctx, i) })
	}
	return group.Wait()
}

func serviceName(i int) string { return fmt.Sprintf("service-%d", i) }

func (c *configBench) createService(ctx context.Context, i int) error {
	service, err := c.client.CoreV1().Services(namespace).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: serviceName(i)},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	if c.ips[i], err = netip.ParseAddr(service.Spec.ClusterIP); err != nil {
		return err
	}
	if _, err := c.client.DiscoveryV1().EndpointSlices(namespace).Create(ctx, slice(i, 0), metav1.CreateOptions{}); err != nil {
		return err
	}
	if i < c.f.services {
		if err := c.createEndpointPods(ctx, i); err != nil {
			return err
		}
	}
	if i%routeEach == 0 {
		_, err = c.gateway.GatewayV1().HTTPRoutes(namespace).Create(ctx, httpRoute(i), metav1.CreateOptions{})
	}
	return err
}

// createEndpointPods makes the pods, of other nodes, that are in a Service's slice.
func (c *configBench) createEndpointPods(ctx context.Context, i int) error {
	pods := c.client.CoreV1().Pods(namespace)
	for _, e := range slice(i, 0).Endpoints {
		made, err := pods.Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: e.TargetRef.Name, Labels: map[string]string{"app": serviceName(i)}},
			Spec:       corev1.PodSpec{NodeName: *e.NodeName, Containers: []corev1.Container{{Name: "app", Image: "app"}}},
		}, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		made.Status.Phase, made.Status.PodIP = corev1.PodRunning, e.Addresses[0]
		made.Status.PodIPs = []corev1.PodIP{{IP: e.Addresses[0]}}
		if _, err := pods.UpdateStatus(ctx, made, metav1.UpdateOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// slice is a Service's, as Kubernetes' controller writes it.
func slice(i, generation int) *discoveryv1.EndpointSlice {
	name, yes, port, protocol := "http", true, int32(serverPort), corev1.ProtocolTCP
	out := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Name: serviceName(i) + "-x", Labels: map[string]string{
			discoveryv1.LabelServiceName: serviceName(i), discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io",
		}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &protocol}},
	}
	for e := range endpointsEach {
		node := fmt.Sprintf("node-%d", (i+e)%100)
		out.Endpoints = append(out.Endpoints, discoveryv1.Endpoint{
			Addresses:  []string{endpointAddress(i, generation, e).String()},
			Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes},
			NodeName:   &node,
			TargetRef: &corev1.ObjectReference{
				Kind: "Pod", Namespace: namespace, Name: fmt.Sprintf("%s-7d4b9c6f5d-%d%04d", serviceName(i), generation%generations, e),
				UID: "0b1c2d3e-aaaa-bbbb-cccc-0123456789ab",
			},
		})
	}
	return out
}

// httpRoute sends all that is for a Service to it, and notes a generation in the
// answers.
func httpRoute(i int) *gatewayv1.HTTPRoute {
	group, kind, port := gatewayv1.Group(""), gatewayv1.Kind("Service"), gatewayv1.PortNumber(80)
	return &gatewayv1.HTTPRoute{
		ObjectMeta: metav1.ObjectMeta{Name: serviceName(i)},
		Spec: gatewayv1.HTTPRouteSpec{
			CommonRouteSpec: gatewayv1.CommonRouteSpec{ParentRefs: []gatewayv1.ParentReference{
				{Group: &group, Kind: &kind, Name: gatewayv1.ObjectName(serviceName(i)), Port: &port},
			}},
			Rules: []gatewayv1.HTTPRouteRule{{
				Filters: []gatewayv1.HTTPRouteFilter{{
					Type:                   gatewayv1.HTTPRouteFilterResponseHeaderModifier,
					ResponseHeaderModifier: &gatewayv1.HTTPHeaderFilter{Set: []gatewayv1.HTTPHeader{{Name: generationHeader, Value: "0"}}},
				}},
				BackendRefs: []gatewayv1.HTTPBackendRef{{BackendRef: gatewayv1.BackendRef{
					BackendObjectReference: gatewayv1.BackendObjectReference{Name: gatewayv1.ObjectName(serviceName(i)), Port: &port},
				}}},
			}},
		},
	}
}

// addPod makes a captured pod of the node, and takes it through the chain.
func (c *configBench) addPod(ctx context.Context, name string) (*pod.Pod, error) {
	pods := c.client.CoreV1().Pods(namespace)
	made, err := pods.Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.PodSpec{NodeName: c.node.Name, Containers: []corev1.Container{{Name: "app", Image: "app"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	p := &pod.Pod{Namespace: namespace, Name: name, ContainerID: name}
	if err := c.node.Create(ctx, c.chain, p); err != nil {
		return nil, err
	}
	if err := pod.In(p.Netns, loopbackUp); err != nil {
		return nil, err
	}
	made.Status.Phase = corev1.PodRunning
	for _, a := range p.Addresses {
		made.Status.PodIPs = append(made.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	made.Status.PodIP = made.Status.PodIPs[0].IP
	_, err = pods.UpdateStatus(ctx, made, metav1.UpdateOptions{})
	return p, err
}

// removePod ends a pod, its proxy with it.
func (c *configBench) removePod(ctx context.Context, p *pod.Pod) error {
	now := int64(0)
	return errors.Join(
		c.chain.Del(ctx, p),
		c.node.RemoveNamespace(p.Netns),
		c.client.CoreV1().Pods(namespace).Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}),
	)
}

// servicesOf are the ClusterIPs of n Services, of those there are: the two whose
// changes are measured, and those from a number on.
func (c *configBench) servicesOf(first, n, of int) []netip.Addr {
	out := []netip.Addr{c.ips[slicesProbe], c.ips[routesProbe]}
	for i := first; len(out) < n; i++ {
		if s := i % of; s != slicesProbe && s != routesProbe {
			out = append(out, c.ips[s])
		}
	}
	return out
}
