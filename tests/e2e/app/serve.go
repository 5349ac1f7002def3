package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/weirmesh/weir/tests/e2e/app/report"
)

// serve answers HTTP on every address of -listen, gRPC on those of -grpc, echoes on
// those of -echo and counts on those of -sink, until ctx is done.
func serve(ctx context.Context, args []string, stderr io.Writer) error {
	flags := flag.NewFlagSet("app serve", flag.ContinueOnError)
	flags.SetOutput(stderr)
	listen := flags.String("listen", ":8080", "HTTP `addresses`, separated by commas")
	calls := flags.String("grpc", "", "gRPC `addresses`, separated by commas")
	echo := flags.String("echo", "", "TCP echo `addresses`, separated by commas")
	sinks := flags.String("sink", "", "TCP `addresses` where connections are counted by whether package probe made them, separated by commas")
	next := flags.String("next", "", "`URL` that is asked before a request is answered; its answer becomes part of ours")
	if err := flags.Parse(args); err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	counts := &sink{}
	server := &http.Server{Handler: handler{host, *next, counts}, ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error)
	for _, address := range addresses(*listen) {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		go func() { failed <- server.Serve(listener) }()
	}
	rpc := newGRPC()
	defer rpc.Stop()
	for _, address := range addresses(*calls) {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		go func() { failed <- rpc.Serve(listener) }()
	}
	for _, address := range addresses(*echo) {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		defer listener.Close()
		go acceptEchoes(listener)
	}
	for _, address := range addresses(*sinks) {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		defer listener.Close()
		go counts.accept(listener)
	}
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return server.Close()
	}
}

func addresses(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' })
}

type handler struct {
	host string
	next string
	sink *sink
}

func (h handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer := report.Answer{Pod: h.host, Client: r.RemoteAddr, Host: r.Host, Path: r.URL.Path, Headers: r.Header, Sink: h.sink.counted()}
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		answer.Local = local.String()
	}
	status := http.StatusOK
	if h.next != "" && r.URL.Path != "/healthz" {
		result := client{network: "tcp", timeout: 5 * time.Second}.ask(r.Context(), h.next)
		answer.Next = &result
		if result.Error != "" {
			status = http.StatusBadGateway
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// An error is the client's: it has gone.
	_ = json.NewEncoder(w).Encode(answer)
}

func acceptEchoes(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "app: echo:", err)
			continue
		}
		go echoBack(conn)
	}
}

// echoBack sends back what comes, to the end, and then ends its own direction.
func echoBack(conn net.Conn) {
	defer conn.Close()
	_, _ = io.Copy(conn, conn)
}
