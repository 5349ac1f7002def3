// Package client reads and writes the kinds of agent/api on an API server, typed and
// by way of client-go, as the Gateway API's own client does for its kinds. Package
// fake has the same without a server.
package client

import (
	"context"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/gentype"
	"k8s.io/client-go/rest"

	"github.com/weirmesh/weir/agent/api/v1alpha1"
)

// Interface is a client of Weir's kinds.
type Interface interface {
	// TrafficPolicies are those of a namespace, or with "" of all.
	TrafficPolicies(namespace string) TrafficPolicies
	// AuthorizationPolicies are the same.
	AuthorizationPolicies(namespace string) AuthorizationPolicies
	// PeerAuthentications are the same.
	PeerAuthentications(namespace string) PeerAuthentications
}

// Kind is what agents and the controller do with objects of a kind; L is their list.
// Errors are those of the API server, as apimachinery's package errors tells them apart.
type Kind[O, L any] interface {
	List(ctx context.Context, opts metav1.ListOptions) (L, error)
	Watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error)
	Patch(ctx context.Context, name string, kind types.PatchType, patch []byte, opts metav1.PatchOptions, subresources ...string) (O, error)
}

// Weir's kinds.
type (
	TrafficPolicies       = Kind[*v1alpha1.TrafficPolicy, *v1alpha1.TrafficPolicyList]
	AuthorizationPolicies = Kind[*v1alpha1.AuthorizationPolicy, *v1alpha1.AuthorizationPolicyList]
	PeerAuthentications   = Kind[*v1alpha1.PeerAuthentication, *v1alpha1.PeerAuthenticationList]
)

// Scheme knows Weir's kinds. Its error is v1alpha1.Install's.
func Scheme() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	return scheme, v1alpha1.Install(scheme)
}

// New makes a client of the API server that config names. It does not connect.
func New(config *rest.Config) (Interface, error) {
	scheme, err := Scheme()
	if err != nil {
		return nil, err
	}
	config = rest.CopyConfig(config)
	config.APIPath, config.GroupVersion = "/apis", &v1alpha1.GroupVersion
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	server, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", v1alpha1.GroupVersion, err)
	}
	return client{server, runtime.NewParameterCodec(scheme)}, nil
}

type client struct {
	server     rest.Interface
	parameters runtime.ParameterCodec
}

func (c client) TrafficPolicies(namespace string) TrafficPolicies {
	return gentype.NewClientWithList(v1alpha1.TrafficPolicyResource, c.server, c.parameters, namespace,
		empty[v1alpha1.TrafficPolicy], empty[v1alpha1.TrafficPolicyList])
}

func (c client) AuthorizationPolicies(namespace string) AuthorizationPolicies {
	return gentype.NewClientWithList(v1alpha1.AuthorizationPolicyResource, c.server, c.parameters, namespace,
		empty[v1alpha1.AuthorizationPolicy], empty[v1alpha1.AuthorizationPolicyList])
}

func (c client) PeerAuthentications(namespace string) PeerAuthentications {
	return gentype.NewClientWithList(v1alpha1.PeerAuthenticationResource, c.server, c.parameters, namespace,
		empty[v1alpha1.PeerAuthentication], empty[v1alpha1.PeerAuthenticationList])
}

func empty[T any]() *T { return new(T) }
