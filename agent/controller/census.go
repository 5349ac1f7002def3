package controller

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/agent/push"
)

// How far proxies have routes and policies is asked of the agents, at the port of their
// metrics. They write nothing to the API server about it: a route of a thousand nodes
// would be a thousand writes a change, each of which all watchers hear of, and the
// agents would need a right for it. Asked are those whose pod is ready, all of them one
// by one, at most askRate a second whatever their number, and seldom while nothing is
// under way. What is said is shown, and hastens the rotation of a CA, which happens
// without it, too: it opens nothing to anybody, so that plain HTTP will do.
const (
	askRate    = 100
	askTimeout = 2 * time.Second
	// soon is how long after a round the next begins if something is not everywhere yet;
	// seldom, if all are.
	soon   = time.Second
	seldom = 30 * time.Second
	// moment is what agents get to hear what the controller has heard.
	moment = 200 * time.Millisecond
	// maxAnswer is how much an agent may say, in bytes: of each object some 60, of each use
	// some 150.
	maxAnswer = 16 << 20
)

// census is what agents say of their proxies.
type census struct {
	agents *kept[*corev1.Pod, agent]
	nodes  *kept[*corev1.Node, node]
	ask    Ask
	told   func() // after every round
	log    *slog.Logger

	wanted chan struct{} // a route, a policy or a root is not everywhere yet

	mu      sync.Mutex
	rounds  int
	answers map[string]answer // by the agent's pod
	alone   map[string]bool   // nodes that had an agent and have none: their proxies go on
	said    map[string]string // pod → what was last logged of it
}

// answer is what is known of an agent.
type answer struct {
	node string
	// ready is whether it can be asked; one that cannot is starting, or its node is
	// away.
	ready bool
	said  *model.Programmed // nil: it did not answer
}

func newCensus(w *watches, ask Ask, told func(), log *slog.Logger) *census {
	return &census{agents: w.agents, nodes: w.nodes, ask: ask, told: told, log: log, wanted: make(chan struct{}, 1), alone: map[string]bool{}, said: map[string]string{}}
}

// Ask asks the agent at an address.
type Ask func(ctx context.Context, ip string) (model.Programmed, error)

// AskOn asks agents on a port. There is one question to each in a round: connections
// are not kept.
func AskOn(port int) Ask {
	client := &http.Client{Timeout: askTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	return func(ctx context.Context, ip string) (model.Programmed, error) {
		url := "http://" + net.JoinHostPort(ip, strconv.Itoa(port)) + push.ProgrammedPath
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return model.Programmed{}, err
		}
		response, err := client.Do(request)
		if err != nil {
			return model.Programmed{}, err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return model.Programmed{}, fmt.Errorf("%s: %s", url, response.Status)
		}
		var out model.Programmed
		err = json.NewDecoder(io.LimitReader(response.Body, maxAnswer)).Decode(&out)
		return out, err
	}
}

// run asks again and again until ctx is done.
func (c *census) run(ctx context.Context) {
	if waitAll(ctx, c.agents.synced, c.nodes.synced) != nil {
		return
	}
	for {
		c.round(ctx)
		select {
		case <-ctx.Done():
			return
		case <-time.After(soon):
		}
		select {
		case <-ctx.Done():
			return
		case <-c.wanted:
			select {
			case <-ctx.Done():
				return
			case <-time.After(moment):
			}
		case <-time.After(seldom - soon):
		}
	}
}

// want says that a route, a policy or a root is not everywhere yet.
func (c *census) want() {
	select {
	case c.wanted <- struct{}{}:
	default:
	}
}

// round asks every agent once.
func (c *census) round(ctx context.Context) {
	answers := map[string]answer{}
	var asked []agent
	for a := range c.agents.each {
		if a.deletion {
			continue
		}
		answers[a.pod] = answer{node: a.node, ready: a.serves}
		if a.serves {
			asked = append(asked, a)
		}
	}
	var mu sync.Mutex
	var asking sync.WaitGroup
	pace := time.NewTicker(time.Second / askRate)
	defer pace.Stop()
	for _, a := range asked {
		asking.Go(func() {
			said, err := c.ask(ctx, a.ip)
			c.note(ctx, a, err)
			if err == nil {
				mu.Lock()
				defer mu.Unlock()
				answers[a.pod] = answer{a.node, true, &said}
			}
		})
		select {
		case <-ctx.Done():
		case <-pace.C:
		}
	}
	asking.Wait()
	if ctx.Err() != nil {
		return
	}
	there := map[string]bool{}
	for n := range c.nodes.each {
		there[n.name] = true
	}
	c.mu.Lock()
	for _, a := range c.answers {
		c.alone[a.node] = true
	}
	for _, a := range answers {
		delete(c.alone, a.node)
	}
	maps.DeleteFunc(c.alone, func(node string, _ bool) bool { return !there[node] })
	c.answers = answers
	c.rounds++
	maps.DeleteFunc(c.said, func(pod, _ string) bool { return !answers[pod].ready })
	c.mu.Unlock()
	c.told()
}

// trusted reports whether all proxies of the cluster are known to trust the roots of a
// digest: every agent says so, and no node that had one is without. If not, they are asked
// soon. Without a census nothing is known.
func (c *census) trusted(roots string) bool {
	if c == nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.rounds > 0 && len(c.answers) > 0 && len(c.alone) == 0
	for _, a := range c.answers {
		all = all && a.said != nil && a.said.Trusted == roots
	}
	if !all {
		c.want()
	}
	return all
}

// note logs once that an agent does not answer, and once that it does again.
func (c *census) note(ctx context.Context, a agent, err error) {
	if ctx.Err() != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch last := c.said[a.pod]; {
	case err == nil && last != "":
		delete(c.said, a.pod)
		c.log.InfoContext(ctx, "agent answers again", "pod", a.pod, "node", a.node)
	case err != nil && last != err.Error():
		c.said[a.pod] = err.Error()
		c.log.WarnContext(ctx, "agent does not say what its proxies have; asking again", "pod", a.pod, "node", a.node, "error", err)
	}
}

// tally is what was said in a round; nil if there was none yet.
func (c *census) tally() *tally {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rounds == 0 {
		return nil
	}
	t := &tally{round: c.rounds, uses: map[useKey][]model.Use{}}
	for _, a := range c.answers {
		t.agents = append(t.agents, a)
		if a.said == nil {
			continue
		}
		for _, u := range a.said.Uses {
			k := useKey{u.Object, u.Parent}
			t.uses[k] = append(t.uses[k], u)
		}
	}
	slices.SortFunc(t.agents, func(a, b answer) int { return cmp.Compare(a.node, b.node) })
	return t
}
