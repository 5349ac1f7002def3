package cluster

import (
	"net/url"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/weirmesh/weir/proxy/route"
)

// toProbes is what kubelet asks a pod by the network: of all its containers the probes, and
// the hooks of their life that are requests. What the proxy could not tell from something
// else is none: what is inside the application's TLS; nor is what goes to another host. A
// TCP probe, which says nothing, needs no exception.
func toProbes(spec *corev1.PodSpec) []route.Probe {
	var out []route.Probe
	add := func(p route.Probe, ok bool) {
		if ok && !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	for _, c := range slices.Concat(spec.InitContainers, spec.Containers) { // sidecars among the first
		for _, p := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe} {
			if p == nil {
				continue
			}
			add(httpProbe(&c, p.HTTPGet))
			add(grpcProbe(p.GRPC))
		}
		if l := c.Lifecycle; l != nil {
			for _, h := range []*corev1.LifecycleHandler{l.PostStart, l.PreStop} {
				if h != nil {
					add(httpProbe(&c, h.HTTPGet))
				}
			}
		}
	}
	return out
}

func httpProbe(c *corev1.Container, get *corev1.HTTPGetAction) (route.Probe, bool) {
	if get == nil || get.Host != "" || get.Scheme == corev1.URISchemeHTTPS {
		return route.Probe{}, false
	}
	port, known := portOf(c, get.Port)
	target, ok := requestTarget(get.Path)
	return route.Probe{Port: port, Target: shared(target)}, known && ok
}

func grpcProbe(call *corev1.GRPCAction) (route.Probe, bool) {
	if call == nil {
		return route.Probe{}, false
	}
	port, err := toPort(call.Port)
	return route.Probe{Port: port, GRPC: true}, err == nil
}

// portOf resolves a name by the ports of the container, as kubelet does.
func portOf(c *corev1.Container, port intstr.IntOrString) (uint16, bool) {
	number := port.IntVal
	if port.Type == intstr.String {
		i := slices.IndexFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.Name == port.StrVal })
		if i < 0 {
			return 0, false
		}
		number = c.Ports[i].ContainerPort
	}
	out, err := toPort(number)
	return out, err == nil
}

// requestTarget is what kubelet asks for by HTTP where a path is declared, which may have a
// query (kubelet v1.37, pkg/probe/http, formatURL).
func requestTarget(path string) (string, bool) {
	declared, err := url.Parse(path)
	if err != nil {
		declared = &url.URL{Path: path}
	}
	declared.Scheme, declared.Host = "http", "pod"
	asked, err := url.Parse(declared.String())
	if err != nil {
		return "", false
	}
	return asked.RequestURI(), true
}

// probedContainers are containers with nothing but what toProbes reads.
func probedContainers(list []corev1.Container) []corev1.Container {
	var out []corev1.Container
	for i := range list {
		c := &list[i]
		out = append(out, corev1.Container{
			Ports: c.Ports, LivenessProbe: c.LivenessProbe, ReadinessProbe: c.ReadinessProbe, StartupProbe: c.StartupProbe, Lifecycle: c.Lifecycle,
		})
	}
	return out
}
