package cluster

import (
	"bufio"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	"github.com/weirmesh/weir/agent/model"
)

const (
	// fallBackAfter is what an API server gets at the start to deliver a first full
	// view, before the last good one takes its place: proxies that are restarted
	// wait for it meanwhile.
	fallBackAfter = 3 * time.Second
	// saveEvery is how often changes are written at most, but for those of who may
	// call: they are written at once. What an agent that is killed knew since, the next
	// one lacks until the API server answers.
	saveEvery = 10 * time.Second
	// saveShare bounds the time spent on writing, of a view of any size: one part in
	// this many.
	saveShare = 100
)

// LastGood is a file with the view as the API server had it last, so that an agent
// that starts while the server is away has something to tell its proxies. It holds
// whatever a Store does, and lies with the node's state on a tmpfs: it has no use
// after a reboot.
type LastGood struct {
	Path    string
	Version string // of the agent: another's file may mean other things
	Node    string
}

// header is the first line of the file.
type header struct {
	Version, Node, BootID string
	Saved                 time.Time
}

// kept is a further line: one object.
type kept struct {
	Pod       *model.Pod                 `json:",omitempty"`
	Peer      *model.Peer                `json:",omitempty"`
	Namespace *model.Namespace           `json:",omitempty"`
	Service   *model.Service             `json:",omitempty"`
	Slice     *model.EndpointSlice       `json:",omitempty"`
	Route     *model.Route               `json:",omitempty"`
	Policy    *model.TrafficPolicy       `json:",omitempty"`
	Authz     *model.AuthorizationPolicy `json:",omitempty"`
	PeerAuth  *model.PeerAuthentication  `json:",omitempty"`
	Zone      string                     `json:",omitempty"`
}

// keep gives s the view of the file if the server does not answer, and then writes
// what s holds whenever that has changed, until ctx is done.
func (l LastGood) keep(ctx context.Context, s *Store, log *slog.Logger) {
	select {
	case <-s.synced:
	case <-ctx.Done():
	case <-time.After(fallBackAfter):
		l.restore(s, log)
	}
	// Nothing is written before the server was heard: there is nothing new. An agent
	// that ends as soon as it has heard it writes that.
	if s.WaitSynced(ctx) != nil && !s.Synced() {
		return
	}
	written, pause, share := uint64(0), time.Duration(0), time.Now()
	for last := false; !last; {
		select {
		case <-ctx.Done():
			last = true
		case <-time.After(pause):
		case <-s.guards:
			select {
			case <-ctx.Done():
				last = true
			case <-time.After(time.Until(share)):
			}
		}
		if now := s.changes.Load(); now != written {
			began := time.Now()
			if err := l.save(s.copy()); err != nil {
				log.Warn("the view of the cluster is not kept for another agent", "error", err)
			}
			took := saveShare * time.Since(began)
			written, pause, share = now, max(saveEvery, took), time.Now().Add(took)
		}
	}
}

func (l LastGood) restore(s *Store, log *slog.Logger) {
	v, saved, err := l.load()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return // the first agent of this boot
	case err != nil:
		log.Warn("no last good view of the cluster: proxies wait for the API server", "file", l.Path, "error", err)
		return
	}
	if s.fallBack(v) {
		log.Warn("the API server does not answer: going on with the last good view of the cluster",
			"saved", saved.Format(time.RFC3339), "pods", len(v.pods), "services", len(v.services))
	}
}

// fallBack fills in the kinds that the source has not listed. It reports whether
// there was one.
func (s *Store) fallBack(v view) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.listed) == kinds {
		return false
	}
	s.fellBack = true
	if !s.listed[kindPods] {
		s.view.pods = v.pods
	}
	if !s.listed[kindPeers] {
		s.view.peers = v.peers
		s.reindexPeers()
	}
	s.tables.namespaces.fallBack(v.namespaces)
	s.tables.services.fallBack(v.services)
	s.tables.slices.fallBack(v.slices)
	if !s.listed[kindNodes] {
		s.view.zone = v.zone
	}
	for k, r := range v.routes {
		if !s.listed[routeKinds[k.kind]] {
			s.view.routes[k] = r
		}
	}
	s.tables.routes.reindex()
	s.tables.policies.fallBack(v.policies)
	s.tables.authz.fallBack(v.authz)
	s.tables.peerAuth.fallBack(v.peerAuth)
	s.touchAll()
	s.wake()
	s.markUsable()
	return true
}

// copy returns the view as it is now. Its values are the Store's, which replaces
// them and changes none.
func (s *Store) copy() []kept {
	s.mu.RLock()
	defer s.mu.RUnlock()
	n := len(s.view.pods) + len(s.view.peers) + len(s.view.namespaces) + len(s.view.services) + len(s.view.slices) + len(s.view.routes) + len(s.view.policies) + len(s.view.authz) + len(s.view.peerAuth) + 1
	out := make([]kept, 0, n)
	for _, p := range s.view.pods {
		pod := p.expand()
		out = append(out, kept{Pod: &pod})
	}
	for _, p := range s.view.peers {
		out = append(out, kept{Peer: p})
	}
	for _, n := range s.view.namespaces {
		out = append(out, kept{Namespace: &n})
	}
	for _, svc := range s.view.services {
		out = append(out, kept{Service: &svc})
	}
	for _, slice := range s.view.slices {
		out = append(out, kept{Slice: &slice})
	}
	for _, r := range s.view.routes {
		out = append(out, kept{Route: &r})
	}
	for _, p := range s.view.policies {
		out = append(out, kept{Policy: &p})
	}
	for _, p := range s.view.authz {
		out = append(out, kept{Authz: &p})
	}
	for _, p := range s.view.peerAuth {
		out = append(out, kept{PeerAuth: &p})
	}
	if s.view.zone != "" {
		out = append(out, kept{Zone: s.view.zone})
	}
	return out
}

func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id)), err
}

// save writes the file whole or not at all.
func (l LastGood) save(objects []kept) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	file, err := renameio.NewPendingFile(l.Path, renameio.WithTempDir(filepath.Dir(l.Path)), renameio.WithPermissions(0o600))
	if err != nil {
		return err
	}
	defer file.Cleanup()
	zip, err := gzip.NewWriterLevel(file, gzip.BestSpeed)
	if err != nil {
		return err
	}
	buffer := bufio.NewWriter(zip)
	lines := json.NewEncoder(buffer)
	if err := lines.Encode(header{Version: l.Version, Node: l.Node, BootID: boot, Saved: time.Now()}); err != nil {
		return err
	}
	for _, r := range objects {
		if err := lines.Encode(r); err != nil {
			return err
		}
	}
	if err := errors.Join(buffer.Flush(), zip.Close()); err != nil {
		return err
	}
	return file.CloseAtomicallyReplace()
}

// load reads the file, and when it was written.
func (l LastGood) load() (view, time.Time, error) {
	file, err := os.Open(l.Path)
	if err != nil {
		return view{}, time.Time{}, err
	}
	defer file.Close()
	zip, err := gzip.NewReader(bufio.NewReader(file))
	if err != nil {
		return view{}, time.Time{}, err
	}
	lines := json.NewDecoder(zip)
	lines.DisallowUnknownFields()
	var h header
	if err := lines.Decode(&h); err != nil {
		return view{}, time.Time{}, err
	}
	boot, err := bootID()
	if err != nil {
		return view{}, time.Time{}, err
	}
	if h.Version != l.Version || h.Node != l.Node || h.BootID != boot {
		return view{}, time.Time{}, fmt.Errorf("it is of agent %s on node %s, or of another boot", h.Version, h.Node)
	}
	v := newView()
	for {
		var r kept
		err := lines.Decode(&r)
		if errors.Is(err, io.EOF) {
			return v, h.Saved, nil
		}
		if err != nil {
			return view{}, time.Time{}, err
		}
		if r.Zone != "" {
			v.zone = r.Zone
		}
		v.add(r)
	}
}

// add puts an object where it belongs, with the strings shared that many have.
func (v view) add(r kept) {
	switch {
	case r.Pod != nil:
		p := *r.Pod
		p.Namespace, p.ServiceAccount, p.Node = shared(p.Namespace), shared(p.ServiceAccount), shared(p.Node)
		c := compact(p)
		v.pods[podKey(c)] = c
	case r.Peer != nil:
		p := r.Peer
		p.Namespace, p.ServiceAccount, p.Workload = shared(p.Namespace), shared(p.ServiceAccount), shared(p.Workload)
		v.peers[peerKey(p)] = p
	case r.Namespace != nil:
		v.namespaces[r.Namespace.Name] = *r.Namespace
	case r.Service != nil:
		v.services[serviceKey(*r.Service)] = *r.Service
	case r.Slice != nil:
		v.slices[sliceKey(*r.Slice)] = *r.Slice
	case r.Route != nil:
		v.routes[keyOfRoute(*r.Route)] = *r.Route
	case r.Policy != nil:
		v.policies[policyKey(*r.Policy)] = *r.Policy
	case r.Authz != nil:
		v.authz[authzKey(*r.Authz)] = *r.Authz
	case r.PeerAuth != nil:
		v.peerAuth[peerAuthKey(*r.PeerAuth)] = *r.PeerAuth
	}
}
