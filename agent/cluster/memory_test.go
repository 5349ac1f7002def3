package cluster

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

// The Store keeps of each pod, with its share of Services and slices, at most
// this many bytes.
const maxBytesPerPod = 1024

func TestMemoryOfAPod(t *testing.T) {
	const pods, podsPerService = 10_000, 10
	before := heap()
	s := NewStore()
	fill(t, s, pods, podsPerService)
	perPod := (heap() - before) / pods
	if got := len(s.view.peers); got != pods {
		t.Fatalf("%d pods", got)
	}
	t.Logf("%d bytes a pod: %d pods, %d of them behind each dual-stack Service", perPod, pods, podsPerService)
	if perPod > maxBytesPerPod {
		t.Errorf("%d bytes a pod, more than %d", perPod, maxBytesPerPod)
	}
}

// heap is what is in use after a collection, in bytes.
func heap() uint64 {
	for range 3 { // unique's strings take more than one
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// fill puts pods in, with labels, annotations and addresses of both families,
// through the conversions that a source uses.
func fill(t *testing.T, s *Store, pods, podsPerService int) {
	t.Helper()
	into := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	peerSink, serviceSink, sliceSink := peerSink(s), serviceSink(s), sliceSink(s)
	var slices [2]*discoveryv1.EndpointSlice // IPv4, IPv6
	for i := range pods {
		service := fmt.Sprintf("service-%d", i/podsPerService)
		namespace := fmt.Sprintf("namespace-%d", i/podsPerService%100)
		if i%podsPerService == 0 {
			svc := &corev1.Service{ObjectMeta: meta(namespace, service)}
			svc.Spec.ClusterIPs = []string{ip4(96, i), ip6(96, i)}
			svc.Spec.Ports = []corev1.ServicePort{{Name: "http", Port: 80}, {Name: "grpc", Port: 81}}
			into(serviceSink.set(svc))
			for family := range slices {
				slices[family] = apiSlice()
				slices[family].Namespace, slices[family].Name = namespace, fmt.Sprintf("%s-x%d", service, family)
				slices[family].Labels[discoveryv1.LabelServiceName] = service
			}
		}
		pod := apiPod(fmt.Sprintf("%s-7d4b9c6f5d-%05d", service, i), fmt.Sprintf("0b1c2d3e-aaaa-bbbb-cccc-%012d", i), "enabled")
		pod.Namespace = namespace
		pod.Spec.ServiceAccountName, pod.Spec.Containers = service, []corev1.Container{{Name: "app", Image: "app"}}
		pod.Annotations = map[string]string{"weirmesh.io/exclude-inbound-ports": "9090", "kubernetes.io/config.seen": "x"}
		pod.Status.Phase = corev1.PodRunning
		pod.Status.PodIPs = []corev1.PodIP{{IP: ip4(10, i)}, {IP: ip6(10, i)}}
		into(peerSink.set(pod))
		for family, slice := range slices {
			slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{pod.Status.PodIPs[family].IP},
				TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: namespace, Name: pod.Name, UID: types.UID(pod.UID)},
			})
			into(sliceSink.set(slice))
		}
	}
}

func ip4(first byte, i int) string {
	return netip.AddrFrom4([4]byte{first, byte(i >> 16), byte(i >> 8), byte(i)}).String()
}

func ip6(first byte, i int) string {
	return netip.AddrFrom16([16]byte{0: 0xfd, 1: first, 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)}).String()
}
