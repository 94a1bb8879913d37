package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-ca/signet/sds"
	"github.com/signet-ca/signet/trust"
)

// pushed is what a server process answers to "push N": how long it took until N streams had acknowledged the change.
type pushed struct {
	Millis float64 `json:"millis"`
	Acked  int64   `json:"acked"`
}

// pushLimit bounds one round.
const pushLimit = time.Minute

// serve runs a server with the same options on a socket and obeys: "push N" changes the trust.
func serve(in lineReader, out func(any) error, socket string, s secretv3.SecretDiscoveryServiceServer, change func() error, acked func() int64) error {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	g := grpc.NewServer(append(sds.ServerOptions(), grpc.Creds(sds.ConnCredentials()))...)
	secretv3.RegisterSecretDiscoveryServiceServer(g, s)
	go func() { _ = g.Serve(l) }()
	defer g.Stop()
	if err := out(struct{}{}); err != nil {
		return err
	}
	for {
		line, err := in.line()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		var want int64
		if _, err := fmt.Sscanf(line, "push %d", &want); err != nil {
			return fmt.Errorf("%q: %w", line, err)
		}
		// The first acknowledgements may still be on their way when the clients have been served.
		for before := int64(-1); before != acked(); time.Sleep(100 * time.Millisecond) {
			before = acked()
		}
		before, start := acked(), time.Now()
		if err := change(); err != nil {
			return err
		}
		for acked()-before < want && time.Since(start) < pushLimit {
			time.Sleep(time.Millisecond)
		}
		if err := out(pushed{float64(time.Since(start).Microseconds()) / 1e3, acked() - before}); err != nil {
			return err
		}
	}
}

// bareServer is the floor: grpc-go with two goroutines a stream, as any server has that both listens and tells; it sends
// bytes made before, and counts what is acknowledged.
type bareServer struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	acks atomic.Int64

	mu      sync.Mutex
	bodies  map[string]*anypb.Any
	version uint64
	changed chan struct{}
}

func (b *bareServer) now(name string) (uint64, *anypb.Any, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.version, b.bodies[name], b.changed
}

// size sets how many bytes answer a name from the next change on.
func (b *bareServer) size(name string, n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.bodies[name] = &anypb.Any{TypeUrl: secretType, Value: make([]byte, n)}
}

func (b *bareServer) change() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.version++
	close(b.changed)
	b.changed = make(chan struct{})
	return nil
}

func (b *bareServer) StreamSecrets(stream grpc.BidiStreamingServer[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]) error {
	r, err := stream.Recv()
	if err != nil {
		return err
	}
	name := r.GetResourceNames()[0]
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := stream.Recv(); err != nil {
				ended <- err
				return
			}
			b.acks.Add(1)
		}
	}()
	for {
		version, body, changed := b.now(name)
		text := strconv.FormatUint(version, 10)
		if err := stream.Send(&discoveryv3.DiscoveryResponse{VersionInfo: text, Nonce: text, TypeUrl: secretType, Resources: []*anypb.Any{body}}); err != nil {
			return err
		}
		if name != trustName {
			changed = nil
		}
		select {
		case <-changed:
		case err := <-ended:
			return err
		}
	}
}

// newBare answers with as many bytes as it is told by name. Sizes are of whole responses, of which some are not the body.
func newBare(sizes map[string]int) *bareServer {
	const around = 200
	b := &bareServer{bodies: map[string]*anypb.Any{}, changed: make(chan struct{})}
	for name, n := range sizes {
		b.size(name, max(n-around, 0))
	}
	return b
}

// serveBare is the process with the bare server.
func serveBare(in lineReader, out func(any) error, socket string, sizes map[string]int) error {
	b := newBare(sizes)
	return serve(in, out, socket, b, b.change, b.acks.Load)
}

const (
	trustName = "ROOTCA"
	ownName   = "default"
)

// serveSDS is the process with the agent's SDS server, where the trust can be changed at will.
func serveSDS(in lineReader, out func(any) error, socket string) error {
	w, err := newStage()
	if err != nil {
		return err
	}
	registry := prometheus.NewRegistry()
	s, err := sds.New(sds.Config{Workloads: w, Metrics: registry, Limits: sds.Limits{StreamsPerCaller: 1 << 20}})
	if err != nil {
		return err
	}
	acked := func() int64 {
		families, err := registry.Gather()
		if err != nil {
			return 0
		}
		var n float64
		for _, f := range families {
			if f.GetName() != "signet_sds_acks_total" {
				continue
			}
			for _, m := range f.GetMetric() {
				n += m.GetCounter().GetValue()
			}
		}
		return int64(n)
	}
	return serve(in, out, socket, s, w.change, acked)
}

// stage is a sds.Workloads with one identity, which all callers have, and a trust bundle that changes.
type stage struct {
	id      spiffeid.ID
	svid    *sds.SVID
	root    *x509.Certificate
	rootKey *ecdsa.PrivateKey
	bundles trust.Bundles
	round   uint64
}

func certificate(template, parent *x509.Certificate, public *ecdsa.PublicKey, key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	template.SerialNumber = new(big.Int).SetBytes(append([]byte{1}, []byte(rand.Text())...))
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(12*time.Hour)
	if template.IsCA {
		template.NotAfter = time.Now().Add(30 * 24 * time.Hour) // what it signs must not outlive it
	}
	template.BasicConstraintsValid = true
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func newRoot(name string, td spiffeid.TrustDomain) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{Subject: pkix.Name{CommonName: name}, IsCA: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{td.ID().URL()}}
	cert, err := certificate(template, template, &key.PublicKey, key)
	return cert, key, err
}

func leafOf(id spiffeid.ID, parent *x509.Certificate, public *ecdsa.PublicKey, key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	return certificate(&x509.Certificate{
		URIs: []*url.URL{id.URL()}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, parent, public, key)
}

func newStage() (*stage, error) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	w := &stage{id: spiffeid.RequireFromPath(td, "/ns/bench/sa/bench")}
	root, rootKey, err := newRoot("root 0", td)
	if err != nil {
		return nil, err
	}
	w.root, w.rootKey = root, rootKey
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf, err := leafOf(w.id, root, &key.PublicKey, rootKey)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	w.svid = &sds.SVID{
		ID: w.id, CertificateChain: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw}),
		PrivateKey: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
		NotBefore:  leaf.NotBefore, NotAfter: leaf.NotAfter, Serial: leaf.SerialNumber.Text(16), Digest: sha256.Sum256(leaf.Raw),
	}
	return w, w.change()
}

// change adds a root beside the one that is there, and takes out the one that was added before.
func (w *stage) change() error {
	w.round++
	roots := []*x509.Certificate{w.root}
	other, _, err := newRoot("root "+strconv.FormatUint(w.round, 10), w.id.TrustDomain())
	if err != nil {
		return err
	}
	b, err := trust.NewBundle(w.id.TrustDomain(), w.round, append(roots, other))
	if err != nil {
		return err
	}
	return w.bundles.Set(b)
}

// Attest implements sds.Workloads.
func (w *stage) Attest(context.Context, net.Conn) (sds.View, error) { return w, nil }

// Identities implements sds.View, as the rest does.
func (w *stage) Identities() []spiffeid.ID { return []spiffeid.ID{w.id} }

// SVID of the one identity.
func (w *stage) SVID(spiffeid.ID) *sds.SVID { return w.svid }

// Refusal of none.
func (w *stage) Refusal(spiffeid.ID) error { return nil }

// TrustDomain of it.
func (w *stage) TrustDomain() spiffeid.TrustDomain { return w.id.TrustDomain() }

// TrustDomains is that one.
func (w *stage) TrustDomains() []spiffeid.TrustDomain {
	return []spiffeid.TrustDomain{w.id.TrustDomain()}
}

// Bundle of it.
func (w *stage) Bundle(td spiffeid.TrustDomain) (trust.Bundle, bool) { return w.bundles.Get(td) }

// Changed when the trust is.
func (w *stage) Changed() <-chan struct{} { return w.bundles.Changed() }

// Err is never.
func (w *stage) Err() error { return nil }

// Close has nothing to give back.
func (w *stage) Close() {}
