package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/weirmesh/weir/tests/bench/report"
	"github.com/weirmesh/weir/tests/pod"
)

const (
	// endpointHeader, in an answer, is the endpoint's address; generationHeader is
	// what the Service's route says.
	endpointHeader, generationHeader = "Endpoint", "Generation"
	// askEvery is how often a pod looks whether a change has arrived.
	askEvery = 20 * time.Millisecond
	// arriveTimeout is how long a change may take before the benchmark fails.
	arriveTimeout = 30 * time.Second
	// pause is between two changes.
	pause = 200 * time.Millisecond
	// memoryEvery is how often the agent's memory is looked at.
	memoryEvery = time.Second
)

// caller is a pod that asks Services, each on one connection that stays. The node asks it
// in turn.
type caller struct {
	pod   *pod.Pod
	conns map[netip.Addr]*keptConn
	asked *keptConn // the node's, to what the pod serves; nil: none
}

type keptConn struct {
	net.Conn
	r *bufio.Reader
}

// ask asks a Service once. The first time it connects.
func (c *caller) ask(ctx context.Context, service netip.Addr) (http.Header, error) {
	conn := c.conns[service]
	if conn == nil {
		var err error
		if conn, err = c.dial(ctx, service); err != nil {
			return nil, err
		}
	}
	answer, err := conn.get("/")
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("pod %s: %s from %s: %s", c.pod.ID(), answer.Status, service, answer.Header.Get("Proxy-Status"))
	}
	return answer.Header, nil
}

// get sends a request and reads the answer.
func (c *keptConn) get(path string) (*http.Response, error) {
	if err := c.SetDeadline(time.Now().Add(arriveTimeout)); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: service\r\n\r\n"); err != nil {
		return nil, err
	}
	answer, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return nil, err
	}
	_, err = io.Copy(io.Discard, answer.Body)
	return answer, err
}

// status is what the node, which has no identity, is answered by what the pod serves: the
// status, or 0 if its connection is reset.
func (c *caller) status(ctx context.Context, path string) (int, error) {
	if c.asked == nil {
		conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp4", netip.AddrPortFrom(c.pod.Address(false), serverPort).String())
		if err != nil {
			return 0, err
		}
		c.asked = &keptConn{conn, bufio.NewReaderSize(conn, 1<<10)}
	}
	answer, err := c.asked.get(path)
	if err == nil {
		return answer.StatusCode, nil
	}
	c.asked.Close()
	c.asked = nil
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return 0, nil
	}
	return 0, fmt.Errorf("pod %s: %w", c.pod.ID(), err)
}

func (c *caller) dial(ctx context.Context, service netip.Addr) (*keptConn, error) {
	var conn net.Conn
	err := pod.In(c.pod.Netns, func() error {
		var err error
		conn, err = (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp4", netip.AddrPortFrom(service, 80).String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("pod %s: %w", c.pod.ID(), err)
	}
	if c.conns == nil {
		c.conns = map[netip.Addr]*keptConn{}
	}
	c.conns[service] = &keptConn{conn, bufio.NewReaderSize(conn, 1<<10)}
	return c.conns[service], nil
}

func (c *caller) close() {
	for _, conn := range c.conns {
		conn.Close()
	}
	c.conns = nil
	if c.asked != nil {
		c.asked.Close()
	}
}

// use asks each Service once, and waits for one that is not known yet: a Service that
// is new to a proxy is so for a moment to its agent, too.
func (c *caller) use(ctx context.Context, services []netip.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, arriveTimeout)
	defer cancel()
	for _, service := range services {
		for {
			_, err := c.ask(ctx, service)
			if err == nil {
				break
			}
			if conn := c.conns[service]; conn != nil {
				conn.Close()
				delete(c.conns, service)
			}
			select {
			case <-ctx.Done():
				return err
			case <-time.After(pause):
			}
		}
	}
	return nil
}

// arrives looks until a change shows, and returns when that was.
func (c *caller) arrives(ctx context.Context, shows shown) (time.Time, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, arriveTimeout, fmt.Errorf("pod %s: the change has not arrived after %v", c.pod.ID(), arriveTimeout))
	defer cancel()
	next := time.NewTicker(askEvery)
	defer next.Stop()
	for {
		if arrived, err := shows(ctx, c); err != nil {
			return time.Time{}, err
		} else if arrived {
			return time.Now(), nil
		}
		select {
		case <-ctx.Done():
			return time.Time{}, context.Cause(ctx)
		case <-next.C:
		}
	}
}

// taken is what changes took: each into each proxy, in ms, and each of the agent's
// CPU time in all, in ms.
type taken struct{ slices, routes, authorizations, peers, cpu []float64 }

// shown looks once, as a pod or at it, whether a change is in force there.
type shown func(context.Context, *caller) (bool, error)

// changes measures changes of each kind, one at a time.
func (c *configBench) changes(ctx context.Context, when string) (taken, error) {
	var out taken
	for n := range c.f.changes {
		if n%10 == 0 {
			fmt.Fprintf(c.progress, "%s: change %d of %d\n", when, n+1, c.f.changes)
		}
		for _, kind := range []struct {
			write   func(context.Context) (shown, error)
			samples *[]float64
		}{
			{func(ctx context.Context) (shown, error) { return c.changeSlice(ctx, slicesProbe) }, &out.slices},
			{func(ctx context.Context) (shown, error) { return c.changeRoute(ctx, routesProbe) }, &out.routes},
			{c.changeAuthorization, &out.authorizations},
			{func(ctx context.Context) (shown, error) { return c.changePeers(ctx, "Strict") }, &out.peers},
			{func(ctx context.Context) (shown, error) { return c.changePeers(ctx, "Permissive") }, &out.peers},
		} {
			before, err := pod.CPUTime(c.agent.PID())
			if err != nil {
				return out, err
			}
			took, err := c.change(ctx, kind.write)
			if err != nil {
				return out, err
			}
			*kind.samples = append(*kind.samples, took...)
			select {
			case <-ctx.Done():
				return out, context.Cause(ctx)
			case <-time.After(pause):
			}
			after, err := pod.CPUTime(c.agent.PID())
			if err != nil {
				return out, err
			}
			out.cpu = append(out.cpu, millis(after-before))
		}
	}
	return out, nil
}

// change writes one change and waits until it shows in every pod.
func (c *configBench) change(ctx context.Context, write func(context.Context) (shown, error)) ([]float64, error) {
	shows, err := write(ctx)
	if err != nil {
		return nil, err
	}
	written := time.Now()
	took, errs := make([]float64, len(c.callers)), make([]error, len(c.callers))
	var running sync.WaitGroup
	for i, caller := range c.callers {
		running.Go(func() {
			var at time.Time
			at, errs[i] = caller.arrives(ctx, shows)
			took[i] = millis(at.Sub(written))
		})
	}
	running.Wait()
	return took, errors.Join(errs...)
}

// next is a Service's next generation.
func (c *configBench) next(service int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.generation[service]++
	return c.generation[service]
}

// changeSlice puts other endpoints in the place of all that a Service has, and
// returns what shows that in an answer.
func (c *configBench) changeSlice(ctx context.Context, service int) (shown, error) {
	s := slice(service, c.next(service))
	fresh := map[string]bool{}
	for _, e := range s.Endpoints {
		fresh[e.Addresses[0]] = true
	}
	_, err := c.client.DiscoveryV1().EndpointSlices(namespace).Update(ctx, s, metav1.UpdateOptions{})
	return c.answers(service, func(h http.Header) bool { return fresh[h.Get(endpointHeader)] }), err
}

// changeRoute has a Service's route set another header, and returns what shows that
// in an answer.
func (c *configBench) changeRoute(ctx context.Context, service int) (shown, error) {
	want := strconv.Itoa(c.next(service))
	patch := fmt.Sprintf(`[{"op":"replace","path":"/spec/rules/0/filters/0/responseHeaderModifier/set/0/value","value":%q}]`, want)
	_, err := c.gateway.GatewayV1().HTTPRoutes(namespace).Patch(ctx, serviceName(service), types.JSONPatchType, []byte(patch), metav1.PatchOptions{})
	return c.answers(service, func(h http.Header) bool { return h.Get(generationHeader) == want }), err
}

// answers is a change that an answer of a Service shows.
func (c *configBench) answers(service int, shows func(http.Header) bool) shown {
	return func(ctx context.Context, from *caller) (bool, error) {
		header, err := from.ask(ctx, c.ips[service])
		return err == nil && shows(header), err
	}
}

// Policies of the namespace, which govern all of its pods.
var (
	authorizations = schema.GroupVersionResource{Group: "policy.weirmesh.io", Version: "v1alpha1", Resource: "authorizationpolicies"}
	peerings       = schema.GroupVersionResource{Group: "policy.weirmesh.io", Version: "v1alpha1", Resource: "peerauthentications"}
)

// changeAuthorization has the namespace's policy refuse another path.
func (c *configBench) changeAuthorization(ctx context.Context) (shown, error) {
	path := fmt.Sprintf("/refused/%d", c.next(authorizationProbe))
	err := c.patch(ctx, authorizations, fmt.Sprintf(`[{"op":"replace","path":"/spec/rules/0/http/paths/0/value","value":%q}]`, path))
	return func(ctx context.Context, of *caller) (bool, error) {
		status, err := of.status(ctx, path)
		if err == nil && status != http.StatusForbidden && status != http.StatusOK {
			err = fmt.Errorf("pod %s: the node gets %d", of.pod.ID(), status)
		}
		return status == http.StatusForbidden, err
	}, err
}

// changePeers has the namespace's pods demand mTLS, or not any more.
func (c *configBench) changePeers(ctx context.Context, mode string) (shown, error) {
	want := map[string]int{"Strict": 0, "Permissive": http.StatusOK}[mode]
	err := c.patch(ctx, peerings, fmt.Sprintf(`[{"op":"replace","path":"/spec/mode","value":%q}]`, mode))
	return func(ctx context.Context, of *caller) (bool, error) {
		status, err := of.status(ctx, "/")
		return status == want, err
	}, err
}

// patch changes the policy of a kind that there is.
func (c *configBench) patch(ctx context.Context, kind schema.GroupVersionResource, patch string) error {
	_, err := c.policies.Resource(kind).Namespace(namespace).Patch(ctx, policyName, types.JSONPatchType, []byte(patch), metav1.PatchOptions{})
	return err
}

// startStorm writes other changes, to all Services by turns, at the rate that is
// asked for or as fast as the API server takes them. The function it returns ends it
// and says how many there were.
func (c *configBench) startStorm(ctx context.Context) func() (int, error) {
	ctx, cancel := context.WithCancel(ctx)
	next := make(chan int)
	var written int
	var errs []error
	var mu sync.Mutex
	var running sync.WaitGroup
	for range writers {
		running.Go(func() {
			for i := range next {
				write := c.changeSlice
				if i%routeEach == 0 {
					write = c.changeRoute
				}
				_, err := write(ctx, i)
				mu.Lock()
				if err == nil {
					written++
				} else if ctx.Err() == nil {
					errs = append(errs, err)
				}
				mu.Unlock()
			}
		})
	}
	running.Go(func() {
		defer close(next)
		tick := time.NewTicker(time.Second / time.Duration(c.f.storm))
		defer tick.Stop()
		for i := 0; ; i = (i + 1) % c.f.services {
			if i == slicesProbe || i == routesProbe {
				continue
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			select {
			case <-ctx.Done():
				return
			case next <- i:
			}
		}
	})
	return func() (int, error) {
		cancel()
		running.Wait()
		return written, errors.Join(errs...)
	}
}

// watchMemory looks at the agent's memory until the function it returns is called,
// which returns what PSS and RSS were, in MB.
func (c *configBench) watchMemory(ctx context.Context) func() ([]float64, []float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	var shares, residents []float64
	var failed error
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			share, err := pss(c.agent.PID())
			resident, residentErr := rss(c.agent.PID())
			if failed = errors.Join(err, residentErr); failed != nil {
				return
			}
			shares, residents = append(shares, share), append(residents, resident)
			select {
			case <-ctx.Done():
				return
			case <-time.After(memoryEvery):
			}
		}
	}()
	return func() ([]float64, []float64, error) {
		cancel()
		<-done
		return shares, residents, failed
	}
}

// freshProxies is the memory of new proxies of which each has used n Services of
// those there are, while they idle.
func (c *configBench) freshProxies(ctx context.Context, n, of int) (report.Series, error) {
	fmt.Fprintf(c.progress, "%d proxies that use %d Services of %d\n", c.f.sampled, n, of)
	var pods []*pod.Pod
	for i := range c.f.sampled {
		p, err := c.addPod(ctx, fmt.Sprintf("fresh-%d-%d-%d", of, n, i))
		if err != nil {
			return report.Series{}, err
		}
		caller := &caller{pod: p}
		err = caller.use(ctx, c.servicesOf(max(0, of-(i+1)*n), n, of)) // the newest
		caller.close()
		if err != nil {
			return report.Series{}, err
		}
		pods = append(pods, p)
	}
	select {
	case <-ctx.Done():
		return report.Series{}, context.Cause(ctx)
	case <-time.After(c.f.calm):
	}
	s, err := proxyMemory(c.node, nameProxy(n, of), pods)
	for _, p := range pods {
		err = errors.Join(err, c.removePod(ctx, p))
	}
	return s, err
}
