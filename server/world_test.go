package server

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	signetv1 "github.com/signet-ca/signet/api/signet/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/test/doors"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("SIGNET_TEST_INIT"); dir != "" {
		initAndDie(dir)
	}
	if path := os.Getenv("SIGNET_TEST_ADMIN"); path != "" {
		askAdmin(path)
	}
	goleak.VerifyTestMain(m)
}

var td = spiffeid.RequireTrustDomainFromString("example.org")

// root is a mesh root in memory.
type root struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newRoot(t testing.TB) *root { return newRootUntil(t, time.Now().Add(1000*time.Hour)) }

func newRootUntil(t testing.TB, notAfter time.Time) *root {
	t.Helper()
	key, err := doors.NewKey()
	must(t, err)
	c := caTemplate("root")
	c.NotAfter = notAfter.Truncate(time.Second)
	c.MaxPathLen, c.MaxPathLenZero = 1, false
	return &root{key, sign(t, c, c, key.Public(), key)}
}

func caTemplate(cn string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: cn, Organization: []string{td.Name()}},
		NotBefore: time.Now().Add(-time.Hour).Truncate(time.Second), NotAfter: time.Now().Add(1000 * time.Hour).Truncate(time.Second),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, URIs: []*url.URL{td.ID().URL()},
	}
}

func leafTemplate(id string) *x509.Certificate {
	u, _ := url.Parse(id)
	return &x509.Certificate{
		SerialNumber: serial(), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs: []*url.URL{u},
	}
}

func serial() *big.Int {
	n, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	return n
}

func sign(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	must(t, err)
	c, err := x509.ParseCertificate(der)
	must(t, err)
	return c
}

// intermediate signs what Init asked for, and returns the chain, root last, in PEM.
func (r *root) intermediate(t testing.TB, csr []byte, change func(*x509.Certificate)) []byte {
	t.Helper()
	block, _ := pem.Decode(csr)
	req, err := x509.ParseCertificateRequest(block.Bytes)
	must(t, err)
	c := caTemplate(req.Subject.CommonName)
	if change != nil {
		change(c)
	}
	return ca.EncodeChain(sign(t, c, r.cert, req.PublicKey, r.key), r.cert)
}

func (r *root) fingerprint() string { return ca.CertificateFingerprint(r.cert.Raw) }

// byX509 is a Ceremony that leans on crypto/x509 alone.
type byX509 struct{}

func (byX509) SelfSign(ctx context.Context, log ca.Log, key crypto.Signer, p ca.Plan, by *auditv1.Evidence) (*x509.Certificate, audit.Receipt, error) {
	c := caTemplate(p.CommonName)
	c.NotBefore, c.NotAfter = p.NotBefore, p.NotAfter
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return nil, audit.Receipt{}, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, audit.Receipt{}, err
	}
	receipts, err := log.Append(ctx, []*auditv1.Entry{{Time: time.Now().UnixNano(), Event: &auditv1.Entry_AuthorityCreated{
		AuthorityCreated: &auditv1.AuthorityCreated{Kind: p.Kind, Tbs: cert.RawTBSCertificate, Evidence: by},
	}}})
	if err != nil {
		return nil, audit.Receipt{}, err
	}
	return cert, receipts[0], nil
}

func (byX509) Request(key crypto.Signer, p ca.Plan) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: p.CommonName}}, key)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), err
}

// cluster is a cluster that can be started and stopped.
type cluster struct {
	name string
	dir  string
	root *root
	keys *keystore.Memory
	// ahead is how far its clock is ahead.
	ahead atomic.Int64
	// peers are the clusters it knows.
	peers []Peer
	// manual: steps are not taken by themselves.
	manual bool
	// life is the longest of leaves; 0 = 24 h.
	life time.Duration
	// upstream signs the intermediates; nil = by hand.
	upstream ca.Upstream
	// stored has the keys instead of keys.
	stored keystore.Store
}

func newCluster(t testing.TB, name string) *cluster {
	t.Helper()
	c := &cluster{name: name, dir: shortDir(t), root: newRoot(t), keys: keystore.NewMemory()}
	r, err := Init(t.Context(), InitConfig{Folder: c.folder(), Ceremony: byX509{}})
	must(t, err)
	_, err = Install(t.Context(), InstallConfig{Folder: c.folder(), Rotation: testRotation(), Chain: c.root.intermediate(t, r.CSR, nil), RootFingerprint: c.root.fingerprint()})
	must(t, err)
	return c
}

// shortDir is a temporary folder whose path leaves room for a socket's name.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sg")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "state")
}

func (c *cluster) now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

func (c *cluster) folder() Folder {
	keys := c.stored
	if keys == nil {
		keys = c.keys
	}
	return Folder{Dir: c.dir, TrustDomain: td, Cluster: c.name, Instance: c.name + "-1", Keys: keys, Now: c.now, CheckpointInterval: 100 * time.Millisecond}
}

// testRotation is quick, with nobody to wait for.
func testRotation() Rotation {
	return Rotation{
		Policy:    rotation.Policy{LongestLeaf: 24 * time.Hour, Quorum: 1, PrepareAt: 0.5, SwitchAt: 0.67, Skew: time.Minute, ReportLife: time.Hour},
		Automatic: true, ReissueRate: 100,
	}
}

func (c *cluster) config() Config {
	policy := testRotation()
	policy.Peers, policy.Automatic = c.peers, !c.manual
	longest := cmp.Or(c.life, 24*time.Hour)
	return Config{
		Folder: c.folder(), Enrol: "127.0.0.1:0", Agents: "127.0.0.1:0", HTTP: "127.0.0.1:0",
		AdminSocket: filepath.Join(c.dir, "admin.sock"), TTL: time.Hour, MaxTTL: longest, ControlTTL: 7 * 24 * time.Hour,
		Requests: byX509{}, Rotation: policy, Upstream: c.upstream, UpstreamLife: 7 * 24 * time.Hour,
	}
}

// live is a running server.
type live struct {
	*Server
	t    testing.TB
	stop func() error
}

func (c *cluster) start(t testing.TB, change func(*Server)) *live {
	t.Helper()
	s, err := New(t.Context(), c.config())
	must(t, err)
	if change != nil {
		change(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	l := &live{Server: s, t: t}
	stopped := false
	l.stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-done
	}
	t.Cleanup(func() {
		if err := l.stop(); err != nil {
			t.Errorf("the server ended with: %v", err)
		}
	})
	return l
}

// admin is a client of the admin door.
func (l *live) admin() adminv1.AdminClient {
	l.t.Helper()
	return adminAt(l.t, l.Doors().Admin)
}

func adminAt(t testing.TB, path string) adminv1.AdminClient {
	conn, err := grpc.NewClient("passthrough:///admin", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return adminv1.NewAdminClient(conn)
}

// token makes a join token for an agent.
func (l *live) token(agent string) *adminv1.CreateJoinTokenResponse {
	l.t.Helper()
	r, err := l.admin().CreateJoinToken(l.t.Context(), &adminv1.CreateJoinTokenRequest{Agent: agent, Ttl: durationpb.New(time.Minute)})
	must(l.t, err)
	return r
}

// enrol makes an agent.
func (l *live) enrol(agent string) *doors.Member {
	l.t.Helper()
	m, err := doors.Enrol(l.t.Context(), l.token(agent).Token)
	must(l.t, err)
	return m
}

// dial connects a member to this server's agent door.
func (l *live) dial(m *doors.Member) *grpc.ClientConn {
	l.t.Helper()
	conn, err := m.Dial(l.Doors().Agents, l.control)
	must(l.t, err)
	l.t.Cleanup(func() { conn.Close() })
	return conn
}

// apply sets registrations: name=agent.
func (l *live) apply(prune bool, list ...*signetv1.Registration) *adminv1.ApplyRegistrationsResponse {
	l.t.Helper()
	r, err := l.admin().ApplyRegistrations(l.t.Context(), &adminv1.ApplyRegistrationsRequest{Registrations: list, Prune: prune})
	must(l.t, err)
	return r
}

func registration(name string, agents ...string) *signetv1.Registration {
	return &signetv1.Registration{
		Name: name, SpiffeId: "spiffe://example.org/ns/default/sa/" + name, Agents: agents, Selectors: []string{"unix:uid:1000"},
	}
}

var shown = []string{"unix:uid:1000", "unix:gid:1000"}

func newCSR(t testing.TB) []byte {
	t.Helper()
	key, err := doors.NewKey()
	must(t, err)
	csr, err := doors.CSR(key, nil)
	must(t, err)
	return csr
}

// controlLeaf is a certificate under the control CA that no door has given out.
func (l *live) controlLeaf(change func(*x509.Certificate)) *doors.Member {
	l.t.Helper()
	issuer, _ := l.issuers.Snapshot().Active(identity.ControlPlane)
	return l.minted(identity.ControlPlane, issuer.Certificate(), change)
}

// minted is a certificate made with an issuer's key behind Signet's back.
func (l *live) minted(h identity.Hierarchy, issuer *x509.Certificate, change func(*x509.Certificate)) *doors.Member {
	l.t.Helper()
	name := ControlKey
	if h == identity.Mesh {
		name = IntermediateKey
	}
	signer, err := l.config.Keys.Open(l.t.Context(), keystore.Ref{Backend: "memory", Name: name, Version: 1})
	must(l.t, err)
	key, err := doors.NewKey()
	must(l.t, err)
	c := leafTemplate(fmt.Sprintf("spiffe://example.org/signet/cluster/%s/agent/node-1", l.config.Cluster))
	if change != nil {
		change(c)
	}
	return &doors.Member{Key: key, Chain: [][]byte{sign(l.t, c, issuer, key.Public(), signer).Raw, issuer.Raw}}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t testing.TB, err error, text string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("error is %v\nwant one with %q", err, text)
	}
}

// plainKeys is a keystore of files without a passphrase, for tests that kill the process.
type plainKeys string

type plainKey struct {
	crypto.Signer
	ref keystore.Ref
}

func (k plainKey) Ref() keystore.Ref { return k.ref }
func (k plainKey) Remote() bool      { return false }

func (d plainKeys) Create(ctx context.Context, name string, alg keystore.Algorithm, _ int) (keystore.Key, error) {
	ref := keystore.Ref{Backend: "plain", Name: name, Version: 1}
	if left, err := d.Open(ctx, ref); err == nil {
		return left, nil
	}
	key, err := plainGenerate(alg)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	if err := durable.Dir(string(d)); err != nil {
		return nil, err
	}
	return plainKey{key, ref}, durable.CreateFile(filepath.Join(string(d), name), der, 0o600)
}

func (d plainKeys) Find(ctx context.Context, name string, _ keystore.Algorithm, _ int) (keystore.Ref, bool, error) {
	ref := keystore.Ref{Backend: "plain", Name: name, Version: 1}
	_, err := d.Open(ctx, ref)
	return ref, err == nil, nil
}

func (d plainKeys) Open(_ context.Context, ref keystore.Ref) (keystore.Key, error) {
	der, err := os.ReadFile(filepath.Join(string(d), ref.Name))
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	return plainKey{key.(crypto.Signer), ref}, nil
}

func (d plainKeys) Delete(_ context.Context, ref keystore.Ref) error {
	return os.Remove(filepath.Join(string(d), ref.Name))
}

func (d plainKeys) List(context.Context) ([]keystore.Ref, error) {
	files, err := os.ReadDir(string(d))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var refs []keystore.Ref
	for _, f := range files {
		if !strings.HasPrefix(f.Name(), ".") {
			refs = append(refs, keystore.Ref{Backend: "plain", Name: f.Name(), Version: 1})
		}
	}
	return refs, err
}

func plainGenerate(alg keystore.Algorithm) (crypto.Signer, error) {
	if alg == keystore.Ed25519 {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		return key, err
	}
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}
