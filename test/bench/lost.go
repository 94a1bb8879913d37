package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/test/lab"
)

// quickRotation has leaves of seconds, so that a root can go within half a minute.
const quickRotation = "leaf: { ttl: 10s, max_ttl: 10s, backdate: 1s }\nrotation: { skew: 1s }\n"

// pace is between two requests of a peer; each has a connection of its own.
const pace = 20 * time.Millisecond

// lost replaces an intermediate and then the root, until the old one is removed, while two workloads on two real agents
// make requests of each other.
func lost(ctx context.Context, b *bench) ([]figure, error) {
	l, c, err := newCluster(ctx, b, "lost", quickRotation)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	if _, err := c.Serve(ctx); err != nil {
		return nil, err
	}
	var text string
	for _, name := range []string{"one", "two"} {
		text += fmt.Sprintf("  - { name: %[1]s, spiffe_id: spiffe://%[2]s/ns/bench/sa/%[1]s, agents: [node-%[1]s], selectors: [\"socket:%[1]s\"] }\n", name, lab.TrustDomain)
	}
	if err := c.Apply(ctx, "registrations:\n"+text); err != nil {
		return nil, err
	}
	a, err := adminOf(c)
	if err != nil {
		return nil, err
	}
	defer a.conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var peers []*workload
	for _, name := range []string{"one", "two"} {
		if _, err := c.StartAgent(ctx, "node-"+name, name); err != nil {
			return nil, err
		}
		p, err := newWorkload(ctx, "spiffe://"+lab.TrustDomain+"/ns/bench/sa/"+name, c.Path("run", name+".sock"))
		if err != nil {
			return nil, err
		}
		peers = append(peers, p)
	}
	load, endLoad := context.WithCancel(ctx)
	defer endLoad()
	var wg sync.WaitGroup
	wg.Go(func() { peers[0].ask(load, peers[1]) })
	wg.Go(func() { peers[1].ask(load, peers[0]) })

	// shown waits until both show leaves of the active issuer and nobody else's.
	shown := func(issuer string) error {
		return lab.Until(ctx, "both peers show leaves of "+issuer, 30*time.Second, func() error {
			key, err := keyOf(ctx, a, issuer)
			if err != nil {
				return err
			}
			for _, p := range peers {
				if cert, _ := p.now(); string(cert.Leaf.AuthorityKeyId) != string(key) {
					return fmt.Errorf("%s does not", p.id)
				}
			}
			return nil
		})
	}
	replace := func(root, fingerprint string, start ...string) error {
		next, err := rotate(ctx, c, a, root, fingerprint, start...)
		if err != nil {
			return err
		}
		if err := a.stands(ctx, next, "active", 20*time.Second); err != nil {
			return err
		}
		return shown(next)
	}
	if err := replace("root", l.RootFingerprint, "intermediate"); err != nil {
		return nil, err
	}
	fingerprint, err := l.MakeRootIn(ctx, "root-2")
	if err != nil {
		return nil, err
	}
	if err := replace("root-2", fingerprint, "root", "--root", filepath.Join(l.Dir, "root-2", "root.pem"), "--fingerprint", fingerprint); err != nil {
		return nil, err
	}
	if err := a.stands(ctx, idOf(l.RootFingerprint), "removed", time.Minute); err != nil {
		return nil, err
	}
	endLoad()
	wg.Wait()
	var requests, failed int64
	for _, p := range peers {
		requests, failed = requests+p.requests.Load(), failed+p.failed.Load()
		if err := p.first.Load(); err != nil {
			fmt.Fprintf(os.Stderr, "the first request of %s that was lost: %v\n", p.id, *err)
		}
	}
	const what = "an intermediate and then the root replaced under load, a connection for each request"
	return []figure{
		{Name: what + ": requests", Value: float64(requests), Unit: "requests"},
		figure{Name: what + ": lost", Value: float64(failed), Unit: "requests"}.atMost(0),
	}, nil
}

// workload has its certificate and its trust from an agent, by SDS, and speaks mutual TLS with another.
type workload struct {
	id, addr string
	ready    chan struct{} // closed when it has both

	mu    sync.Mutex
	cert  *tls.Certificate
	roots *x509.CertPool

	requests, failed atomic.Int64
	first            atomic.Pointer[error] // the first failure
}

// newWorkload waits until the workload has its secrets, and listens; it ends with ctx.
func newWorkload(ctx context.Context, id, socket string) (*workload, error) {
	p := &workload{id: id, ready: make(chan struct{})}
	ended := make(chan error, 1)
	go func() { ended <- p.follow(ctx, socket) }()
	select {
	case <-p.ready:
	case err := <-ended:
		return nil, err
	case <-time.After(20 * time.Second):
		return nil, fmt.Errorf("%s has got no secrets within 20 s", id)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		MinVersion:         tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return p.config(""), nil },
	})
	if err != nil {
		return nil, err
	}
	p.addr = l.Addr().String()
	context.AfterFunc(ctx, func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() { // an echo
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(requestLimit))
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	return p, nil
}

// requestLimit bounds one request.
const requestLimit = 5 * time.Second

// now is what the workload has.
func (p *workload) now() (*tls.Certificate, *x509.CertPool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cert, p.roots
}

// config is for one handshake, with the secrets of this moment. The other side must have that SPIFFE ID; "" = any that the
// roots stand for.
func (p *workload) config(peer string) *tls.Config {
	cert, roots := p.now()
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*cert}, SessionTicketsDisabled: true,
		ClientAuth:         tls.RequireAnyClientCert,
		InsecureSkipVerify: true, //nolint:gosec // the name is a SPIFFE ID, not a host: checked here
		VerifyConnection: func(cs tls.ConnectionState) error {
			between := x509.NewCertPool()
			for _, c := range cs.PeerCertificates[1:] {
				between.AddCert(c)
			}
			leaf := cs.PeerCertificates[0]
			if peer != "" && (len(leaf.URIs) != 1 || leaf.URIs[0].String() != peer) {
				return fmt.Errorf("the other side is %v, not %s", leaf.URIs, peer)
			}
			_, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
			return err
		},
	}
}

// ask makes requests until the load ends; the last one is finished.
func (p *workload) ask(load context.Context, other *workload) {
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for {
		select {
		case <-load.Done():
			return
		case <-tick.C:
		}
		p.requests.Add(1)
		if err := p.request(other); err != nil {
			p.failed.Add(1)
			p.first.CompareAndSwap(nil, &err)
		}
	}
}

// request sends something on a new connection, and wants it back.
func (p *workload) request(other *workload) error {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: requestLimit}, "tcp", other.addr, p.config(other.id))
	if err != nil {
		return err
	}
	defer conn.Close()
	const text = "hello"
	if err := errors.Join(conn.SetDeadline(time.Now().Add(requestLimit)), conn.Handshake()); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, text); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(conn, got); err != nil {
		return err
	}
	if string(got) != text {
		return fmt.Errorf("%q came back as %q", text, got)
	}
	return nil
}

// follow takes the secrets from the agent, and acknowledges them when they are in use.
func (p *workload) follow(ctx context.Context, socket string) error {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := secretv3.NewSecretDiscoveryServiceClient(conn).StreamSecrets(ctx)
	if err != nil {
		return err
	}
	ready := sync.OnceFunc(func() { close(p.ready) })
	say := &discoveryv3.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{ownName, trustName}}
	for {
		if err := stream.Send(say); err != nil {
			return err
		}
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		for _, raw := range r.Resources {
			if err := p.take(raw); err != nil {
				return err
			}
		}
		say.VersionInfo, say.ResponseNonce = r.VersionInfo, r.Nonce
		if cert, roots := p.now(); cert != nil && roots != nil {
			ready()
		}
	}
}

// take puts a secret to use.
func (p *workload) take(raw *anypb.Any) error {
	secret, validator := new(tlsv3.Secret), new(tlsv3.SPIFFECertValidatorConfig)
	if err := raw.UnmarshalTo(secret); err != nil {
		return err
	}
	if c := secret.GetTlsCertificate(); c != nil {
		cert, err := tls.X509KeyPair(c.CertificateChain.GetInlineBytes(), c.PrivateKey.GetInlineBytes())
		if err != nil {
			return err
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.cert = &cert
		return nil
	}
	if err := secret.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(validator); err != nil {
		return err
	}
	roots := x509.NewCertPool()
	for _, td := range validator.TrustDomains {
		if !roots.AppendCertsFromPEM(td.TrustBundle.GetInlineBytes()) {
			return fmt.Errorf("the trust of %s can't be read", td.Name)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.roots = roots
	return nil
}

// keyOf an intermediate is the identifier that its leaves carry.
func keyOf(ctx context.Context, a *admin, id string) ([]byte, error) {
	r, err := a.ListAuthorities(ctx, &adminv1.ListAuthoritiesRequest{})
	if err != nil {
		return nil, err
	}
	for _, x := range r.Authorities {
		if x.Id == id && len(x.Chain) > 0 {
			cert, err := x509.ParseCertificate(x.Chain[0])
			if err != nil {
				return nil, err
			}
			return cert.SubjectKeyId, nil
		}
	}
	return nil, fmt.Errorf("there is no %s with a certificate", id)
}
