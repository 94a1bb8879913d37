package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
)

var (
	exampleOrg = spiffeid.RequireTrustDomainFromString("example.org")
	// noon is when most tests happen.
	noon = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
)

// signerKey is a keystore.Key that counts, fails and lies on request.
type signerKey struct {
	crypto.Signer
	name   string
	remote bool
	signs  atomic.Int64
	fail   error
	// flip spoils each signature.
	flip bool
	// away is why it can't sign, as far as that is known.
	away error
	// gate, if there is one, holds each signature until so many wait.
	gate *sync.WaitGroup
}

func (k *signerKey) Ready() error { return k.away }

func (k *signerKey) Ref() keystore.Ref {
	return keystore.Ref{Backend: "memory", Name: k.name, Version: 1}
}
func (k *signerKey) Remote() bool { return k.remote }

func (k *signerKey) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	k.signs.Add(1)
	if k.gate != nil {
		k.gate.Done()
		k.gate.Wait()
	}
	if k.fail != nil {
		return nil, k.fail
	}
	sig, err := k.Signer.Sign(r, digest, opts)
	if k.flip {
		sig[len(sig)-1] ^= 1
	}
	return sig, err
}

// Keys are made once: RSA takes its time.
var keysByAlgorithm = sync.OnceValue(func() map[keystore.Algorithm][]crypto.Signer {
	all := map[keystore.Algorithm][]crypto.Signer{}
	must := func(s crypto.Signer, err error) crypto.Signer {
		if err != nil {
			panic(err)
		}
		return s
	}
	for range 3 {
		all[keystore.ECDSAP256] = append(all[keystore.ECDSAP256], must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)))
		all[keystore.ECDSAP384] = append(all[keystore.ECDSAP384], must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)))
		all[keystore.RSA2048] = append(all[keystore.RSA2048], must(rsa.GenerateKey(rand.Reader, 2048)))
	}
	all[keystore.RSA3072] = append(all[keystore.RSA3072], must(rsa.GenerateKey(rand.Reader, 3072)))
	return all
})

func newKey(name string, alg keystore.Algorithm, n int) *signerKey {
	return &signerKey{Signer: keysByAlgorithm()[alg][n], name: name}
}

// caTemplate is a good CA certificate; tests spoil it.
func caTemplate(cn string, pathLen int, change ...func(*x509.Certificate)) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 150))
	c := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: cn, Organization: []string{"example.org"}},
		NotBefore: noon.Add(-time.Hour), NotAfter: noon.Add(90 * 24 * time.Hour),
		BasicConstraintsValid: true, IsCA: true, MaxPathLen: pathLen, MaxPathLenZero: pathLen == 0,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:     []*url.URL{exampleOrg.ID().URL()},
	}
	for _, f := range change {
		f(c)
	}
	return c
}

// signCA signs a template; a nil parent makes it sign itself.
func signCA(t testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent = template
	}
	if k, ok := key.(*signerKey); ok {
		key = k.Signer
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// world is a root, an active mesh issuer under it, an active control CA, and those who may ask.
type world struct {
	t          testing.TB
	root       *x509.Certificate
	meshConfig IssuerConfig
	mesh       *Issuer
	control    *Issuer
	meshKey    *signerKey
	controlKey *signerKey
	log        *memoryLog
	now        time.Time
	authority  *Authority
	authorizer *identity.Authorizer
	directory  directory
}

type directory map[string]identity.Registration

func (d directory) BannedIdentity(spiffeid.ID) bool { return false }

func (d directory) Registration(name string) (identity.Registration, bool) {
	r, ok := d[name]
	return r, ok
}

func (d directory) Agent(name string) (identity.AgentRow, bool) {
	return identity.AgentRow{Name: name}, name == "node-1"
}

// memoryLog is a Log that remembers, or fails.
type memoryLog struct {
	mu      sync.Mutex
	entries []*auditv1.Entry
	batches int
	fail    error
	before  func()
}

func (l *memoryLog) Append(_ context.Context, entries []*auditv1.Entry) ([]audit.Receipt, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.before != nil {
		l.before()
	}
	if l.fail != nil {
		return nil, l.fail
	}
	l.batches++
	var receipts []audit.Receipt
	for _, e := range entries {
		receipts = append(receipts, audit.Receipt{Index: uint64(len(l.entries))})
		l.entries = append(l.entries, e)
	}
	return receipts, nil
}

type worldOption func(*worldOptions)

type worldOptions struct {
	algorithm    keystore.Algorithm
	ttl          time.Duration
	root         func(*x509.Certificate)
	intermediate func(*x509.Certificate)
	config       func(*Config)
	remote       bool
}

func newWorld(t testing.TB, options ...worldOption) *world {
	t.Helper()
	o := worldOptions{
		algorithm: keystore.ECDSAP256, ttl: time.Hour,
		root: func(*x509.Certificate) {}, intermediate: func(*x509.Certificate) {}, config: func(*Config) {},
	}
	for _, f := range options {
		f(&o)
	}
	w := &world{t: t, log: &memoryLog{}, now: noon, directory: directory{}}
	rootKey := newKey("root", o.algorithm, 0)
	w.meshKey, w.controlKey = newKey("east", o.algorithm, 1), newKey("control", o.algorithm, 2)
	w.meshKey.remote = o.remote
	w.root = signCA(t, caTemplate("Example root", 1, o.root), nil, rootKey.Public(), rootKey)
	w.meshConfig = IssuerConfig{
		Name: "east-1", Hierarchy: identity.Mesh, TrustDomain: exampleOrg, State: Active, Key: w.meshKey,
		Chain: []*x509.Certificate{signCA(t, caTemplate("Example east", 0, o.intermediate), w.root, w.meshKey.Public(), rootKey)},
		Roots: []*x509.Certificate{w.root},
	}
	var err error
	if w.mesh, err = NewIssuer(w.meshConfig); err != nil {
		t.Fatal(err)
	}
	if w.control, err = NewIssuer(IssuerConfig{
		Hierarchy: identity.ControlPlane, TrustDomain: exampleOrg, State: Active, Key: w.controlKey,
		Chain: []*x509.Certificate{signCA(t, caTemplate("Signet control CA east", 0), nil, w.controlKey.Public(), w.controlKey)},
	}); err != nil {
		t.Fatal(err)
	}
	issuers, err := NewIssuers(w.mesh, w.control)
	if err != nil {
		t.Fatal(err)
	}
	c := Config{Issuers: issuers, Log: w.log, Now: func() time.Time { return w.now }}
	o.config(&c)
	if w.authority, err = New(c); err != nil {
		t.Fatal(err)
	}
	w.register("web", "spiffe://example.org/ns/shop/sa/web", o.ttl)
	w.authorizer, err = identity.NewAuthorizer(identity.Policy{
		TrustDomain: exampleOrg, Cluster: "east", DefaultTTL: time.Hour, MaxTTL: 100 * 24 * time.Hour, ControlTTL: 7 * 24 * time.Hour,
	}, w.directory)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) register(name, id string, ttl time.Duration) {
	w.directory[name] = identity.Registration{
		Name: name, ID: spiffeid.RequireFromString(id), Agents: []string{"node-1"},
		Selectors: []identity.Selector{"unix:uid:1000"}, TTL: ttl, Revision: 7,
	}
}

var leafKey = sync.OnceValue(func() identity.PublicKey {
	k, err := identity.OwnKey(keysByAlgorithm()[keystore.ECDSAP256][0])
	if err != nil {
		panic(err)
	}
	return k
})

// grant asks for the named registration.
func (w *world) grant(registration string, key ...identity.PublicKey) *identity.Grant {
	w.t.Helper()
	key = append(key, leafKey())
	g, err := w.authorizer.Authorize(context.Background(), identity.AsAgent("node-1"), identity.WorkloadAsk{
		Registration: registration, Key: key[0], Instance: "pid 4711 (uid 1000)",
		Selectors: []identity.Selector{"unix:uid:1000", "unix:gid:1000"},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return g
}

// serverGrant asks for the server's own control certificate.
func (w *world) serverGrant(key ...identity.PublicKey) *identity.Grant {
	w.t.Helper()
	key = append(key, leafKey())
	g, err := w.authorizer.Authorize(context.Background(), identity.AsServer("east-1"), identity.ControlAsk{Key: key[0]})
	if err != nil {
		w.t.Fatal(err)
	}
	return g
}

// issue issues one and wants it to succeed.
func (w *world) issue(g *identity.Grant) (*Leaf, *x509.Certificate) {
	w.t.Helper()
	r := w.authority.Issue(context.Background(), []*identity.Grant{g})[0]
	if r.Err != nil {
		w.t.Fatal(r.Err)
	}
	cert, err := x509.ParseCertificate(r.Leaf.Chain[0])
	if err != nil {
		w.t.Fatal(err)
	}
	return r.Leaf, cert
}

// refused issues one and wants it to fail for the reason.
func (w *world) refused(g *identity.Grant, want Reason) string {
	w.t.Helper()
	r := w.authority.Issue(context.Background(), []*identity.Grant{g})[0]
	var e *Error
	if r.Leaf != nil || !errors.As(r.Err, &e) || e.Reason != want {
		w.t.Fatalf("got leaf %v, error %v; want a refusal for %q", r.Leaf != nil, r.Err, want)
	}
	return r.Err.Error()
}
