package mtls_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/proxy/mtls"
	"github.com/weirmesh/weir/proxy/mtls/mtlstest"
)

// BenchmarkHandshake is a full one, of both ends, with each key exchange. cpu-ns/op is the
// process's time, whatever else the machine does.
func BenchmarkHandshake(b *testing.B) {
	ca := mtlstest.NewCA(b)
	client, server := ca.Identity(front, nil), ca.Identity(back, nil)
	for _, classic := range []bool{false, true} {
		group := map[bool]tls.CurveID{false: tls.X25519MLKEM768, true: tls.X25519}[classic]
		b.Run(group.String(), func(b *testing.B) {
			h := &mtls.Handshaker{Classic: func() bool { return classic }}
			b.ReportAllocs()
			began := processorTime(b)
			for b.Loop() {
				clientTCP, serverTCP := sockets(b)
				done := make(chan error, 1)
				go func() {
					_, err := h.Server(context.Background(), serverTCP, server, nil)
					done <- err
				}()
				c, err := h.Client(b.Context(), clientTCP, client, back)
				if err != nil {
					b.Fatal(err)
				}
				if got := c.State().CurveID; got != group {
					b.Fatal(got)
				}
				if err := <-done; err != nil {
					b.Fatal(err)
				}
				clientTCP.Close()
				serverTCP.Close()
			}
			b.ReportMetric(float64(processorTime(b)-began)/float64(b.N), "cpu-ns/op")
		})
	}
}

// processorTime is what this process has used.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var used unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &used); err != nil {
		b.Fatal(err)
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// BenchmarkBulk moves much, from a socket to TLS and from there to a socket again, as
// a pair of proxies does: by a Conn, and by io.Copy over crypto/tls as it is.
func BenchmarkBulk(b *testing.B) {
	ca := mtlstest.NewCA(b)
	id := ca.Identity(back, nil)
	const block = 1 << 20
	b.Run("gathered", func(b *testing.B) {
		client, server := meet(b, id, id, back)
		if client.err != nil || server.err != nil {
			b.Fatal(client.err, server.err)
		}
		through(b, block, func(dst io.Writer, src io.Reader, buf []byte) {
			_, _ = io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, buf)
		}, client.conn, server.conn)
	})
	b.Run("io.Copy", func(b *testing.B) {
		clientTCP, serverTCP := sockets(b)
		config := &tls.Config{Certificates: []tls.Certificate{*id.Certificate}, InsecureSkipVerify: true}
		client, server := tls.Client(clientTCP, config), tls.Server(serverTCP, config)
		through(b, block, func(dst io.Writer, src io.Reader, _ []byte) { _, _ = io.Copy(dst, src) }, client, server)
	})
}

// through sends blocks by way of two proxies, of which one writes to near and the other
// reads from far.
func through(b *testing.B, block int, carry func(io.Writer, io.Reader, []byte), near io.Writer, far io.Reader) {
	source, in := sockets(b)
	out, sink := sockets(b)
	for _, way := range []struct {
		dst io.Writer
		src io.Reader
	}{{near, in}, {out, far}} {
		go carry(way.dst, way.src, make([]byte, 128<<10))
	}
	data := make([]byte, block)
	b.SetBytes(int64(block))
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for range b.N {
			if _, err := source.Write(data); err != nil {
				return
			}
		}
	}()
	got := make([]byte, block)
	b.ResetTimer()
	for range b.N {
		if _, err := io.ReadFull(sink, got); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	<-sent
	for _, c := range []net.Conn{source, in, out, sink} {
		c.Close()
	}
}
