package agent

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"testing"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// panics is an SDS service with a mistake in it.
type panics struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
}

func (panics) StreamSecrets(secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	panic("the key is sesame")
}

func (panics) FetchSecrets(context.Context, *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	panic("the key is sesame")
}

func TestMistake20APanicIsOneStreamsTroubleOnly(t *testing.T) {
	a := &Agent{log: slog.New(slog.DiscardHandler)}
	server := grpc.NewServer(a.edges()...)
	secretv3.RegisterSecretDiscoveryServiceServer(server, panics{})
	l := bufconn.Listen(1 << 16)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	defer func() { server.Stop(); <-done }()
	conn, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := secretv3.NewSecretDiscoveryServiceClient(conn)
	for range 3 {
		_, err := client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{})
		s, opened := client.StreamSecrets(t.Context())
		if opened != nil {
			t.Fatal(opened)
		}
		_, streamed := s.Recv()
		for _, err := range []error{err, streamed} {
			if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "sesame") {
				t.Errorf("the caller hears %v", err)
			}
		}
	}
}
