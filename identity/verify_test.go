package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// verifyWorld is a root and an intermediate that signs whatever a test asks for.
type verifyWorld struct {
	root, inter *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newVerifyWorld(t testing.TB) *verifyWorld {
	t.Helper()
	w := &verifyWorld{key: verifyKey(t)}
	rootKey := verifyKey(t)
	ca := func(name string, parent *x509.Certificate, pub *ecdsa.PublicKey) *x509.Certificate {
		c := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(10, 0, 0), KeyUsage: x509.KeyUsageCertSign,
		}
		if parent == nil {
			parent = c
		}
		return verifySign(t, c, parent, pub, rootKey)
	}
	w.root = ca("root", nil, &rootKey.PublicKey)
	w.inter = ca("intermediate", w.root, &w.key.PublicKey)
	return w
}

func (w *verifyWorld) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(w.root)
	return p
}

// leaf makes a good chain of two, but for the changes.
func (w *verifyWorld) leaf(t testing.TB, id spiffeid.ID, from, to time.Time, change ...func(*x509.Certificate)) []*x509.Certificate {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: from, NotAfter: to, URIs: []*url.URL{id.URL()}, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, f := range change {
		f(c)
	}
	return []*x509.Certificate{verifySign(t, c, w.inter, &verifyKey(t).PublicKey, w.key), w.inter}
}

func verifyKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func verifySign(t testing.TB, c, parent *x509.Certificate, pub *ecdsa.PublicKey, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestEachRuleOfAnSVIDIsChecked breaks one rule of X509-SVID at a time; the error must name it.
func TestEachRuleOfAnSVIDIsChecked(t *testing.T) {
	w := newVerifyWorld(t)
	now := time.Now()
	id := spiffeid.RequireFromString("spiffe://example.org/ns/a/sa/b")
	make := func(change ...func(*x509.Certificate)) []*x509.Certificate {
		return w.leaf(t, id, now.Add(-time.Minute), now.Add(time.Hour), change...)
	}
	pool := w.pool()
	good := make()
	if got, err := VerifySVID(good, pool, now); err != nil || got != id {
		t.Fatalf("a good chain: %s, %v", got, err)
	}
	if _, _, err := x509svid.Verify(good, x509bundle.FromX509Authorities(id.TrustDomain(), []*x509.Certificate{w.root})); err != nil {
		t.Fatalf("the oracle differs on a good chain: %v", err)
	}
	usage := func(critical bool, bits byte) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			v, err := asn1.Marshal(asn1.BitString{Bytes: []byte{bits}, BitLength: 8})
			if err != nil {
				t.Fatal(err)
			}
			c.KeyUsage = 0
			c.ExtraExtensions = []pkix.Extension{{Id: oidKeyUsage, Critical: critical, Value: v}}
		}
	}
	for name, c := range map[string]struct {
		chain []*x509.Certificate
		want  string
	}{
		"two names":          {make(func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) }), "§2"},
		"no name":            {make(func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"x"} }), "§2"},
		"no path":            {make(func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example.org"}} }), "§3.1"},
		"another scheme":     {make(func(c *x509.Certificate) { c.URIs[0] = &url.URL{Scheme: "https", Host: "example.org", Path: "/x"} }), "scheme"},
		"a CA":               {make(func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), "§5.2"},
		"no key usage":       {make(func(c *x509.Certificate) { c.KeyUsage = 0 }), "§4.3"},
		"usage not critical": {make(usage(false, 0x80)), "§4.3"},
		"no signing":         {make(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), "digitalSignature"},
		"may sign CRLs":      {make(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }), "§5.2"},
		"clients only":       {make(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }), "§4.4"},
		"expired":            {make(func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) }), "expired at"},
		"not yet":            {make(func(c *x509.Certificate) { c.NotBefore = now.Add(time.Minute) }), "valid from"},
		"no intermediate":    {good[:1], "§5.1"},
		"order":              {[]*x509.Certificate{good[0], w.root, good[1]}, "wrong order"},
		"nothing":            {nil, "0 certificates"},
	} {
		if _, err := VerifySVID(c.chain, pool, now); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want an error with %q", name, err, c.want)
		}
	}
	if _, err := VerifySVID(make(func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) }), pool, now); !strings.Contains(err.Error(), now.UTC().Format(time.RFC3339)) {
		t.Errorf("an expiry lacks one of its two times: %v", err)
	}
	if _, err := VerifySVID(good, newVerifyWorld(t).pool(), now); err == nil || !strings.Contains(err.Error(), "§5.1") {
		t.Errorf("under another root: %v", err)
	}
	// The intermediate has run out before the leaf.
	if _, err := VerifySVID(good, pool, now.AddDate(11, 0, 0)); err == nil {
		t.Error("eleven years later the chain is still valid")
	}
}

// What passes here must pass go-spiffe too: we are stricter, never laxer.
func FuzzVerifySVIDIsNeverLaxerThanTheOracle(f *testing.F) {
	w := newVerifyWorld(f)
	now := time.Now()
	id := spiffeid.RequireFromString("spiffe://example.org/ns/a/sa/b")
	good := w.leaf(f, id, now.Add(-time.Minute), now.Add(time.Hour))
	f.Add(good[0].Raw, good[1].Raw)
	f.Add(good[1].Raw, good[0].Raw)
	f.Add([]byte{0x30}, []byte{})
	bundle := x509bundle.FromX509Authorities(id.TrustDomain(), []*x509.Certificate{w.root})
	pool := w.pool()
	f.Fuzz(func(t *testing.T, leaf, inter []byte) {
		var chain []*x509.Certificate
		for _, der := range [][]byte{leaf, inter} {
			if c, err := x509.ParseCertificate(der); err == nil {
				chain = append(chain, c)
			}
		}
		if _, err := VerifySVID(chain, pool, now); err != nil {
			return
		}
		if _, _, err := x509svid.Verify(chain, bundle, x509svid.WithTime(now)); err != nil {
			t.Fatalf("passed here, refused by go-spiffe: %v", err)
		}
	})
}
