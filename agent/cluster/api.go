package cluster

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1alpha2 "sigs.k8s.io/gateway-api/apis/v1alpha2"
	gateway "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"

	policyclient "github.com/weirmesh/weir/agent/api/client"
	"github.com/weirmesh/weir/agent/api/v1alpha1"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

// API is a cluster's API server as seen from one node. Use NewAPI.
//
// It needs, cluster-wide: list and watch on pods, namespaces, services, nodes,
// endpointslices.discovery.k8s.io, httproutes, grpcroutes and
// tcproutes.gateway.networking.k8s.io and trafficpolicies,
// authorizationpolicies and peerauthentications.policy.weirmesh.io; get on pods and
// namespaces; create and patch on events. For certificates: patch on pods/status, create
// and get on certificatesigningrequests.certificates.k8s.io, list and watch on the
// ClusterTrustBundle and, in Weir's namespace, on the ConfigMap of the roots.
type API struct {
	client   kubernetes.Interface
	gateway  gateway.Interface
	policies policyclient.Interface
	node     string
	log      *slog.Logger
}

// Limits are a client's own, in requests a second. The server has its own fairness; these
// only keep a node whose watches lag while many pods start, or a controller that
// finds many new nodes, from flooding it.
type Limits struct {
	QPS   float32
	Burst int
}

// AgentLimits are those of a node's agent, of some ten pods that start in a second; and
// everybody's for the Gateway API's kinds and Weir's own.
var AgentLimits = Limits{50, 100}

// NewAPI prepares to talk to the API server that the kubeconfig file names, or
// with an empty path to the one whose pod this is. It does not connect. node is
// this node's name in the cluster.
func NewAPI(kubeconfig, node string, log *slog.Logger) (*API, error) {
	client, err := NewClient(kubeconfig, "weir-agent", AgentLimits)
	if err != nil {
		return nil, err
	}
	routes, err := NewGatewayClient(kubeconfig, "weir-agent")
	if err != nil {
		return nil, err
	}
	policies, err := NewPolicyClient(kubeconfig, "weir-agent")
	if err != nil {
		return nil, err
	}
	return &API{client: client, gateway: routes, policies: policies, node: node, log: log}, nil
}

// NewClient makes a client of the API server that the kubeconfig file names, or
// with an empty path of the one whose pod this is.
func NewClient(kubeconfig, userAgent string, limits Limits) (kubernetes.Interface, error) {
	config, err := clientConfig(kubeconfig, userAgent, limits)
	if err != nil {
		return nil, fmt.Errorf("api server: %w", err)
	}
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("api server: %w", err)
	}
	return client, nil
}

// NewGatewayClient is NewClient for the kinds of the Gateway API. They are custom
// resources, which speak no protobuf.
func NewGatewayClient(kubeconfig, userAgent string) (gateway.Interface, error) {
	config, err := clientConfig(kubeconfig, userAgent, AgentLimits)
	if err != nil {
		return nil, fmt.Errorf("api server: %w", err)
	}
	client, err := gateway.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("api server: %w", err)
	}
	return client, nil
}

// NewPolicyClient is NewClient for Weir's own kinds.
func NewPolicyClient(kubeconfig, userAgent string) (policyclient.Interface, error) {
	config, err := clientConfig(kubeconfig, userAgent, AgentLimits)
	if err != nil {
		return nil, fmt.Errorf("api server: %w", err)
	}
	client, err := policyclient.New(config)
	if err != nil {
		return nil, fmt.Errorf("api server: %w", err)
	}
	return client, nil
}

func clientConfig(kubeconfig, userAgent string, limits Limits) (*rest.Config, error) {
	var config *rest.Config
	var err error
	if kubeconfig == "" {
		config, err = rest.InClusterConfig()
	} else {
		config, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return nil, err
	}
	config.UserAgent, config.QPS, config.Burst = userAgent, limits.QPS, limits.Burst
	return config, nil
}

// RunAPI keeps the Store up to date from an API server until ctx is done. While
// the server is away, from the start or later, it retries (after 0.8 s, then up
// to 30 s) and says so; the Store keeps what it had, or at the start gets what
// lastGood holds. An empty lastGood: nothing is kept.
//
// Routes and policies are there where the server has their CRDs. It is looked for
// those that it has not, ever up to 30 s, so that no restart is needed.
func RunAPI(ctx context.Context, s *Store, api *API, lastGood LastGood) error {
	s.mu.Lock()
	s.lookup, s.node = api.lookup, api.node
	s.mu.Unlock()

	lastGood.Node = api.node
	core, discovery := api.client.CoreV1(), api.client.DiscoveryV1()
	v1, alpha := api.gateway.GatewayV1(), api.gateway.GatewayV1alpha2()
	everywhere := metav1.NamespaceAll
	onThisNode := fields.OneTermEqualSelector("spec.nodeName", api.node).String()
	thisNode := fields.OneTermEqualSelector(metav1.ObjectNameField, api.node).String()
	watches := []func(ctx context.Context, synced func()){
		watchKind(api, "pods", &corev1.Pod{}, onThisNode, core.Pods(everywhere), stripPod, podSink(s)),
		watchKind(api, kindPeers, &corev1.Pod{}, "", core.Pods(everywhere), stripPeer, peerSink(s)),
		watchKind(api, "namespaces", &corev1.Namespace{}, "", core.Namespaces(), stripNamespace, namespaceSink(s)),
		watchKind(api, "services", &corev1.Service{}, "", core.Services(everywhere), stripService, serviceSink(s)),
		watchKind(api, "endpointslices", &discoveryv1.EndpointSlice{}, "", discovery.EndpointSlices(everywhere), stripSlice, sliceSink(s)),
		watchKind(api, "nodes", &corev1.Node{}, thisNode, core.Nodes(), stripNode, zoneSink(s)),
		watchRoutes(api, s, route.HTTPRoute, func(synced func()) []Version {
			return []Version{routeVersion(api, s, route.HTTPRoute, &gatewayv1.HTTPRoute{}, v1.HTTPRoutes(everywhere), HTTPRoute, synced)}
		}),
		watchRoutes(api, s, route.GRPCRoute, func(synced func()) []Version {
			return []Version{routeVersion(api, s, route.GRPCRoute, &gatewayv1.GRPCRoute{}, v1.GRPCRoutes(everywhere), GRPCRoute, synced)}
		}),
		watchRoutes(api, s, route.TCPRoute, func(synced func()) []Version {
			return []Version{
				routeVersion(api, s, route.TCPRoute, &gatewayv1.TCPRoute{}, v1.TCPRoutes(everywhere), TCPRoute, synced),
				routeVersion(api, s, route.TCPRoute, &gatewayv1alpha2.TCPRoute{}, alpha.TCPRoutes(everywhere), TCPRouteV1Alpha2, synced),
			}
		}),
		watchOwn(api, kindPolicies, &v1alpha1.TrafficPolicy{}, api.policies.TrafficPolicies(everywhere), policySink(s)),
		watchOwn(api, kindAuthz, &v1alpha1.AuthorizationPolicy{}, api.policies.AuthorizationPolicies(everywhere), authzSink(s)),
		watchOwn(api, kindPeerAuth, &v1alpha1.PeerAuthentication{}, api.policies.PeerAuthentications(everywhere), peerAuthSink(s)),
	}
	var pending atomic.Int32
	pending.Store(int32(len(watches)))
	var group sync.WaitGroup
	for _, run := range watches {
		first := sync.OnceFunc(func() {
			if pending.Add(-1) == 0 {
				s.markSynced()
			}
		})
		group.Go(func() { run(ctx, first) })
	}
	if lastGood.Path != "" {
		group.Go(func() { lastGood.keep(ctx, s, api.log) })
	}
	group.Wait()
	return nil
}

// watchRoutes makes the watch of one kind of routes for the Store. A kind that is
// not served has no objects.
func watchRoutes(api *API, s *Store, kind route.Kind, versions func(synced func()) []Version) func(ctx context.Context, synced func()) {
	return func(ctx context.Context, synced func()) {
		absent := func() {
			s.replaceRoutes(kind, nil)
			synced()
		}
		FollowServed(ctx, api.log, routeKinds[kind], absent, versions(synced)...)
	}
}

// watchOwn makes the watch of a kind of Weir's own for the Store. A kind that is not
// served has no objects.
func watchOwn[O Object, L runtime.Object](api *API, kind string, example O, resource Resource[L], to sink[O]) func(ctx context.Context, synced func()) {
	return func(ctx context.Context, synced func()) {
		feed := newFeed(api, kind, func(o O) { dropManagedFields(o) }, to, synced)
		absent := func() { _ = feed.Replace(nil, "") } // of nothing, nothing is of the wrong type
		FollowServed(ctx, api.log, kind, absent, VersionOf(api.policies, api.log, kind, example, resource, feed))
	}
}

// lookup asks for one pod and its namespace.
func (a *API) lookup(ctx context.Context, namespace, name string) (model.Pod, model.Namespace, error) {
	p, err := a.client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return model.Pod{}, model.Namespace{}, err
	}
	if p.Spec.NodeName != a.node {
		return model.Pod{}, model.Namespace{}, fmt.Errorf("the pod is bound to node %q, this is %q", p.Spec.NodeName, a.node)
	}
	n, err := a.client.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
	if err != nil {
		return model.Pod{}, model.Namespace{}, err
	}
	pod, err := toPod(p)
	if err != nil {
		return model.Pod{}, model.Namespace{}, err
	}
	ns, err := toNamespace(n)
	return pod, ns, err
}
