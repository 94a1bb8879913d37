package trust

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	alpha = spiffeid.RequireTrustDomainFromString("alpha.test")
	beta  = spiffeid.RequireTrustDomainFromString("beta.test")
)

func newRoot(t *testing.T, name string, ca bool) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<32, 0), IsCA: ca, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func bundle(t *testing.T, td spiffeid.TrustDomain, seq uint64, roots ...*x509.Certificate) Bundle {
	t.Helper()
	b, err := NewBundle(td, seq, roots)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestEqualSetsOfRootsHaveEqualBytesInAnyOrder(t *testing.T) {
	a, b := newRoot(t, "a", true), newRoot(t, "b", true)
	x, y := bundle(t, alpha, 1, a, b), bundle(t, alpha, 7, b, a, b)
	if x.Digest() != y.Digest() || !bytes.Equal(x.PEM(), y.PEM()) {
		t.Error("order or repetition of roots changes the bundle")
	}
	if one := bundle(t, alpha, 1, a); one.Digest() == x.Digest() {
		t.Error("different roots have one digest")
	}
	if len(y.Roots()) != 2 {
		t.Errorf("%d roots, want 2", len(y.Roots()))
	}
	if block, rest := pem.Decode(y.PEM()); block == nil || len(rest) == 0 {
		t.Error("PEM does not hold two certificates")
	}
}

func TestABundleOfNothingOrOfLeavesIsRefused(t *testing.T) {
	root, leaf := newRoot(t, "root", true), newRoot(t, "leaf", false)
	for name, offer := range map[string]func() (Bundle, error){
		"no roots":        func() (Bundle, error) { return NewBundle(alpha, 1, nil) },
		"a leaf":          func() (Bundle, error) { return NewBundle(alpha, 1, []*x509.Certificate{root, leaf}) },
		"sequence 0":      func() (Bundle, error) { return NewBundle(alpha, 0, []*x509.Certificate{root}) },
		"no trust domain": func() (Bundle, error) { return NewBundle(spiffeid.TrustDomain{}, 1, []*x509.Certificate{root}) },
		"too many roots":  func() (Bundle, error) { return NewBundle(alpha, 1, make65(root)) },
	} {
		if b, err := offer(); err == nil || !b.IsZero() {
			t.Errorf("%s: accepted (%v)", name, err)
		}
	}
}

func make65(root *x509.Certificate) []*x509.Certificate {
	list := make([]*x509.Certificate, MaxRoots+1)
	for i := range list {
		list[i] = root
	}
	return list
}

func TestTrustIsNeverTurnedBack(t *testing.T) {
	a, b := newRoot(t, "a", true), newRoot(t, "b", true)
	var s Bundles
	if err := s.Set(bundle(t, alpha, 5, a)); err != nil {
		t.Fatal(err)
	}
	for name, offered := range map[string]Bundle{
		"an older sequence":               bundle(t, alpha, 4, b),
		"the same sequence, other roots":  bundle(t, alpha, 5, b),
		"an older sequence, equal roots":  bundle(t, alpha, 4, a),
		"the same sequence, a wider set":  bundle(t, alpha, 5, a, b),
		"sequence 1 after a lost counter": bundle(t, alpha, 1, a, b),
	} {
		if err := s.Set(offered); !errors.Is(err, ErrRollback) {
			t.Errorf("%s: %v, want ErrRollback", name, err)
		}
	}
	if got, _ := s.Get(alpha); got.Sequence() != 5 || got.Digest() != bundle(t, alpha, 5, a).Digest() {
		t.Error("a refused bundle has changed what is believed")
	}
	if err := s.Set(bundle(t, alpha, 6, b)); err != nil {
		t.Errorf("a newer bundle: %v", err)
	}
}

func TestTrustDomainsAreKeptApart(t *testing.T) {
	a, b := newRoot(t, "a", true), newRoot(t, "b", true)
	var s Bundles
	for _, x := range []Bundle{bundle(t, alpha, 1, a), bundle(t, beta, 9, b)} {
		if err := s.Set(x); err != nil {
			t.Fatal(err)
		}
	}
	if got, ok := s.Get(alpha); !ok || got.Digest() != bundle(t, alpha, 1, a).Digest() {
		t.Error("alpha does not hold its own root alone")
	}
}

func TestTheBellRingsAtChangesOnly(t *testing.T) {
	a, b := newRoot(t, "a", true), newRoot(t, "b", true)
	var s Bundles
	rung := func(c <-chan struct{}) bool {
		select {
		case <-c:
			return true
		default:
			return false
		}
	}
	first := s.Changed()
	if err := s.Set(bundle(t, alpha, 1, a)); err != nil {
		t.Fatal(err)
	}
	if !rung(first) {
		t.Error("no bell at the first bundle")
	}
	second := s.Changed()
	if err := s.Set(bundle(t, alpha, 1, a)); err != nil {
		t.Fatal(err)
	}
	if rung(second) {
		t.Error("the bell rings though nothing changed")
	}
	if err := s.Set(bundle(t, alpha, 2, b)); err != nil || !rung(second) {
		t.Errorf("no bell at a change (%v)", err)
	}
}

func TestReadersAndWritersMayBeMany(t *testing.T) {
	roots := []*x509.Certificate{newRoot(t, "a", true), newRoot(t, "b", true)}
	var s Bundles
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for seq := uint64(1); seq < 50; seq++ {
				_ = s.Set(bundle(t, alpha, seq, roots[i%2])) // refusals are expected
				if b, ok := s.Get(alpha); ok && b.IsZero() {
					t.Error("an empty bundle is believed")
				}
				s.Changed()
			}
		})
	}
	wg.Wait()
	if b, _ := s.Get(alpha); b.Sequence() != 49 {
		t.Errorf("sequence %d, want the highest, 49", b.Sequence())
	}
}
