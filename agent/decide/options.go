package decide

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/weirmesh/weir/agent/identity"
	"github.com/weirmesh/weir/agent/model"
	"github.com/weirmesh/weir/plugin/capture"
)

// Options are what an operator may set for the whole mesh. Their zero value is
// not useful: start from Defaults. options has what each of them is for.
type Options struct {
	ExemptNamespaces    []string          `json:"exemptNamespaces"`
	ExemptStaticPods    bool              `json:"exemptStaticPods"`
	AllowRuntimeClasses []string          `json:"allowRuntimeClasses"`
	KeepClientAddress   bool              `json:"keepClientAddress"`
	MeshRanges          []netip.Prefix    `json:"meshRanges"`
	TrustDomain         string            `json:"trustDomain"`
	KeyExchange         KeyExchange       `json:"keyExchange"`
	CertificateTTL      Duration          `json:"certificateTTL"`
	ProxyMaxProcs       int               `json:"proxyMaxProcs"`
	Annotations         map[string]string `json:"annotations"`
}

// KeyExchange is how proxies agree on the keys of a connection, by the name that TLS has
// for it (IANA's registry of TLS supported groups).
type KeyExchange string

// The ways there are. Whoever has the first has the second, too.
const (
	PostQuantum KeyExchange = "X25519MLKEM768"
	Classic     KeyExchange = "X25519"
)

// Duration is written as "24h" or "10m".
type Duration struct{ time.Duration }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	var err error
	d.Duration, err = time.ParseDuration(string(text))
	return err
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// option is for the operator to read: manifests/OPTIONS.md is made of it.
type option struct{ name, does string }

var options = []option{
	{"exemptNamespaces", "Namespaces that are never captured, whatever their labels or their pods' labels say, and whose pods start while the node's agent is away: what the cluster needs to start."},
	{"exemptStaticPods", "Never capture the pods that a node makes from files. They have no service account, hence no identity."},
	{"allowRuntimeClasses", "Values of `runtimeClassName` whose pods can be captured, as all of their packets pass through the rules of the pod's network namespace. With gVisor or Kata they do not, so a class that is not listed is refused. A pod without a class is always fine."},
	{"keepClientAddress", "Applications see their callers' own addresses, for which proxies get `CAP_NET_RAW`, which any default container has, and nothing else. If not, or where a node's rules are iptables', they see the pod's own address. Counts for pods that start from then on."},
	{"meshRanges", "Address ranges of pods and Services: before it connects to an address in them that it does not know, a proxy asks the agent."},
	{"trustDomain", "The first part of every pod's identity, `spiffe://TRUST DOMAIN/ns/NAMESPACE/sa/SERVICE ACCOUNT`: a name that no other mesh has, in lower case. With another one every pod has another identity, which policies that name the old one do not mean."},
	{"keyExchange", "How proxies agree on a connection's keys: `X25519MLKEM768`, which a quantum computer does not break either, so that what is recorded today stays secret, or `X25519`, which costs less of a handshake. Between two proxies of which one has `X25519` it is that. Counts for connections that are made from then on."},
	{"certificateTTL", "How long a pod's certificate is good for, from `10s` to `24h`: it is renewed at half of that. What is short costs: on a cluster each renewal is a CertificateSigningRequest, which Kubernetes keeps for an hour, and while nobody signs, pods whose certificate has expired call nobody and are not called. Clocks of nodes have to differ by less than half of it."},
	{"proxyMaxProcs", "How many processors a proxy uses at most (GOMAXPROCS), of those that the node has; as long as one is enough it uses one. Counts for proxies that start from then on."},
	{"annotations", "What holds for pods that lack an annotation of that name: [ANNOTATIONS.md](ANNOTATIONS.md) has them all. `weirmesh.io/quic: reject`, for example."},
}

// Defaults are the options of a mesh that sets none.
func Defaults() Options {
	return Options{
		ExemptNamespaces:  []string{"kube-system", "weir-system"},
		KeepClientAddress: true,
		MeshRanges: []netip.Prefix{ // private and shared address space: RFC 1918, 6598, 4193
			netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16"),
			netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("fc00::/7"),
		},
		TrustDomain:    "cluster.local",
		KeyExchange:    PostQuantum,
		CertificateTTL: Duration{identity.DefaultTTL},
		ProxyMaxProcs:  2,
	}
}

// ReadOptions reads a YAML document. What it leaves out is as in Defaults; a list
// takes the place of the default list. A field that is not known, or there twice,
// is an error, as is what Validate finds.
func ReadOptions(document []byte) (Options, error) {
	o := Defaults()
	if _, rest, more := bytes.Cut(bytes.TrimPrefix(document, []byte("---\n")), []byte("\n---")); more && len(bytes.TrimSpace(rest)) > 0 {
		return Options{}, errors.New("more than one YAML document")
	}
	if err := yaml.UnmarshalStrict(document, &o); err != nil {
		return Options{}, errors.New(strings.NewReplacer(
			"error unmarshaling JSON: while decoding JSON: ", "", "error converting YAML to JSON: ", "", "json: ", "").Replace(err.Error()))
	}
	if err := o.Validate(); err != nil {
		return Options{}, err
	}
	for i, p := range o.MeshRanges {
		o.MeshRanges[i] = p.Masked()
	}
	return o, nil
}

// Validate reports the first option that cannot be meant.
func (o Options) Validate() error {
	switch {
	case slices.Contains(o.ExemptNamespaces, ""):
		return errors.New("exemptNamespaces: an entry is empty")
	case slices.Contains(o.AllowRuntimeClasses, ""):
		return errors.New("allowRuntimeClasses: an entry is empty; pods without a class are always allowed")
	case slices.ContainsFunc(o.MeshRanges, func(p netip.Prefix) bool { return !p.IsValid() }):
		return errors.New("meshRanges: an entry is empty")
	case o.KeyExchange != PostQuantum && o.KeyExchange != Classic:
		return fmt.Errorf("keyExchange: %q is neither %s nor %s", o.KeyExchange, PostQuantum, Classic)
	case o.CertificateTTL.Duration < identity.MinTTL || o.CertificateTTL.Duration > identity.MaxTTL:
		return fmt.Errorf("certificateTTL: %s is none of %s to %s", o.CertificateTTL, identity.MinTTL, identity.MaxTTL)
	case o.ProxyMaxProcs < 1 || o.ProxyMaxProcs > 64:
		return fmt.Errorf("proxyMaxProcs: %d is none of 1 to 64", o.ProxyMaxProcs)
	}
	if _, err := identity.TrustDomain(o.TrustDomain); err != nil {
		return fmt.Errorf("trustDomain: %w", err)
	}
	var scratch Decision
	for _, key := range slices.Sorted(maps.Keys(o.Annotations)) {
		name, ours := strings.CutPrefix(key, model.Prefix)
		a := find(name)
		if !ours || a == nil {
			return fmt.Errorf("annotations: no annotation is called %q; it is one of those of ANNOTATIONS.md, with the prefix %s", key, model.Prefix)
		}
		if err := a.set(&scratch, o.Annotations[key]); err != nil {
			return fmt.Errorf("annotations: %s is %q: %w", key, o.Annotations[key], err)
		}
	}
	return nil
}

// ownPort returns a port of the proxy that r covers.
func ownPort(r capture.PortRange) (uint16, bool) {
	for _, p := range []uint16{capture.DefaultOutboundPort, capture.DefaultInboundPort} {
		if r.First <= p && p <= r.Last {
			return p, true
		}
	}
	return 0, false
}

// ReadOptionsFile is ReadOptions of a file; without a name, Defaults.
func ReadOptionsFile(name string) (Options, error) {
	if name == "" {
		return Defaults(), nil
	}
	document, err := os.ReadFile(name)
	if err != nil {
		return Options{}, fmt.Errorf("mesh options: %w", err)
	}
	o, err := ReadOptions(document)
	if err != nil {
		return Options{}, fmt.Errorf("mesh options, %s: %w", name, err)
	}
	return o, nil
}
