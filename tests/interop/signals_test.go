package interop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/agent/telemetry"
)

// Ports of called. Nothing listens on the last one.
const (
	toldGRPCPort = 10100 + iota
	toldTCPPort
	toldClosedPort
)

var (
	toToldGRPC       = declare("told-grpc", toldGRPCPort, "kubernetes.io/h2c")
	toToldTCP        = declare("told-tcp", toldTCPPort, "tcp")
	toToldClosedGRPC = declare("told-closed-grpc", toldClosedPort, "kubernetes.io/h2c")
	toToldClosedTCP  = declare("told-closed-tcp", toldClosedPort, "tcp")
)

// told is what of the answer, the access log and the metrics are to be of one
// accord about.
type told struct {
	Reason, GRPC, Service string
	Sent, Received        uint64
}

// TestAllSignalsTellTheSame: the answer, the records and the metrics of both
// proxies, in the same words.
func TestAllSignalsTellTheSame(t *testing.T) {
	onNode(t)
	t.Parallel()
	t.Run("of a call of gRPC", signalsOfGRPC)
	t.Run("of a connection", signalsOfTCP)
}

func signalsOfGRPC(t *testing.T) {
	t.Parallel()
	server := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	l := listen(t, toldGRPCPort)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	logged, before := len(accessLog.String()), metrics(t)

	// The application's own answer: 5, NOT_FOUND.
	code, proxyStatus := check(t, toToldGRPC)
	if code != codes.NotFound || proxyStatus != "" {
		t.Errorf("the call ended with %v, Proxy-Status %q", code, proxyStatus)
	}
	out, in := recordsOf(t, logged, counted, toToldGRPC)
	if diff := cmp.Diff(told{GRPC: "5", Service: "shop/told-grpc", Sent: out.Sent, Received: out.Received}, toldBy(out)); diff != "" {
		t.Errorf("outbound record, -want +got:\n%s", diff)
	}
	if diff := cmp.Diff(told{GRPC: "5", Sent: out.Sent, Received: out.Received}, toldBy(in)); diff != "" {
		t.Errorf("inbound record, -want +got:\n%s", diff)
	}
	for _, r := range []telemetry.Record{out, in} {
		if r.HTTP == nil {
			t.Fatalf("the record is of no request: %+v", r)
		}
		want := telemetry.HTTP{
			Method: "POST", Path: "/grpc.health.v1.Health/Check", Status: 200, GRPCStatus: "5", Version: "2", Attempts: 1,
			RequestBody: messageHead + uint64(len("\n\x04none")), TimeFirstByte: r.TimeFirstByte,
		}
		if diff := cmp.Diff(want, *r.HTTP); diff != "" {
			t.Errorf("%s record, -want +got:\n%s", r.Direction, diff)
		}
		if r.TimeFirstByte <= 0 || r.TimeTotal < r.TimeFirstByte || hostOf(r.Client) != counted.Address(false) || r.Upstream != on(toldGRPCPort).String() {
			t.Errorf("%s record: %+v", r.Direction, r)
		}
	}
	if out.UpstreamPod != called.ID() {
		t.Errorf("the upstream's pod is %q", out.UpstreamPod)
	}
	for _, way := range []string{labels("outbound", "told-grpc"), labels("inbound", "unknown")} {
		grown(t, before, map[string]float64{
			"weir_http_requests_total{" + way + `,code="200",grpc_status="5",protocol="grpc",reason="",route="",tls="mutual"}`: 1,
			"weir_http_request_duration_seconds_count{" + way + `,protocol="grpc",result="ok",route="",tls="mutual"}`:          1,
			"weir_http_request_body_bytes_total{" + way + "}":                                                                  float64(out.RequestBody),
		})
	}

	// The proxy's: nobody listens there.
	logged, before = len(accessLog.String()), metrics(t)
	const want = "weir; error=connection_refused; details=\"connect_refused: "
	if code, proxyStatus = check(t, toToldClosedGRPC); code != codes.Unavailable || !strings.HasPrefix(proxyStatus, want) {
		t.Errorf("a call to nobody ended with %v, Proxy-Status %q, want %s", code, proxyStatus, want)
	}
	eventually(t, patience, "a record of the call to nobody", func() error {
		return recorded(logged, toToldClosedGRPC, told{Reason: "connect_refused", GRPC: "14", Service: "shop/told-closed-grpc"})
	})
	grown(t, before, map[string]float64{
		"weir_http_requests_total{" + labels("outbound", "told-closed-grpc") + `,code="200",grpc_status="14",protocol="grpc",reason="connect_refused",route="",tls="none"}`: 1,
	})
}

func signalsOfTCP(t *testing.T) {
	t.Parallel()
	l := listen(t, toldTCPPort)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = io.Copy(conn, conn)
		_, _ = io.WriteString(conn, "bye")
		conn.Close()
	}()
	logged, before := len(accessLog.String()), metrics(t)
	conn, err := dialFrom(t.Context(), counted, toToldTCP.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	ways := []string{labels("outbound", "told-tcp"), labels("inbound", "unknown")}
	for _, way := range ways {
		grown(t, before, map[string]float64{
			"weir_tcp_connections_opened_total{" + way + `,reason=""}`: 1,
			"weir_tcp_connections_open{" + way + `,reason=""}`:         1,
		})
	}
	_ = conn.(*net.TCPConn).CloseWrite()
	if rest, err := io.ReadAll(conn); err != nil || string(rest) != "bye" {
		t.Errorf("got %q, %v", rest, err)
	}
	out, in := recordsOf(t, logged, counted, toToldTCP)
	if diff := cmp.Diff(told{Service: "shop/told-tcp", Sent: 5, Received: 8}, toldBy(out)); diff != "" {
		t.Errorf("outbound record, -want +got:\n%s", diff)
	}
	if diff := cmp.Diff(told{Sent: 5, Received: 8}, toldBy(in)); diff != "" {
		t.Errorf("inbound record, -want +got:\n%s", diff)
	}
	if out.HTTP != nil || in.HTTP != nil || out.UpstreamPod != called.ID() || out.UpstreamLocal != in.Client || out.TimeTotal <= out.TimeConnect {
		t.Errorf("records: %+v, %+v", out, in)
	}
	for _, way := range ways {
		grown(t, before, map[string]float64{
			"weir_tcp_connections_closed_total{" + way + `,reason=""}`: 1,
			"weir_tcp_connections_open{" + way + `,reason=""}`:         0,
			"weir_tcp_sent_bytes_total{" + way + `,reason=""}`:         5,
			"weir_tcp_received_bytes_total{" + way + `,reason=""}`:     8,
		})
	}

	// Nobody listens there: there is nothing to say it with but a reset.
	logged, before = len(accessLog.String()), metrics(t)
	if conn, err = dialFrom(t.Context(), counted, toToldClosedTCP.String()); err == nil {
		defer conn.Close()
		_, err = conn.Read(make([]byte, 1))
	}
	if !errors.Is(err, unix.ECONNRESET) { // by the time that connect(2) is asked about, perhaps
		t.Errorf("a connection to nobody ended with %v", err)
	}
	eventually(t, patience, "a record of the connection to nobody", func() error {
		return recorded(logged, toToldClosedTCP, told{Reason: "connect_refused", Service: "shop/told-closed-tcp"})
	})
	grown(t, before, map[string]float64{
		"weir_tcp_connections_closed_total{" + labels("outbound", "told-closed-tcp") + `,reason="connect_refused"}`: 1,
	})
}

// messageHead is how long gRPC's own head of a message is, in bytes.
const messageHead = 5

// check makes one call from counted, on a connection of its own, and returns its
// status and the Proxy-Status that came with it.
func check(t *testing.T, to netip.AddrPort) (codes.Code, string) {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+to.String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(func(ctx context.Context, to string) (net.Conn, error) {
		return dialFrom(ctx, counted, to)
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var head, trailer metadata.MD
	_, err = grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "none"}, grpc.Header(&head), grpc.Trailer(&trailer))
	return status.Code(err), strings.Join(metadata.Join(head, trailer).Get("proxy-status"), ", ")
}

func toldBy(r telemetry.Record) told {
	out := told{Reason: r.Reason, Service: r.Service, Sent: r.Sent, Received: r.Received}
	if r.HTTP != nil {
		out.GRPC = r.GRPCStatus
	}
	return out
}

// recorded reports an error until counted's proxy has recorded that of a way to an
// address, in the access log from that byte on, and under error.type, too.
func recorded(from int, to netip.AddrPort, want told) error {
	all, err := parseRecords(accessLog.String()[from:])
	if err != nil {
		return err
	}
	for _, r := range all {
		if r.Server == to.String() && toldBy(r) == want && r.ErrorType == want.Reason {
			return nil
		}
	}
	return fmt.Errorf("none of %+v says %+v", all, want)
}

// labels are those of both ends, and of a direction.
func labels(direction, service string) string {
	return fmt.Sprintf(`destination_namespace="shop",destination_service=%q,destination_workload="called",direction=%q,source_namespace="shop",source_workload="counted"`, service, direction)
}

// metrics asks the node's agent for its metrics: their values, by name and labels.
func metrics(t *testing.T) map[string]float64 {
	t.Helper()
	response, err := http.Get("http://127.0.0.1:15090/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, "} ")
		if n, err := strconv.ParseFloat(strings.TrimSpace(value), 64); err == nil {
			out[sorted(name+"}")] = n
		}
	}
	return out
}

// sorted is a series' name with its labels in order. None here has a comma in it.
func sorted(series string) string {
	name, labels, _ := strings.Cut(strings.TrimSuffix(series, "}"), "{")
	list := strings.Split(labels, ",")
	slices.Sort(list)
	return name + "{" + strings.Join(list, ",") + "}"
}

// grown waits until metrics have grown by what is wanted.
func grown(t *testing.T, before, want map[string]float64) {
	t.Helper()
	eventually(t, patience, "metrics", func() error {
		now := metrics(t)
		var wrong []error
		for name, by := range want {
			if got := now[sorted(name)] - before[sorted(name)]; got != by {
				wrong = append(wrong, fmt.Errorf("%s has grown by %v, want %v", name, got, by))
			}
		}
		return errors.Join(wrong...)
	})
}
