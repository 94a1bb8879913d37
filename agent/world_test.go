package agent

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/test/lab"
	"github.com/signet-ca/signet/trust"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("example.org")

// authority is a CA of a test.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
	// above is what stands between cert and its root.
	above []*x509.Certificate
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func serialNumber() *big.Int {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	b[0] |= 1
	return new(big.Int).SetBytes(b)
}

func sign(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// newCA makes a CA that lives ten years from now; parent nil = a root.
func newCA(t testing.TB, cn string, parent *authority) *authority {
	t.Helper()
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber: serialNumber(), Subject: pkix.Name{CommonName: cn}, URIs: []*url.URL{{Scheme: "spiffe", Host: td.Name()}},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	a := &authority{key: newKey(t)}
	if parent == nil {
		a.cert = sign(t, tmpl, tmpl, a.key.Public(), a.key)
		return a
	}
	a.cert = sign(t, tmpl, parent.cert, a.key.Public(), parent.key)
	a.above = []*x509.Certificate{}
	return a
}

// leaf issues an SVID; the chain is DER, with the intermediate where the authority is one, and with control CAs.
func (a *authority) leaf(t testing.TB, id spiffeid.ID, pub crypto.PublicKey, from, to time.Time, change ...func(*x509.Certificate)) [][]byte {
	t.Helper()
	tmpl := &x509.Certificate{
		SerialNumber: serialNumber(), URIs: []*url.URL{id.URL()}, NotBefore: from, NotAfter: to, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, f := range change {
		f(tmpl)
	}
	return [][]byte{sign(t, tmpl, a.cert, pub, a.key).Raw, a.cert.Raw}
}

func mustBundle(t testing.TB, sequence uint64, roots ...*authority) trust.Bundle {
	t.Helper()
	var certs []*x509.Certificate
	for _, r := range roots {
		certs = append(certs, r.cert)
	}
	b, err := trust.NewBundle(td, sequence, certs)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func reg(name, path string, ttl time.Duration, selectors ...identity.Selector) identity.Registration {
	return identity.Registration{Name: name, ID: spiffeid.RequireFromPath(td, path), Agents: []string{"node-1"}, Selectors: selectors, TTL: ttl}
}

// world is a cluster: both hierarchies, and a server whose doors can be closed and whose answers can be bent.
type world struct {
	// ahead is how far the server's clock is ahead, as it says.
	ahead   atomic.Int64
	t       testing.TB
	control *authority
	root    *authority
	mesh    *authority
	vkey    string
	logKey  ed25519.PrivateKey
	now     func() time.Time

	enrolAddr, agentAddr string
	servers              []*grpc.Server

	mu     sync.Mutex
	tokens map[[32]byte]string
	agents map[string][]byte
	bundle trust.Bundle
	// shut are the registrations whose identities are banned.
	shut          []string
	registrations []identity.Registration
	revision      uint64
	checkpoint    func(seen uint64) *signetv1.Checkpoint
	changed       chan struct{}
	issued        map[string]int
	items         []*signetv1.IssueItem
	// refuse, if set, is asked before each issuance.
	refuse    func(*signetv1.IssueItem) *signetv1.Refusal
	failEnrol error
	// ban makes every call on the agent door fail as the server's does for an agent that it does not want.
	ban bool
	// trustFirst makes it give no leaves, as a server's does before it has heard what the agent believes.
	trustFirst bool
	// loseEnrol is how many answers at the enrol door are lost; enrolled counts those that were made.
	loseEnrol, enrolled int
	// used has the keys that tokens were used with.
	used       map[[32]byte][]byte
	controlTTL time.Duration
	acks       map[string][]*signetv1.BundleAck
	// stored is what agents say to have on disk.
	stored map[string]*signetv1.BundleAck
	// held is what agents say to hold, and order what they are told to replace.
	held    map[string]*signetv1.IssuersHeld
	order   *signetv1.Reissue
	seen    []uint64
	peers   []string // serials of control certificates that opened a Sync stream
	closing chan struct{}
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{
		t: t, now: time.Now, tokens: map[[32]byte]string{}, used: map[[32]byte][]byte{}, agents: map[string][]byte{}, issued: map[string]int{},
		changed: make(chan struct{}), controlTTL: 7 * 24 * time.Hour, acks: map[string][]*signetv1.BundleAck{}, held: map[string]*signetv1.IssuersHeld{},
		stored: map[string]*signetv1.BundleAck{},
	}
	w.control = newCA(t, "control", nil)
	w.root = newCA(t, "root", nil)
	w.mesh = newCA(t, "east", w.root)
	w.bundle = mustBundle(t, 1, w.root)
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w.logKey = priv
	if w.vkey, err = note.NewEd25519VerifierKey("example.org/east/east-1", pub); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.close)
	return w
}

// open opens the doors, at the addresses they had before, if any.
func (w *world) open() {
	w.t.Helper()
	w.closing = make(chan struct{})
	key := newKey(w.t)
	id := spiffeid.RequireFromPath(td, "/signet/cluster/east/server/east-1")
	cert := tls.Certificate{Certificate: w.control.leaf(w.t, id, key.Public(), w.now().Add(-time.Minute), w.now().Add(24*time.Hour)), PrivateKey: key}
	serve := func(addr *string, auth tls.ClientAuthType, register func(*grpc.Server)) {
		if *addr == "" {
			*addr = freeAddress(w.t)
		}
		l, err := net.Listen("tcp", *addr)
		if err != nil {
			w.t.Fatal(err)
		}
		s := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
			MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientAuth: auth, SessionTicketsDisabled: true,
			VerifyConnection: func(cs tls.ConnectionState) error {
				if auth == tls.RequireAnyClientCert && w.now().After(cs.PeerCertificates[0].NotAfter) {
					return errors.New("expired")
				}
				return nil
			},
		})))
		register(s)
		w.servers = append(w.servers, s)
		go s.Serve(l)
	}
	serve(&w.enrolAddr, tls.NoClientCert, func(s *grpc.Server) { signetv1.RegisterEnrolmentServer(s, enrolDoor{world: w}) })
	serve(&w.agentAddr, tls.RequireAnyClientCert, func(s *grpc.Server) { signetv1.RegisterAgentsServer(s, agentDoor{world: w, closing: w.closing}) })
}

// freeAddress is one on loopback that nobody else takes while nobody listens there.
func freeAddress(t testing.TB) string {
	t.Helper()
	ports, err := lab.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(ports[0]))
}

func (w *world) close() {
	if w.closing != nil {
		close(w.closing)
		w.closing = nil
	}
	for _, s := range w.servers {
		s.Stop()
	}
	w.servers = nil
}

// change alters the world and tells the agents.
func (w *world) change(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *world) setRegistrations(list ...identity.Registration) {
	w.change(func() { w.registrations = list; w.revision++ })
}

func (w *world) issuances(registration string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.issued[registration]
}

// token makes a join token for an agent.
func (w *world) token(agent string) identity.JoinToken {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	w.mu.Lock()
	w.tokens[sha256.Sum256(secret)] = agent
	w.mu.Unlock()
	return identity.JoinToken{Door: w.enrolAddr, TrustDomain: td.Name(), Cluster: "east", Agent: agent, Secret: secret, ControlCA: sha256.Sum256(w.control.cert.Raw)}
}

func (w *world) tokenSource(agent string) TokenSource {
	t := w.token(agent)
	return func(context.Context) (identity.JoinToken, error) { return t, nil }
}

type enrolDoor struct {
	signetv1.UnimplementedEnrolmentServer
	*world
}

func (w enrolDoor) Enrol(_ context.Context, req *signetv1.EnrolRequest) (*signetv1.EnrolResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failEnrol != nil {
		return nil, w.failEnrol
	}
	pub, err := identity.ParseCSR(req.Csr)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	var agent string
	switch e := req.Evidence.(type) {
	case *signetv1.EnrolRequest_JoinToken:
		hash := sha256.Sum256(e.JoinToken.Secret)
		var ok bool
		if agent, ok = w.tokens[hash]; !ok || w.used[hash] != nil && !slices.Equal(w.used[hash], pub.SPKI()) {
			return nil, status.Error(codes.PermissionDenied, identity.ErrTokenUnusable.Error())
		}
		w.agents[agent], w.used[hash] = pub.SPKI(), pub.SPKI()
	case *signetv1.EnrolRequest_EnrolledKey:
		agent = e.EnrolledKey.Agent
		if !slices.Equal(w.agents[agent], pub.SPKI()) {
			return nil, status.Error(codes.PermissionDenied, "not allowed")
		}
	}
	w.enrolled++
	if w.loseEnrol > 0 {
		w.loseEnrol--
		return nil, status.Error(codes.Unavailable, "the answer was lost on the way")
	}
	return &signetv1.EnrolResponse{
		Agent: agent, TrustDomain: td.Name(), Cluster: "east", AgentDoor: w.agentAddr, LogVerifierKey: w.vkey,
		CertificateChain: w.controlLeaf(agent, pub),
	}, nil
}

func (w *world) controlLeaf(agent string, pub identity.PublicKey) [][]byte {
	key, err := x509.ParsePKIXPublicKey(pub.SPKI())
	if err != nil {
		w.t.Error(err)
	}
	id := spiffeid.RequireFromPath(td, "/signet/cluster/east/agent/"+agent)
	return w.control.leaf(w.t, id, key, w.now().Add(-time.Minute), w.now().Add(w.controlTTL))
}

type agentDoor struct {
	signetv1.UnimplementedAgentsServer
	*world
	// closing is of the time the door is open.
	closing <-chan struct{}
}

func caller(ctx context.Context) *x509.Certificate {
	p, _ := peer.FromContext(ctx)
	return p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates[0]
}

// standing refuses whoever is banned.
func (w *world) standing() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ban {
		return status.Error(codes.PermissionDenied, "not enrolled")
	}
	return nil
}

func (w agentDoor) Issue(ctx context.Context, req *signetv1.IssueRequest) (*signetv1.IssueResponse, error) {
	_ = grpc.SetHeader(ctx, w.time())
	if err := w.standing(); err != nil {
		return nil, err
	}
	w.mu.Lock()
	first := w.trustFirst
	w.mu.Unlock()
	if first {
		return nil, status.Error(codes.Unavailable, "take the newest trust bundle first")
	}
	return &signetv1.IssueResponse{Results: w.issueItems(req.Items)}, nil
}

func (w *world) issueItems(items []*signetv1.IssueItem) []*signetv1.IssueResult {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []*signetv1.IssueResult
	for _, item := range items {
		w.items = append(w.items, item)
		refuse := func(reason signetv1.Refusal_Reason, text string) {
			out = append(out, &signetv1.IssueResult{Result: &signetv1.IssueResult_Refusal{Refusal: &signetv1.Refusal{Reason: reason, Message: text}}})
		}
		if w.refuse != nil {
			if r := w.refuse(item); r != nil {
				refuse(r.Reason, r.Message)
				continue
			}
		}
		i := slices.IndexFunc(w.registrations, func(r identity.Registration) bool { return r.Name == item.Registration })
		pub, err := identity.ParseCSR(item.Csr)
		if i < 0 || err != nil {
			refuse(signetv1.Refusal_REASON_DENIED, "not_registered")
			continue
		}
		key, err := x509.ParsePKIXPublicKey(pub.SPKI())
		if err != nil {
			w.t.Error(err)
		}
		r := w.registrations[i]
		w.issued[r.Name]++
		now := w.now()
		chain := w.mesh.leaf(w.t, r.ID, key, now.Add(-time.Minute), now.Add(r.TTL))
		out = append(out, &signetv1.IssueResult{Result: &signetv1.IssueResult_Certificate{Certificate: &signetv1.IssuedCertificate{Chain: chain}}})
	}
	return out
}

func (w agentDoor) Renew(ctx context.Context, req *signetv1.RenewRequest) (*signetv1.RenewResponse, error) {
	pub, err := identity.ParseCSR(req.Csr)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	c, err := identity.ParseControl(spiffeid.RequireFromURI(caller(ctx).URIs[0]))
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return &signetv1.RenewResponse{CertificateChain: w.controlLeaf(c.Name, pub)}, nil
}

// time is the header of every answer.
func (w *world) time() metadata.MD {
	return metadata.Pairs(timeHeader, strconv.FormatInt(w.now().Add(time.Duration(w.ahead.Load())).UnixNano(), 10))
}

func (w agentDoor) Sync(stream grpc.BidiStreamingServer[signetv1.SyncRequest, signetv1.SyncResponse]) error {
	c, err := identity.ParseControl(spiffeid.RequireFromURI(caller(stream.Context()).URIs[0]))
	if err != nil {
		return err
	}
	_ = stream.SetHeader(w.time())
	w.mu.Lock()
	w.peers = append(w.peers, caller(stream.Context()).SerialNumber.String())
	w.mu.Unlock()
	heard := make(chan error, 1)
	go func() {
		for {
			r, err := stream.Recv()
			if err != nil {
				heard <- err
				return
			}
			w.change(func() {
				w.acks[c.Name], w.held[c.Name] = r.BundleAcks, r.IssuersHeld
				w.stored[c.Name] = r.BundleStored
				if r.IssuersHeld == nil {
					w.t.Error("a word without the issuers whose leaves are held")
				}
				if r.CheckpointSeen != nil {
					w.seen = append(w.seen, r.CheckpointSeen.Size)
				}
			})
		}
	}()
	var sequence, revision uint64
	var order *signetv1.Reissue
	first := true
	for {
		if err := w.standing(); err != nil {
			return err
		}
		w.mu.Lock()
		changed := w.changed
		var out []*signetv1.SyncResponse
		if w.bundle.Sequence() != sequence {
			sequence = w.bundle.Sequence()
			b := &signetv1.Bundle{TrustDomain: td.Name(), Sequence: sequence}
			for _, r := range w.bundle.Roots() {
				b.Roots = append(b.Roots, r.Raw)
			}
			out = append(out, &signetv1.SyncResponse{Update: &signetv1.SyncResponse_Bundle{Bundle: b}})
		}
		if first || w.revision != revision {
			first, revision = false, w.revision
			set := &signetv1.RegistrationSet{Revision: revision}
			for _, r := range w.registrations {
				if r.For(c.Name) {
					told := &signetv1.Registration{
						Name: r.Name, SpiffeId: r.ID.String(), Selectors: selectorStrings(r.Selectors), TtlSeconds: int64(r.TTL / time.Second), Priority: r.Priority,
					}
					if slices.Contains(w.shut, r.Name) {
						set.Banned = append(set.Banned, told)
					} else {
						set.Registrations = append(set.Registrations, told)
					}
				}
			}
			out = append(out, &signetv1.SyncResponse{Update: &signetv1.SyncResponse_Registrations{Registrations: set}})
		}
		if w.order != order {
			order = w.order
			out = append(out, &signetv1.SyncResponse{Update: &signetv1.SyncResponse_Reissue{Reissue: order}})
		}
		if w.checkpoint != nil && len(w.seen) > 0 {
			if cp := w.checkpoint(w.seen[len(w.seen)-1]); cp != nil {
				out = append(out, &signetv1.SyncResponse{Update: &signetv1.SyncResponse_Checkpoint{Checkpoint: cp}})
			}
		}
		w.mu.Unlock()
		for _, m := range out {
			if err := stream.Send(m); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case err := <-heard:
			return err
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-w.closing:
			return status.Error(codes.Unavailable, "stopping")
		}
	}
}

// fakeAttestor says what it is told to.
type fakeAttestor struct {
	mu        sync.Mutex
	selectors []identity.Selector
	alive     bool
	err       error
	open      int
}

// set makes the callers to come show these selectors.
func (f *fakeAttestor) set(selectors ...identity.Selector) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.selectors = selectors
}

func (f *fakeAttestor) AttestWorkload(context.Context, net.Conn) (identity.Workload, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return identity.Workload{}, f.err
	}
	f.open++
	return identity.Workload{
		Selectors: slices.Clone(f.selectors), Instance: "pid 1 uid 1000",
		Alive: func() bool { f.mu.Lock(); defer f.mu.Unlock(); return f.alive },
		Close: func() { f.mu.Lock(); defer f.mu.Unlock(); f.open-- },
	}, nil
}

// node is a running agent.
type node struct {
	*Agent
	stop func() error
	// done is closed when Run has returned; then stop gives its error.
	done chan struct{}
}

// wait waits until Run ends by itself.
func (n *node) wait(t *testing.T) error {
	t.Helper()
	select {
	case <-n.done:
	case <-time.After(20 * time.Second):
		t.Fatal("still running")
	}
	return n.stop()
}

// start runs an agent; config may be changed before.
func (w *world) start(t *testing.T, change ...func(*Config)) *node {
	t.Helper()
	a, err := w.make(t, change...)
	if err != nil {
		t.Fatal(err)
	}
	return run(t, a)
}

func (w *world) make(t *testing.T, change ...func(*Config)) (*Agent, error) {
	t.Helper()
	dir := t.TempDir()
	c := Config{
		StateDir: filepath.Join(dir, "state"), Socket: filepath.Join(dir, "agent.sock"), Keys: keystore.NewMemory(), Now: w.now,
		Attestor: &fakeAttestor{selectors: []identity.Selector{"unix:uid:1000"}, alive: true}, Logger: testLog(t), sealIterations: 1, returnTime: 50 * time.Millisecond,
	}
	if w.enrolAddr != "" {
		c.JoinToken = w.tokenSource("node-1")
	}
	for _, f := range change {
		f(&c)
	}
	return New(t.Context(), c)
}

func run(t *testing.T, a *Agent) *node {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended, done := make(chan error, 1), make(chan struct{})
	go func() { ended <- a.Run(ctx); close(done) }()
	n := &node{Agent: a, done: done, stop: sync.OnceValue(func() error { cancel(); return <-ended })}
	t.Cleanup(func() { _ = n.stop() })
	select {
	case <-a.Serving():
	case <-done:
	}
	return n
}

// eventually waits for something that other goroutines bring about.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

var errAway = errors.New("the server is away")

// refuseNamed denies what is asked for one registration.
func refuseNamed(name string) func(*signetv1.IssueItem) *signetv1.Refusal {
	return func(item *signetv1.IssueItem) *signetv1.Refusal {
		if item.Registration != name {
			return nil
		}
		return &signetv1.Refusal{Reason: signetv1.Refusal_REASON_DENIED, Message: "not_registered"}
	}
}
