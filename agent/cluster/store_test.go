package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/weirmesh/weir/agent/attachpb"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/proxy/route"
)

var netipValues = cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})

func withPods(pods ...model.Pod) *Store {
	s := NewStore()
	s.impliedNamespaces = true
	for _, p := range pods {
		s.setPod(compact(p))
	}
	return s
}

func TestAPodThatIsKnownIsFoundAtOnce(t *testing.T) {
	want := model.Pod{Namespace: "shop", Name: "front", UID: "a"}
	s := withPods(want)
	pod, ns, err := s.WaitPod(t.Context(), "shop", "front", "a")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, pod); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(model.Namespace{Name: "shop"}, ns); diff != "" {
		t.Error(diff)
	}
}

func TestAPodIsWaitedForUntilItHasTheRuntimesUID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := withPods(model.Pod{Namespace: "shop", Name: "db-0", UID: "before"})
		go func() {
			time.Sleep(time.Second)
			s.setPod(compact(model.Pod{Namespace: "shop", Name: "db-1", UID: "another"}))
			time.Sleep(time.Second / 2)
			s.setPod(compact(model.Pod{Namespace: "shop", Name: "db-0", UID: "after"}))
		}()
		start := time.Now()
		pod, _, err := s.WaitPod(t.Context(), "shop", "db-0", "after")
		if err != nil || pod.UID != "after" {
			t.Fatalf("got %v, %v", pod, err)
		}
		if waited := time.Since(start); waited != 3*time.Second/2 {
			t.Errorf("waited %v", waited)
		}
	})
}

func TestAPodIsNotDecidedOnBeforeItsNamespaceIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := withPods(model.Pod{Namespace: "shop", Name: "front"})
		s.impliedNamespaces = false
		go func() {
			time.Sleep(time.Second)
			s.tables.namespaces.set(model.Namespace{Name: "shop", Labels: map[string]string{"weirmesh.io/capture": "enabled"}})
		}()
		_, ns, err := s.WaitPod(t.Context(), "shop", "front", "")
		if err != nil || ns.Labels["weirmesh.io/capture"] != "enabled" {
			t.Fatalf("got %v, %v", ns, err)
		}
	})
}

func TestAPodThatDoesNotAppear(t *testing.T) {
	other := model.Pod{Namespace: "shop", Name: "front", UID: "a"}
	static := model.Pod{Namespace: "shop", Name: "front", UID: "a", MirrorHash: "h"}
	tests := []struct {
		promise string
		known   []model.Pod
		lookup  lookupFunc
		want    string // the failure's detail; empty: found
	}{
		{"is unknown", nil, nil, "pod shop/front is not known"},
		{"is unknown while another of its name is there", []model.Pod{other}, nil,
			"pod shop/front is known with the UID a, the runtime starts b"},
		{"is unknown while another static pod of its name is there", []model.Pod{static}, nil,
			"static pod shop/front is known with the hash h, the runtime starts b"},
		{"is asked for once", []model.Pod{other}, func(context.Context, string, string) (model.Pod, model.Namespace, error) {
			return model.Pod{Namespace: "shop", Name: "front", UID: "b"}, model.Namespace{Name: "shop"}, nil
		}, ""},
		{"is unknown if the API server does not know it either", nil, func(context.Context, string, string) (model.Pod, model.Namespace, error) {
			return model.Pod{}, model.Namespace{}, errors.New(`pods "front" not found`)
		}, `pod shop/front is not known after 2s; API server: pods "front" not found`},
		{"is unknown if the API server knows another", nil, func(context.Context, string, string) (model.Pod, model.Namespace, error) {
			return other, model.Namespace{Name: "shop"}, nil
		}, "pod shop/front is known with the UID a, the runtime starts b"},
		{"does not hold up ADD while the API server is silent", nil, func(ctx context.Context, _, _ string) (model.Pod, model.Namespace, error) {
			<-ctx.Done()
			return model.Pod{}, model.Namespace{}, ctx.Err()
		}, "pod shop/front is not known after 2s; API server: context deadline exceeded"},
	}
	for _, test := range tests {
		t.Run(test.promise, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := withPods(test.known...)
				s.lookup = test.lookup
				start := time.Now()
				pod, _, err := s.WaitPod(t.Context(), "shop", "front", "b")
				if waited := time.Since(start); waited < waitPod || waited > waitPod+askTimeout {
					t.Errorf("waited %v", waited)
				}
				if test.want == "" {
					if err != nil || pod.UID != "b" {
						t.Errorf("got %v, %v", pod, err)
					}
					return
				}
				var failure *attachpb.Failure
				if !errors.As(err, &failure) {
					t.Fatalf("got %v, want a Failure", err)
				}
				if diff := cmp.Diff(attachpb.PodUnknown.Fail("%s", test.want), failure); diff != "" {
					t.Error(diff)
				}
			})
		})
	}
}

func TestWaitingEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := NewStore().WaitPod(ctx, "shop", "front", ""); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func changed(s *Store) bool {
	select {
	case <-s.Changed():
		return true
	default:
		return false
	}
}

func TestChangesAreToldOnceAndOnlyIfSomethingChanged(t *testing.T) {
	s := NewStore()
	pod := model.Pod{Namespace: "shop", Name: "front"}
	if changed(s) {
		t.Error("told of a change before any")
	}
	s.setPod(compact(pod))
	s.setPod(compact(model.Pod{Namespace: "shop", Name: "back"}))
	if !changed(s) || changed(s) {
		t.Error("two changes are not told once")
	}
	s.setPod(compact(pod))
	s.dropPod(key{"shop", "nobody"})
	s.tables.namespaces.set(model.Namespace{})
	s.tables.namespaces.drop("")
	changed(s)
	s.setPod(compact(pod))
	s.replace(s.view)
	if changed(s) {
		t.Error("told of a change that is none")
	}
}

// told is what an address is to the pods of namespace "shop".
func told(s *Store, addr netip.AddrPort) route.Destination {
	d, _ := s.Destination(addr, "shop")
	return d
}

func TestDestinationsFollowServicesAndSlices(t *testing.T) {
	s := NewStore()
	addr := netip.MustParseAddr
	check := func(step, dial string, want route.Destination) {
		t.Helper()
		got := told(s, netip.MustParseAddrPort(dial))
		if diff := cmp.Diff(want, got, netipValues, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s: -want +got:\n%s", step, diff)
		}
	}
	service := func(name, ip string) model.Service {
		return model.Service{Namespace: "shop", Name: name, ClusterIPs: []netip.Addr{addr(ip)}, Ports: []model.ServicePort{{Port: 80, Protocol: model.TCP}}}
	}
	slice := func(name, service, ip string) model.EndpointSlice {
		return model.EndpointSlice{Namespace: "shop", Name: name, Service: service,
			Ports:     []model.EndpointPort{{Port: 8080, Protocol: model.TCP}},
			Endpoints: []model.Endpoint{{Address: addr(ip), Ready: true}}}
	}
	is := func(service string, endpoints ...string) route.Destination {
		d := route.Destination{Service: service}
		for _, e := range endpoints {
			d.Endpoints = append(d.Endpoints, route.Endpoint{Addr: netip.MustParseAddrPort(e)})
		}
		return d
	}

	s.tables.slices.set(slice("back-1", "back", "10.0.0.1"))
	check("a slice without its Service", "10.96.0.7:80", is(""))
	s.tables.services.set(service("back", "10.96.0.7"))
	check("a Service after its slice", "10.96.0.7:80", is("shop/back", "10.0.0.1:8080"))
	check("the same through an IPv6 socket", "[::ffff:10.96.0.7]:80", is("shop/back", "10.0.0.1:8080"))
	s.tables.slices.set(slice("back-2", "back", "10.0.0.2"))
	check("a second slice", "10.96.0.7:80", is("shop/back", "10.0.0.1:8080", "10.0.0.2:8080"))
	s.tables.slices.set(slice("back-2", "front", "10.0.0.2"))
	check("a slice that changes its Service", "10.96.0.7:80", is("shop/back", "10.0.0.1:8080"))
	s.tables.slices.drop(key{"shop", "back-1"})
	check("no slice left", "10.96.0.7:80", is("shop/back"))
	s.tables.services.set(service("back", "10.96.0.8"))
	check("the address it had", "10.96.0.7:80", is(""))
	check("the address it has now", "10.96.0.8:80", is("shop/back"))
	s.tables.services.set(service("front", "10.96.0.8"))
	s.tables.services.drop(key{"shop", "back"})
	check("an address taken over before its Service is gone", "10.96.0.8:80", is("shop/front", "10.0.0.2:8080"))
	s.tables.slices.replace(nil)
	check("a list without slices", "10.96.0.8:80", is("shop/front"))
	s.tables.services.replace(nil)
	check("a list without Services", "10.96.0.8:80", is(""))
}

// eventually waits for what another goroutine does.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10s: %s", what)
		}
	}
}

func podNames(s *Store) string {
	var names []string
	for _, p := range s.Pods() {
		names = append(names, fmt.Sprintf("%s=%s", p.ID(), p.Labels["weirmesh.io/capture"]))
	}
	return strings.Join(names, " ")
}

func TestServedNamesPortsThatHaveEndpoints(t *testing.T) {
	s := NewStore()
	serve := func(namespace, name string, ips []string, endpoints ...string) {
		svc := model.Service{Namespace: namespace, Name: name, Ports: []model.ServicePort{{Port: 53, Protocol: model.UDP}, {Port: 443, Protocol: model.TCP}}}
		slice := model.EndpointSlice{Namespace: namespace, Name: name, Service: name, Ports: []model.EndpointPort{{Port: 6443, Protocol: model.TCP}}}
		for _, ip := range ips {
			svc.ClusterIPs = append(svc.ClusterIPs, netip.MustParseAddr(ip))
		}
		for _, e := range endpoints {
			slice.Endpoints = append(slice.Endpoints, model.Endpoint{Address: netip.MustParseAddr(e), Ready: true})
		}
		s.tables.services.set(svc)
		s.tables.slices.set(slice)
	}
	expect := func(want ...string) {
		t.Helper()
		var got []string
		for _, a := range s.Served() {
			got = append(got, a.String())
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	expect()
	serve("shop", "none", []string{"10.96.0.3"})
	expect()
	serve("a", "dual", []string{"10.96.0.9", "fd00:96::9"}, "10.0.0.9", "fd00::9")
	expect("10.96.0.9:443", "[fd00:96::9]:443")
	serve("default", "kubernetes", []string{"10.96.0.1"}, "192.168.0.7")
	expect("10.96.0.1:443", "[fd00:96::9]:443")
}
