package sniff

import (
	"crypto/tls"
	"net"
	"slices"
	"testing"
)

// maxHello is how much of a ClientHello is looked at, in bytes: all of its record.
const maxHello = recordHeader + maxRecord

// helloOf is the ClientHello that crypto/tls sends.
func helloOf(t testing.TB, config *tls.Config) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer server.Close()
	config.InsecureSkipVerify = true
	go func() { _ = tls.Client(client, config).Handshake() }()
	out := make([]byte, maxHello)
	n, err := server.Read(out)
	if err != nil {
		t.Fatal(err)
	}
	return out[:n]
}

func TestAClientHelloIsOursByItsALPN(t *testing.T) {
	const ours = "weir/1"
	mlkem := helloOf(t, &tls.Config{NextProtos: []string{ours}})
	if len(mlkem) < 1400 {
		t.Errorf("a hello of %d bytes: it should not fit into a segment", len(mlkem))
	}
	short := slices.Clone(mlkem)
	short[8]-- // the handshake message's length
	behind := append(slices.Clone(mlkem), 23, 3, 3, 0, 1, 0)
	for _, c := range []struct {
		name  string
		first []byte
		want  Hello
	}{
		{"nothing yet", nil, HelloUndecided},
		{"ours", mlkem, HelloOffers},
		{"ours with more behind", behind, HelloOffers},
		{"ours among others", helloOf(t, &tls.Config{NextProtos: []string{"h2", ours, "http/1.1"}}), HelloOffers},
		{"ours without post-quantum keys", helloOf(t, &tls.Config{NextProtos: []string{ours}, CurvePreferences: []tls.CurveID{tls.X25519}}), HelloOffers},
		{"ours, too old", helloOf(t, &tls.Config{NextProtos: []string{ours}, MaxVersion: tls.VersionTLS12}), HelloOffers},
		{"half of ours", mlkem[:len(mlkem)/2], HelloUndecided},
		{"ours but for a byte", mlkem[:len(mlkem)-1], HelloUndecided},
		{"the application's", helloOf(t, &tls.Config{NextProtos: []string{"h2"}, ServerName: "example.com"}), HelloOther},
		{"without ALPN", helloOf(t, &tls.Config{}), HelloOther},
		{"a longer name", helloOf(t, &tls.Config{NextProtos: []string{ours + "0"}}), HelloOther},
		{"lengths that contradict each other", short, HelloOther},
		{"another message", []byte{22, 3, 1, 0, 5, 2, 0, 0, 1, 0}, HelloOther},
		{"an empty record", []byte{22, 3, 1, 0, 0}, HelloNone},
		{"a record too large", []byte{22, 3, 1, 0x40, 1}, HelloNone},
		{"an alert", []byte{21, 3, 1, 0, 2}, HelloNone},
		{"a request", []byte("GET / HTTP/1.1\r\n"), HelloNone},
		{"something of one byte", []byte{22}, HelloUndecided},
		{"no version of TLS", []byte{22, 4}, HelloNone},
	} {
		if got := LookHello(c.first, ours); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

// FuzzLookHello: more bytes never change what was decided, all are read within bounds,
// and it is decided within the bound on what is looked at.
func FuzzLookHello(f *testing.F) {
	f.Add(helloOf(f, &tls.Config{NextProtos: []string{"weir/1"}, CurvePreferences: []tls.CurveID{tls.X25519}}), 7)
	f.Add([]byte{22, 3, 1, 0, 5, 1, 0, 0, 1, 0}, 3)
	f.Fuzz(func(t *testing.T, in []byte, step int) {
		step = max(step%64, 1)
		decided := HelloUndecided
		for i := 0; i <= len(in); i += step {
			got := LookHello(slices.Clip(in[:i]), "weir/1")
			if decided != HelloUndecided && got != decided {
				t.Fatalf("%x is %d, and was %d", in[:i], got, decided)
			}
			if decided = got; decided == HelloUndecided && i >= maxHello {
				t.Fatalf("%d bytes are not enough", i)
			}
		}
	})
}
