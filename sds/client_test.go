package sds

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-ca/signet/test/bubble"
)

// rig is a server under its own gRPC server, with what it logs.
type rig struct {
	t    *testing.T
	sds  *Server
	grpc *grpc.Server
	dial func() (net.Conn, error)
	logs *lockedBuffer
	reg  *prometheus.Registry
}

// inBubble runs a test with simulated time and a connection in memory, where silence can be told from delay.
func inBubble(t *testing.T, c Config, f func(t *testing.T, r *rig, w *world, ca *root)) {
	t.Helper()
	bubble.Test(t, func(t *testing.T) {
		w, ca := newWorld(t)
		c.Workloads = w
		f(t, inMemory(t, c), w, ca)
	})
}

func inMemory(t *testing.T, c Config) *rig {
	t.Helper()
	lis := bufconn.Listen(64 << 10)
	return serve(t, c, lis, lis.Dial)
}

// onSocket is a server on a Unix socket, where the kernel tells who calls.
func onSocket(t *testing.T, c Config, path string) *rig {
	t.Helper()
	return serve(t, c, must(net.Listen("unix", path)), func() (net.Conn, error) { return net.Dial("unix", path) })
}

func serve(t *testing.T, c Config, lis net.Listener, dial func() (net.Conn, error)) *rig {
	t.Helper()
	r := &rig{t: t, logs: &lockedBuffer{}, reg: prometheus.NewRegistry(), dial: dial}
	c.Logger = slog.New(slog.NewJSONHandler(r.logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	c.Metrics = r.reg
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	r.sds = s
	r.grpc = grpc.NewServer(append(ServerOptions(), grpc.Creds(ConnCredentials()))...)
	secretv3.RegisterSecretDiscoveryServiceServer(r.grpc, s)
	done := make(chan struct{})
	go func() { defer close(done); _ = r.grpc.Serve(lis) }()
	t.Cleanup(func() { r.grpc.Stop(); <-done })
	return r
}

// metric is the value of the only series with these label values.
func (r *rig) metric(v prometheus.Collector) float64 { return testutil.ToFloat64(v) }

func (r *rig) connect(opts ...grpc.DialOption) *grpc.ClientConn {
	r.t.Helper()
	opts = append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return r.dial() }),
	}, opts...)
	cc, err := grpc.NewClient("passthrough:///agent", opts...)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = cc.Close() })
	return cc
}

// talk is one open stream of either protocol, with what came.
type talk[Q, A any] struct {
	t      *testing.T
	stream grpc.BidiStreamingClient[Q, A]
	cancel context.CancelFunc

	mu   sync.Mutex
	got  []*A
	err  error
	bell chan struct{}
}

// client is one stream as Envoy would have it.
type client struct {
	*talk[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]
}

func (r *rig) open() *client { return r.openOn(r.connect()) }

func (r *rig) openOn(cc *grpc.ClientConn) *client {
	r.t.Helper()
	return &client{begin(r, secretv3.NewSecretDiscoveryServiceClient(cc).StreamSecrets)}
}

func begin[Q, A any](r *rig, method func(context.Context, ...grpc.CallOption) (grpc.BidiStreamingClient[Q, A], error)) *talk[Q, A] {
	r.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := method(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	c := &talk[Q, A]{t: r.t, stream: stream, cancel: cancel, bell: make(chan struct{}, 1000)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			resp, err := stream.Recv()
			c.mu.Lock()
			if err != nil {
				c.err = err
			} else {
				c.got = append(c.got, resp)
			}
			c.mu.Unlock()
			c.bell <- struct{}{}
			if err != nil {
				return
			}
		}
	}()
	r.t.Cleanup(func() { cancel(); <-done })
	return c
}

// send sends a request as it is.
func (c *talk[Q, A]) send(r *Q) {
	c.t.Helper()
	if err := c.stream.Send(r); err != nil && err != io.EOF { // EOF: the stream has ended, Recv says how
		c.t.Fatal(err)
	}
}

func (c *client) subscribe(names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: names, Node: &corev3.Node{Id: "sidecar"}})
}

func (c *client) ack(r *discoveryv3.DiscoveryResponse, names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: names, VersionInfo: r.VersionInfo, ResponseNonce: r.Nonce})
}

func (c *client) nack(r *discoveryv3.DiscoveryResponse, before, reason string, names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DiscoveryRequest{
		TypeUrl: secretType, ResourceNames: names, VersionInfo: before, ResponseNonce: r.Nonce,
		ErrorDetail: &rpcstatus.Status{Code: 13, Message: reason},
	})
}

// take returns what came since it was last asked, once nothing more is under way. For use in a bubble.
func (c *talk[Q, A]) take() []*A {
	c.t.Helper()
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	got := c.got
	c.got = nil
	return got
}

// one returns the only response there is.
func (c *talk[Q, A]) one() *A {
	c.t.Helper()
	got := c.take()
	if len(got) != 1 {
		c.t.Fatalf("%d responses (stream: %v), want 1", len(got), c.ended())
	}
	return got[0]
}

func (c *talk[Q, A]) silence(why string) {
	c.t.Helper()
	if got := c.take(); len(got) != 0 {
		c.t.Fatalf("%s: %d responses; want silence", why, len(got))
	}
}

// next waits for a response, outside of bubbles.
func (c *talk[Q, A]) next() *A {
	c.t.Helper()
	select {
	case <-c.bell:
	case <-time.After(time.Minute):
		c.t.Fatal("nothing came for a minute")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		c.t.Fatalf("stream ended: %v", c.err)
	}
	r := c.got[0]
	c.got = c.got[1:]
	return r
}

func (c *talk[Q, A]) ended() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *talk[Q, A]) wantEnd(code codes.Code) {
	c.t.Helper()
	synctest.Wait()
	if err := c.ended(); status.Code(err) != code || err == nil {
		c.t.Fatalf("stream ended with %v, want %s", err, code)
	}
}

// fataler is a test or a property.
type fataler interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

func secretOf(t fataler, r *discoveryv3.DiscoveryResponse) *tlsv3.Secret {
	t.Helper()
	if len(r.Resources) != 1 {
		t.Fatalf("%d resources in a response, want 1", len(r.Resources))
	}
	s := new(tlsv3.Secret)
	if err := r.Resources[0].UnmarshalTo(s); err != nil {
		t.Fatal(err)
	}
	return s
}

func names(rs []*discoveryv3.DiscoveryResponse) []string {
	var out []string
	for _, r := range rs {
		for _, a := range r.Resources {
			out = append(out, unpack(a).GetName())
		}
	}
	return out
}

// unpack returns nil for what is no secret.
func unpack(a *anypb.Any) *tlsv3.Secret {
	s := new(tlsv3.Secret)
	if a.UnmarshalTo(s) != nil {
		return nil
	}
	return s
}

// serialOf is the serial in a response with an SVID, whose key must fit.
func serialOf(t fataler, r *discoveryv3.DiscoveryResponse) string {
	t.Helper()
	return serialIn(t, secretOf(t, r))
}

func serialIn(t fataler, s *tlsv3.Secret) string {
	t.Helper()
	c := s.GetTlsCertificate()
	pair, err := tls.X509KeyPair(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
	if err != nil {
		t.Fatalf("response without a usable pair: %v", err)
	}
	return must(x509.ParseCertificate(pair.Certificate[0])).SerialNumber.Text(16)
}

// rootsIn counts certificates in PEM.
func rootsIn(b []byte) int {
	n := 0
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		n++
	}
	return n
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
