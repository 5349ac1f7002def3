package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/weirmesh/weir/tests/e2e/app/report"
)

// call makes one call of gRPC, on a connection of its own, and prints a line: what came
// of it, whatever that is.
func call(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("app call", flag.ContinueOnError)
	flags.SetOutput(stderr)
	word := flags.String("word", "", "what to say to the server")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("call needs one address")
	}
	client, err := grpc.NewClient("passthrough:///"+flags.Arg(0), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err = healthpb.NewHealthClient(client).Check(ctx, &healthpb.HealthCheckRequest{Service: *word})
	answer := status.Convert(err)
	return json.NewEncoder(stdout).Encode(report.Call{Code: int(answer.Code()), Message: answer.Message()})
}

// healthy answers calls of gRPC: whatever is asked for is well.
type healthy struct {
	healthpb.UnimplementedHealthServer
}

func (healthy) Check(context.Context, *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	return &healthpb.HealthCheckResponse{Status: healthpb.HealthCheckResponse_SERVING}, nil
}

func newGRPC() *grpc.Server {
	server := grpc.NewServer()
	healthpb.RegisterHealthServer(server, healthy{})
	return server
}
