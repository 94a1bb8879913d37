package sds

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// BenchmarkMemoryPerSidecar is what a sidecar (one connection, the streams default and ROOTCA, acknowledged) costs, as a
// ratio to a bare grpc-go server that answers the same bytes over the same connections with the same buffers.
// Mark: 1.3 (design §9). Both sides subtract what the clients and the sockets cost by themselves.
func BenchmarkMemoryPerSidecar(b *testing.B) {
	const sidecars = 1000
	w, _ := newWorld(b)
	var own, floor float64
	for b.Loop() {
		sockets := memoryOf(b, sidecars, nil)
		floor = memoryOf(b, sidecars, &bareServer{}) - sockets
		own = memoryOf(b, sidecars, must(New(Config{Workloads: w, Limits: Limits{StreamsPerCaller: 1 << 20}}))) - sockets
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(own/sidecars/1024, "KiB/sidecar")
	b.ReportMetric(floor/sidecars/1024, "KiB-floor")
	b.ReportMetric(own/floor, "ratio")
}

// memoryOf is the growth of heap and stacks, in bytes, by that many sidecars of a server; nil accepts and does nothing.
func memoryOf(b *testing.B, sidecars int, server secretv3.SecretDiscoveryServiceServer) float64 {
	b.Helper()
	dir, err := os.MkdirTemp("", "sds")
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	lis := must(net.Listen("unix", path))
	stop := func() { _ = lis.Close() }
	if server != nil {
		g := grpc.NewServer(append(ServerOptions(), grpc.Creds(ConnCredentials()))...)
		secretv3.RegisterSecretDiscoveryServiceServer(g, server)
		served := make(chan struct{})
		go func() { defer close(served); _ = g.Serve(lis) }()
		stop = func() { g.Stop(); <-served }
	}
	before := inUse()
	var conns []net.Conn
	for range sidecars {
		c := must(net.Dial("unix", path))
		conns = append(conns, c)
		if server == nil {
			conns = append(conns, must(lis.Accept()))
			continue
		}
		if err := playSidecar(c); err != nil {
			b.Fatal(err)
		}
	}
	grown := float64(inUse() - before)
	for _, c := range conns {
		_ = c.Close()
	}
	stop()
	return grown
}

// inUse is heap and stack after what can be collected is.
func inUse() int64 {
	for range 4 { // stacks shrink by half at each collection; pools empty after two
		runtime.GC()
		time.Sleep(10 * time.Millisecond)
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// playSidecar opens both streams and acknowledges what comes. It speaks HTTP/2 frames by hand, because a gRPC client in
// the same process would cost more than the server that is measured.
func playSidecar(c net.Conn) error {
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		return err
	}
	f := http2.NewFramer(c, c)
	if err := f.WriteSettings(); err != nil {
		return err
	}
	var head bytes.Buffer
	enc := hpack.NewEncoder(&head)
	names := map[uint32]string{1: "default", 3: "ROOTCA"}
	for _, id := range []uint32{1, 3} {
		head.Reset()
		for _, h := range [][2]string{
			{":method", "POST"},
			{":scheme", "http"},
			{":path", "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"},
			{":authority", "signet_agent"},
			{"content-type", "application/grpc"},
			{"te", "trailers"},
		} {
			if err := enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}); err != nil {
				return err
			}
		}
		if err := f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: head.Bytes(), EndHeaders: true}); err != nil {
			return err
		}
		if err := writeRequest(f, id, &discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{names[id]}}); err != nil {
			return err
		}
	}
	body := map[uint32][]byte{}
	for len(names) > 0 {
		frame, err := f.ReadFrame()
		if err != nil {
			return err
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				if err := f.WriteSettingsAck(); err != nil {
					return err
				}
			}
		case *http2.DataFrame:
			id := frame.StreamID
			body[id] = append(body[id], frame.Data()...)
			if len(body[id]) < 5 || len(body[id]) < 5+int(binary.BigEndian.Uint32(body[id][1:5])) {
				continue
			}
			resp := new(discoveryv3.DiscoveryResponse)
			if err := proto.Unmarshal(body[id][5:], resp); err != nil {
				return err
			}
			if err := writeRequest(f, id, &discoveryv3.DiscoveryRequest{
				TypeUrl: secretType, ResourceNames: []string{names[id]},
				VersionInfo: resp.VersionInfo, ResponseNonce: resp.Nonce,
			}); err != nil {
				return err
			}
			delete(names, id)
		}
	}
	return nil
}

func writeRequest(f *http2.Framer, id uint32, r *discoveryv3.DiscoveryRequest) error {
	m, err := proto.Marshal(r)
	if err != nil {
		return err
	}
	return f.WriteData(id, false, append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(m))), m...))
}

// bareServer is the floor: one goroutine a stream, which answers the first request and waits for the next.
type bareServer struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
}

func (*bareServer) StreamSecrets(stream sotwStream) error {
	body := &anypb.Any{TypeUrl: secretType, Value: make([]byte, 1100)}
	for n := 0; ; n++ {
		if _, err := stream.Recv(); err != nil {
			return err
		}
		if n == 0 {
			if err := stream.Send(&discoveryv3.DiscoveryResponse{TypeUrl: secretType, VersionInfo: "1", Nonce: "1", Resources: []*anypb.Any{body}}); err != nil {
				return err
			}
		}
	}
}
