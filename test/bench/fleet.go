package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/signet-ca/signet/agent"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/sds"
	"github.com/signet-ca/signet/test/doors"
	"github.com/signet-ca/signet/trust"
)

// fleet is the work of a process with several agents: real ones, or bare ones, which pass on what the door tells to bare
// servers and answer when all their streams have acknowledged it.
type fleet struct {
	Dir     string         `json:"dir"`
	Tokens  []string       `json:"tokens"` // of one agent each
	Bare    bool           `json:"bare"`
	Streams int            `json:"streams"` // of each agent
	Sizes   map[string]int `json:"sizes"`
}

func fleetSocket(dir, name string) string { return filepath.Join(dir, name+".sock") }

// playFleet runs the agents until its input ends.
func playFleet(in lineReader, out func(any) error, f fleet) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	failed := make(chan error, len(f.Tokens))
	for _, text := range f.Tokens {
		token, err := identity.ParseJoinToken(text)
		if err != nil {
			return err
		}
		if f.Bare {
			go func() { failed <- bareAgent(ctx, f, token) }()
			continue
		}
		a, err := agent.New(ctx, agent.Config{
			StateDir: filepath.Join(f.Dir, token.Agent), Socket: fleetSocket(f.Dir, token.Agent), Keys: keystore.NewMemory(),
			JoinToken: func(context.Context) (identity.JoinToken, error) { return token, nil },
		})
		if err != nil {
			return err
		}
		go func() { failed <- a.Run(ctx) }()
	}
	if err := out(struct{}{}); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { _, err := in.line(); ended <- err }()
	select {
	case err := <-failed:
		return err
	case err := <-ended:
		if errors.Is(err, io.EOF) {
			return nil
		}
		return err
	}
}

// bareAgent is the floor of an agent.
func bareAgent(ctx context.Context, f fleet, token identity.JoinToken) error {
	m, err := doors.Enrol(ctx, token.Encode())
	if err != nil {
		return err
	}
	conn, err := m.Dial(m.Reply.AgentDoor, m.ControlCA)
	if err != nil {
		return err
	}
	defer conn.Close()
	sync, err := signetv1.NewAgentsClient(conn).Sync(ctx)
	if err != nil {
		return err
	}
	if err := sync.Send(&signetv1.SyncRequest{}); err != nil {
		return err
	}
	b := newBare(f.Sizes)
	l, err := net.Listen("unix", fleetSocket(f.Dir, token.Agent))
	if err != nil {
		return err
	}
	g := grpc.NewServer(append(sds.ServerOptions(), grpc.Creds(sds.ConnCredentials()))...)
	secretv3.RegisterSecretDiscoveryServiceServer(g, b)
	defer g.Stop()
	go func() { _ = g.Serve(l) }()
	td, err := spiffeid.TrustDomainFromString(m.Reply.TrustDomain)
	if err != nil {
		return err
	}
	for {
		r, err := sync.Recv()
		if err != nil {
			return err
		}
		if r.GetBundle() == nil {
			continue
		}
		var roots []*x509.Certificate
		for _, raw := range r.GetBundle().Roots {
			c, err := x509.ParseCertificate(raw)
			if err != nil {
				return err
			}
			roots = append(roots, c)
		}
		bundle, err := trust.NewBundle(td, r.GetBundle().Sequence, roots)
		if err != nil {
			return err
		}
		before := b.acks.Load()
		if err := b.change(); err != nil {
			return err
		}
		for bundle.Sequence() > 1 && b.acks.Load()-before < int64(f.Streams) {
			time.Sleep(time.Millisecond)
		}
		digest := bundle.Digest()
		if err := sync.Send(&signetv1.SyncRequest{BundleAcks: []*signetv1.BundleAck{{TrustDomain: td.Name(), Digest: digest[:]}}}); err != nil {
			return err
		}
	}
}

// door stands in for a server, which cannot change the trust yet: enrolment, issuing and Sync as agents know them, with
// the trust in the hands of the benchmark. It tells as the server does: on a change every stream sends what is true now.
type door struct {
	signetv1.UnimplementedEnrolmentServer
	signetv1.UnimplementedAgentsServer
	stage      *stage // whose root is also the issuer's
	control    *x509.Certificate
	controlKey *ecdsa.PrivateKey
	addr, vkey string
	server     *grpc.Server
	uid        int

	mu      sync.Mutex
	tokens  map[[sha256.Size]byte]string
	acked   map[string]trust.Digest
	heardOf chan struct{} // closed at the next acknowledgement
}

func openDoor() (*door, error) {
	st, err := newStage()
	if err != nil {
		return nil, err
	}
	d := &door{stage: st, uid: os.Getuid(), tokens: map[[sha256.Size]byte]string{}, acked: map[string]trust.Digest{}, heardOf: make(chan struct{})}
	if d.control, d.controlKey, err = newRoot("control", st.TrustDomain()); err != nil {
		return nil, err
	}
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	if d.vkey, err = note.NewEd25519VerifierKey(st.TrustDomain().Name()+"/bench/bench-1", public); err != nil {
		return nil, err
	}
	key, err := doors.NewKey()
	if err != nil {
		return nil, err
	}
	own, err := d.controlLeaf("/signet/cluster/bench/server/bench-1", &key.PublicKey)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	d.addr = l.Addr().String()
	d.server = grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: own, PrivateKey: key}},
		ClientAuth: tls.RequestClientCert, SessionTicketsDisabled: true,
	})))
	signetv1.RegisterEnrolmentServer(d.server, d)
	signetv1.RegisterAgentsServer(d.server, d)
	go func() { _ = d.server.Serve(l) }()
	return d, nil
}

func (d *door) controlLeaf(path string, public *ecdsa.PublicKey) ([][]byte, error) {
	id := spiffeid.RequireFromPath(d.stage.TrustDomain(), path)
	leaf, err := leafOf(id, d.control, public, d.controlKey)
	if err != nil {
		return nil, err
	}
	return [][]byte{leaf.Raw, d.control.Raw}, nil
}

func (d *door) token(name string) string {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	d.mu.Lock()
	d.tokens[sha256.Sum256(secret)] = name
	d.mu.Unlock()
	return identity.JoinToken{
		Door: d.addr, TrustDomain: d.stage.TrustDomain().Name(), Cluster: "bench", Agent: name, Secret: secret, ControlCA: sha256.Sum256(d.control.Raw),
	}.Encode()
}

func publicKey(csr []byte) (*ecdsa.PublicKey, error) {
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, err
	}
	k, ok := r.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("a key of type %T", r.PublicKey)
	}
	return k, nil
}

// Enrol implements the enrol door.
func (d *door) Enrol(_ context.Context, req *signetv1.EnrolRequest) (*signetv1.EnrolResponse, error) {
	d.mu.Lock()
	name, ok := d.tokens[sha256.Sum256(req.GetJoinToken().GetSecret())]
	d.mu.Unlock()
	if !ok {
		return nil, errors.New("unknown token")
	}
	key, err := publicKey(req.Csr)
	if err != nil {
		return nil, err
	}
	chain, err := d.controlLeaf("/signet/cluster/bench/agent/"+name, key)
	if err != nil {
		return nil, err
	}
	return &signetv1.EnrolResponse{
		Agent: name, TrustDomain: d.stage.TrustDomain().Name(), Cluster: "bench", AgentDoor: d.addr, LogVerifierKey: d.vkey, CertificateChain: chain,
	}, nil
}

// Issue implements the agent door.
func (d *door) Issue(_ context.Context, req *signetv1.IssueRequest) (*signetv1.IssueResponse, error) {
	var out signetv1.IssueResponse
	for _, item := range req.Items {
		key, err := publicKey(item.Csr)
		if err != nil {
			return nil, err
		}
		leaf, err := leafOf(d.stage.id, d.stage.root, key, d.stage.rootKey)
		if err != nil {
			return nil, err
		}
		out.Results = append(out.Results, &signetv1.IssueResult{Result: &signetv1.IssueResult_Certificate{
			Certificate: &signetv1.IssuedCertificate{Chain: [][]byte{leaf.Raw}},
		}})
	}
	return &out, nil
}

// Sync implements the agent door.
func (d *door) Sync(stream grpc.BidiStreamingServer[signetv1.SyncRequest, signetv1.SyncResponse]) error {
	p, _ := peer.FromContext(stream.Context())
	certs := p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates //nolint:forcetypeassert // the only credentials there are
	if len(certs) == 0 {
		return errors.New("no certificate")
	}
	who, err := identity.ControlOf(certs[0])
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		for {
			r, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			d.heard(who.Name, r.BundleAcks)
		}
	}()
	if err := stream.Send(&signetv1.SyncResponse{Update: &signetv1.SyncResponse_Registrations{Registrations: &signetv1.RegistrationSet{
		Revision: 1, Registrations: []*signetv1.Registration{{
			Name: "bench", SpiffeId: d.stage.id.String(), TtlSeconds: 3600, Selectors: []string{"unix:uid:" + strconv.Itoa(d.uid)},
		}},
	}}}); err != nil {
		return err
	}
	for {
		changed := d.stage.Changed()
		b, _ := d.stage.Bundle(d.stage.TrustDomain())
		m := &signetv1.Bundle{TrustDomain: b.TrustDomain().Name(), Sequence: b.Sequence()}
		for _, r := range b.Roots() {
			m.Roots = append(m.Roots, r.Raw)
		}
		if err := stream.Send(&signetv1.SyncResponse{Update: &signetv1.SyncResponse_Bundle{Bundle: m}}); err != nil {
			return err
		}
		select {
		case <-changed:
		case err := <-ended:
			return err
		}
	}
}

func (d *door) heard(name string, acks []*signetv1.BundleAck) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, a := range acks {
		if len(a.Digest) == sha256.Size {
			d.acked[name] = trust.Digest(a.Digest)
		}
	}
	close(d.heardOf)
	d.heardOf = make(chan struct{})
}

// all waits until so many agents have acknowledged the current trust.
func (d *door) all(ctx context.Context, agents int, limit time.Duration) error {
	b, _ := d.stage.Bundle(d.stage.TrustDomain())
	timeout := time.After(limit)
	for {
		d.mu.Lock()
		n, next := 0, d.heardOf
		for _, a := range d.acked {
			if a == b.Digest() {
				n++
			}
		}
		d.mu.Unlock()
		if n >= agents {
			return nil
		}
		select {
		case <-next:
		case <-ctx.Done():
			return ctx.Err()
		case <-timeout:
			return fmt.Errorf("%d of %d agents have acknowledged within %s", n, agents, limit)
		}
	}
}

// trustToAgents tells 100 agents with 100 streams each of another bundle, until the door has every agent's word that all
// its streams have acknowledged it.
func trustToAgents(ctx context.Context, b *bench) ([]figure, error) {
	agents, streams, rounds, perFleet := 100, 100, 5, 10
	if b.quick {
		agents, streams, rounds = 20, 20, 2
	}
	times, sizes := map[bool][]float64{}, map[string]int{}
	for _, bare := range []bool{false, true} {
		if err := func() error {
			d, err := openDoor()
			if err != nil {
				return err
			}
			defer d.server.Stop()
			dir := filepath.Join(b.dir, "fleet-"+strconv.FormatBool(bare))
			if err := os.MkdirAll(dir, 0o700); err != nil {
				return err
			}
			var all crowds
			defer func() { all.end() }()
			var sockets []string
			for n := 0; n < agents; {
				f := fleet{Dir: dir, Bare: bare, Streams: streams, Sizes: sizes}
				for ; len(f.Tokens) < perFleet && n < agents; n++ {
					name := "node-" + strconv.Itoa(n)
					f.Tokens = append(f.Tokens, d.token(name))
					sockets = append(sockets, fleetSocket(dir, name))
				}
				ch, err := start("fleet", partConfig{Fleet: &f})
				if err != nil {
					return err
				}
				all = append(all, ch)
				if err := ch.hear(ctx, 30*time.Second, &struct{}{}); err != nil {
					return err
				}
			}
			if err := d.all(ctx, agents, time.Minute); err != nil {
				return err
			}
			cs, err := gather(crowd{Sockets: sockets, Sidecars: agents * streams, Names: []string{trustName}})
			if err != nil {
				return err
			}
			defer cs.end()
			got, err := cs.arrive(ctx)
			if err != nil {
				return err
			}
			if got.Served != agents*streams {
				return fmt.Errorf("%d of %d streams were served: %v", got.Served, agents*streams, got.Errors)
			}
			sizes = got.Sizes
			for range rounds {
				time.Sleep(time.Second) // what an agent gathers has been said
				start := time.Now()
				if err := d.stage.change(); err != nil {
					return err
				}
				if err := d.all(ctx, agents, pushLimit); err != nil {
					return err
				}
				times[bare] = append(times[bare], float64(time.Since(start).Microseconds())/1e3)
			}
			return nil
		}(); err != nil {
			return nil, err
		}
	}
	floor := median(times[true])
	return []figure{
		figure{
			Name:  fmt.Sprintf("a trust change from one server to %d agents with %d streams each, until the server has every agent's word", agents, streams),
			Value: median(times[false]), Unit: "ms",
		}.against(floor, 1.5).spread(scaled(times[false], 1/floor)),
	}, nil
}
