// Package fake keeps Weir's kinds in memory, for tests: no HTTP, no streamed lists,
// no validation, and of patches those that merge.
package fake

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/gentype"
	"k8s.io/client-go/testing"

	"github.com/weirmesh/weir/agent/api/client"
	"github.com/weirmesh/weir/agent/api/v1alpha1"
)

// Client is a client.Interface. Reactors that are put before its own say otherwise.
// Use New.
type Client struct {
	testing.Fake
	tracker testing.ObjectTracker
}

var _ client.Interface = (*Client)(nil)

// New makes a client of a server that has these objects. It panics over one that is
// none of Weir's.
func New(objects ...runtime.Object) *Client {
	scheme, err := client.Scheme()
	if err != nil {
		panic(err)
	}
	tracker := testing.NewObjectTracker(scheme, serializer.NewCodecFactory(scheme).UniversalDecoder())
	for _, o := range objects {
		if err := tracker.Add(o); err != nil {
			panic(err)
		}
	}
	c := &Client{tracker: tracker}
	c.AddReactor("*", "*", testing.ObjectReaction(tracker))
	c.AddWatchReactor("*", func(a testing.Action) (bool, watch.Interface, error) {
		var opts metav1.ListOptions
		if w, ok := a.(testing.WatchActionImpl); ok {
			opts = w.ListOptions
		}
		stream, err := tracker.Watch(a.GetResource(), a.GetNamespace(), opts)
		return true, stream, err
	})
	return c
}

// Tracker holds the objects.
func (c *Client) Tracker() testing.ObjectTracker { return c.tracker }

// IsWatchListSemanticsUnSupported tells a reflector that lists are not streamed.
func (c *Client) IsWatchListSemanticsUnSupported() bool { return true }

// TrafficPolicies are those of a namespace, or with "" of all.
func (c *Client) TrafficPolicies(namespace string) client.TrafficPolicies {
	return c.Policies(namespace)
}

// Policies is TrafficPolicies for a test, which also gets, creates, updates and
// deletes them.
func (c *Client) Policies(namespace string) *gentype.FakeClientWithList[*v1alpha1.TrafficPolicy, *v1alpha1.TrafficPolicyList] {
	return gentype.NewFakeClientWithList(&c.Fake, namespace,
		v1alpha1.GroupVersion.WithResource(v1alpha1.TrafficPolicyResource), v1alpha1.GroupVersion.WithKind("TrafficPolicy"),
		func() *v1alpha1.TrafficPolicy { return &v1alpha1.TrafficPolicy{} },
		func() *v1alpha1.TrafficPolicyList { return &v1alpha1.TrafficPolicyList{} },
		func(to, from *v1alpha1.TrafficPolicyList) { to.ListMeta = from.ListMeta },
		func(l *v1alpha1.TrafficPolicyList) []*v1alpha1.TrafficPolicy { return gentype.ToPointerSlice(l.Items) },
		func(l *v1alpha1.TrafficPolicyList, items []*v1alpha1.TrafficPolicy) {
			l.Items = gentype.FromPointerSlice(items)
		})
}

// AuthorizationPolicies are those of a namespace, or with "" of all.
func (c *Client) AuthorizationPolicies(namespace string) client.AuthorizationPolicies {
	return c.Authorizations(namespace)
}

// Authorizations is AuthorizationPolicies as Policies is TrafficPolicies.
func (c *Client) Authorizations(namespace string) *gentype.FakeClientWithList[*v1alpha1.AuthorizationPolicy, *v1alpha1.AuthorizationPolicyList] {
	return gentype.NewFakeClientWithList(&c.Fake, namespace,
		v1alpha1.GroupVersion.WithResource(v1alpha1.AuthorizationPolicyResource), v1alpha1.GroupVersion.WithKind("AuthorizationPolicy"),
		func() *v1alpha1.AuthorizationPolicy { return &v1alpha1.AuthorizationPolicy{} },
		func() *v1alpha1.AuthorizationPolicyList { return &v1alpha1.AuthorizationPolicyList{} },
		func(to, from *v1alpha1.AuthorizationPolicyList) { to.ListMeta = from.ListMeta },
		func(l *v1alpha1.AuthorizationPolicyList) []*v1alpha1.AuthorizationPolicy {
			return gentype.ToPointerSlice(l.Items)
		},
		func(l *v1alpha1.AuthorizationPolicyList, items []*v1alpha1.AuthorizationPolicy) {
			l.Items = gentype.FromPointerSlice(items)
		})
}

// PeerAuthentications are those of a namespace, or with "" of all.
func (c *Client) PeerAuthentications(namespace string) client.PeerAuthentications {
	return c.Peers(namespace)
}

// Peers is PeerAuthentications as Policies is TrafficPolicies.
func (c *Client) Peers(namespace string) *gentype.FakeClientWithList[*v1alpha1.PeerAuthentication, *v1alpha1.PeerAuthenticationList] {
	return gentype.NewFakeClientWithList(&c.Fake, namespace,
		v1alpha1.GroupVersion.WithResource(v1alpha1.PeerAuthenticationResource), v1alpha1.GroupVersion.WithKind("PeerAuthentication"),
		func() *v1alpha1.PeerAuthentication { return &v1alpha1.PeerAuthentication{} },
		func() *v1alpha1.PeerAuthenticationList { return &v1alpha1.PeerAuthenticationList{} },
		func(to, from *v1alpha1.PeerAuthenticationList) { to.ListMeta = from.ListMeta },
		func(l *v1alpha1.PeerAuthenticationList) []*v1alpha1.PeerAuthentication {
			return gentype.ToPointerSlice(l.Items)
		},
		func(l *v1alpha1.PeerAuthenticationList, items []*v1alpha1.PeerAuthentication) {
			l.Items = gentype.FromPointerSlice(items)
		})
}
