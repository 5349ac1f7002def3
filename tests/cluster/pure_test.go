package cluster

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestIssue(t *testing.T) {
	ca, err := newAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddr("fd00:90::11")
	if err := ca.issue("node", "system:node:n1", "system:nodes", []string{"n1"}, []netip.Addr{addr}); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(ca.path("node.crt"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(content)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	for _, name := range []string{"n1", addr.String()} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); err != nil {
			t.Errorf("as server %s: %v", name, err)
		}
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Errorf("as client: %v", err)
	}
	if cert.Subject.CommonName != "system:node:n1" || cert.Subject.Organization[0] != "system:nodes" {
		t.Errorf("subject %v", cert.Subject)
	}
}

func TestBuildImage(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, []byte("#!"), 0o755); err != nil {
		t.Fatal(err)
	}
	img := Image{
		Ref: "weir.test/x:1", Entrypoint: []string{"/bin/x"}, User: "7",
		Files: map[string]string{"/bin/x": program},
		Data:  map[string][]byte{"/etc/x/conf": []byte("a=b")},
	}
	path := filepath.Join(dir, "x.tar")
	if err := BuildImage(path, img); err != nil {
		t.Fatal(err)
	}
	first, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	files := untar(t, first)

	var index struct{ Manifests []descriptor }
	decode(t, files["index.json"].content, &index)
	if got := index.Manifests[0].Annotations["io.containerd.image.name"]; got != img.Ref {
		t.Errorf("name %q, want %q", got, img.Ref)
	}
	var manifest struct{ Layers []descriptor }
	decode(t, files[blobName(index.Manifests[0])].content, &manifest)
	layer := files[blobName(manifest.Layers[0])].content
	if sum := sha256.Sum256(layer); "sha256:"+hex.EncodeToString(sum[:]) != manifest.Layers[0].Digest {
		t.Error("the layer's digest is not its content's")
	}
	got := map[string]int64{}
	for name, file := range untar(t, layer) {
		got[name] = file.mode
	}
	want := map[string]int64{"bin/": 0o755, "bin/x": 0o755, "etc/": 0o755, "etc/x/": 0o755, "etc/x/conf": 0o644, "tmp/": 0o1777}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("layer (-want +got):\n%s", diff)
	}

	if err := BuildImage(path, img); err != nil {
		t.Fatal(err)
	}
	if second, err := os.ReadFile(path); err != nil || !bytes.Equal(first, second) {
		t.Errorf("built twice, the archives differ (%v)", err)
	}
}

func blobName(d descriptor) string { return "blobs/sha256/" + d.Digest[len("sha256:"):] }

type tarFile struct {
	mode    int64
	content []byte
}

func untar(t *testing.T, archive []byte) map[string]tarFile {
	t.Helper()
	files := map[string]tarFile{}
	for in := tar.NewReader(bytes.NewReader(archive)); ; {
		header, err := in.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		files[header.Name] = tarFile{header.Mode, content}
	}
}

func decode(t *testing.T, content []byte, into any) {
	t.Helper()
	if err := json.Unmarshal(content, into); err != nil {
		t.Fatal(err)
	}
}

func TestNetwork(t *testing.T) {
	n := newNetwork(false, netip.MustParsePrefix("198.18.0.4/30"))
	const node = `link set lo up
addr add 192.168.90.12/24 dev eth0
addr add fd00:90::c/64 dev eth0 nodad
link set eth0 up
route add default via 192.168.90.1
route add default via fd00:90::1
route add 10.244.1.0/24 via 192.168.90.11
route add fd00:10:244:1::/64 via fd00:90::b
`
	if diff := cmp.Diff(node, n.nodeBatch(2, 2)); diff != "" {
		t.Errorf("node 2 of 2 (-want +got):\n%s", diff)
	}
	const host = `link add weir-host type veth peer name host netns 7
addr add 198.18.0.5/30 dev weir-host
link set weir-host up
link add eth0 address 02:00:00:00:00:01 netns 8 type veth peer name n1 netns 7
`
	if diff := cmp.Diff(host, n.hostBatch("weir", 7, []int{8})); diff != "" {
		t.Errorf("host (-want +got):\n%s", diff)
	}
	const rules = `table inet weir-cluster {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 10.244.0.0/16 ip daddr != { 10.244.0.0/16, 192.168.90.0/24, 10.96.0.0/16 } oifname "eth0" masquerade
	}
}
`
	ipv4 := newNetwork(true, netip.MustParsePrefix("198.18.0.4/30"))
	if diff := cmp.Diff(rules, ipv4.nodeRules()); diff != "" {
		t.Errorf("rules (-want +got):\n%s", diff)
	}
	if got := len(ipv4.podRange(2)); got != 1 {
		t.Errorf("IPv4 only has %d pod ranges", got)
	}
}

func TestOptions(t *testing.T) {
	for _, test := range []struct {
		name    string
		options Options
		ok      bool
	}{
		{"zero", Options{}, true},
		{"long name", Options{Name: "ninechars"}, false},
		{"name with a slash", Options{Name: "a/b"}, false},
		{"ten nodes", Options{Nodes: 10}, false},
		{"hidden state folder", Options{StateDir: "/var/lib/weir"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := test.options.withDefaults()
			if (err == nil) != test.ok {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestFreshIsOneAtATime(t *testing.T) {
	folder := t.TempDir()
	lock, err := lockFolder(folder)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if _, _, err := Fresh(t.Context(), folder, Options{}); !errors.Is(err, ErrBusy) {
		t.Errorf("a second run took the cluster of the first: %v", err)
	}
}
