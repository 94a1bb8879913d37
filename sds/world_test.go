package sds

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"maps"
	"math/big"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-ca/signet/trust"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	exampleTD = spiffeid.RequireTrustDomainFromString("example.org")
	web       = spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/web")
	api       = spiffeid.RequireFromString("spiffe://example.org/ns/shop/sa/api")
)

// root is a CA for tests.
type root struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newRoot(t testing.TB, name string) *root {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: newSerial(), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * 365 * 24 * time.Hour),
		KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{exampleTD.ID().URL()},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))
	return &root{cert: must(x509.ParseCertificate(der)), key: key}
}

func newSerial() *big.Int { return must(rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))) }

// leaf is a request for an SVID; zero fields are usual.
type leaf struct {
	id                  spiffeid.ID
	notBefore, notAfter time.Time
	key                 crypto.Signer
}

func (r *root) issue(t testing.TB, l leaf) *SVID {
	t.Helper()
	if l.key == nil {
		l.key = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	}
	if l.notBefore.IsZero() {
		l.notBefore = time.Now().Add(-time.Minute)
	}
	if l.notAfter.IsZero() {
		l.notAfter = time.Now().Add(time.Hour)
	}
	template := &x509.Certificate{
		SerialNumber: newSerial(), NotBefore: l.notBefore, NotAfter: l.notAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, URIs: []*url.URL{l.id.URL()},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, r.cert, l.key.Public(), r.key))
	chain := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return &SVID{
		ID: l.id, CertificateChain: chain,
		PrivateKey: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(l.key))}),
		NotBefore:  l.notBefore, NotAfter: l.notAfter, Serial: template.SerialNumber.Text(16), Digest: sha256.Sum256(chain),
	}
}

// world is Workloads where every caller sees the same, and tests say what.
type world struct {
	mu       sync.Mutex
	td       spiffeid.TrustDomain
	ids      []spiffeid.ID
	svids    map[spiffeid.ID]*SVID
	bundles  map[spiffeid.TrustDomain]trust.Bundle
	changed  chan struct{}
	err      error
	refuse   error
	attested []net.Conn
	open     int
	asked    map[spiffeid.ID]int
	refused  map[spiffeid.ID]error
}

// newWorld has one root, and one identity with an SVID.
func newWorld(t testing.TB) (*world, *root) {
	t.Helper()
	r := newRoot(t, "root A")
	w := &world{
		td: exampleTD, ids: []spiffeid.ID{web}, svids: map[spiffeid.ID]*SVID{web: r.issue(t, leaf{id: web})},
		bundles: map[spiffeid.TrustDomain]trust.Bundle{exampleTD: bundleOf(exampleTD, 1, r)},
		changed: make(chan struct{}), asked: map[spiffeid.ID]int{},
	}
	return w, r
}

func bundleOf(td spiffeid.TrustDomain, sequence uint64, roots ...*root) trust.Bundle {
	var certs []*x509.Certificate
	for _, r := range roots {
		certs = append(certs, r.cert)
	}
	return must(trust.NewBundle(td, sequence, certs))
}

// change alters the world and rings.
func (w *world) change(f func(w *world)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(w)
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *world) setSVID(s *SVID) { w.change(func(w *world) { w.svids[s.ID] = s }) }

func (w *world) setBundle(b trust.Bundle) {
	w.change(func(w *world) { w.bundles[b.TrustDomain()] = b })
}

func (w *world) Attest(_ context.Context, conn net.Conn) (View, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.attested = append(w.attested, conn)
	if w.refuse != nil {
		return nil, w.refuse
	}
	w.open++
	return &seen{world: w}, nil
}

type seen struct {
	*world
	once sync.Once
}

func (w *world) Identities() []spiffeid.ID {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.ids)
}

func (w *world) SVID(id spiffeid.ID) *SVID {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked[id]++
	return w.svids[id]
}

func (w *world) Refusal(id spiffeid.ID) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.refused[id]
}

func (w *world) TrustDomain() spiffeid.TrustDomain { return w.td }

func (w *world) TrustDomains() []spiffeid.TrustDomain {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Collect(maps.Keys(w.bundles))
}

func (w *world) Bundle(td spiffeid.TrustDomain) (trust.Bundle, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	b, ok := w.bundles[td]
	return b, ok
}

func (w *world) Changed() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

func (w *world) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

func (v *seen) Close() {
	v.once.Do(func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.open--
	})
}

var errNoIdentity = status.Error(codes.PermissionDenied, "no identity is registered for this process")

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
