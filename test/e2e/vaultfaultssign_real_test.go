//go:build real

package e2e

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/test/lab"
)

// forger changes certificates in answers of Vault, and remembers what it gave.
type forger struct {
	t  *testing.T
	mu sync.Mutex
	// gave are the certificates that must never be seen.
	gave []*x509.Certificate
}

// fault gives in the place of each certificate another one.
func (f *forger) fault(instead func(real *x509.Certificate) *x509.Certificate, chain ...*x509.Certificate) lab.Fault {
	return lab.Fault{Rewritten: func(body []byte) []byte {
		var answer map[string]any
		if err := json.Unmarshal(body, &answer); err != nil {
			f.t.Error(err)
			return body
		}
		data, _ := answer["data"].(map[string]any)
		text, _ := data["certificate"].(string)
		block, _ := pem.Decode([]byte(text))
		if block == nil {
			f.t.Errorf("an answer without a certificate: %s", body)
			return body
		}
		real, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			f.t.Error(err)
			return body
		}
		forged := instead(real)
		f.mu.Lock()
		f.gave = append(f.gave, forged)
		f.mu.Unlock()
		data["certificate"] = onePEM(forged)
		if len(chain) > 0 {
			var above []string
			for _, c := range chain {
				above = append(above, onePEM(c))
			}
			data["issuing_ca"], data["ca_chain"] = above[0], above
		}
		out, err := json.Marshal(answer)
		if err != nil {
			f.t.Error(err)
		}
		return out
	}}
}

func (f *forger) forgeries() []*x509.Certificate {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.gave)
}

func onePEM(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}

// foreign is a root that looks like another, with a key of its own.
type foreign struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func lookalike(t *testing.T, of *x509.Certificate) foreign {
	t.Helper()
	key := newKey(t)
	self := *of
	self.PublicKey = nil
	return foreign{certify(t, of, &self, key.Public(), key), key}
}

// certify signs a copy of a certificate for a key.
func certify(t *testing.T, of, parent *x509.Certificate, public any, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Error(err)
		return nil
	}
	id := sha256.Sum256(spki)
	c := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(id[:16]), Subject: of.Subject, NotBefore: of.NotBefore, NotAfter: of.NotAfter,
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: of.MaxPathLen, MaxPathLenZero: of.MaxPathLenZero,
		KeyUsage: of.KeyUsage, URIs: of.URIs, SubjectKeyId: of.SubjectKeyId,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, public, key)
	if err != nil {
		t.Error(err)
		return nil
	}
	made, err := x509.ParseCertificate(der)
	if err != nil {
		t.Error(err)
	}
	return made
}

// TestAForgedIntermediateIsNeverUsed changes what Vault has signed on its way: the certificate of another key, of another root,
// of a wider one, of another cluster.
func TestAForgedIntermediateIsNeverUsed(t *testing.T) {
	t.Parallel()
	e := newEstate(t, "forged")
	x := e.cluster(t, "east", how{path: "east"})
	x.serve(t)
	s := x.issuing(t)
	other := e.cluster(t, "west", how{path: "west"})
	other.serve(t)
	theirs := other.chainOf(t, "intermediate-1")[0]

	thief := newKey(t)
	away := lookalike(t, e.root.Certificate)
	f := &forger{t: t}
	// With the root's own key, which is in Vault.
	bySame := func() *x509.Certificate {
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "Signet east 00000000"}}, thief)
		if err != nil {
			t.Error(err)
		}
		a, err := e.vault.Root().Write(t.Context(), "pki-"+e.name+"/issuer/root-1/sign-intermediate", map[string]any{
			"csr": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})), "common_name": "Signet east 00000000", "organization": "Signet",
			"uri_sans": "spiffe://" + lab.TrustDomain, "max_path_length": 0, "ttl": "24h", "exclude_cn_from_sans": true,
		})
		if err != nil {
			t.Error(err)
			return e.root.Certificate
		}
		block, _ := pem.Decode([]byte(a.String("certificate")))
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Error(err)
		}
		return c
	}
	for _, forgery := range []struct {
		name    string
		instead func(*x509.Certificate) *x509.Certificate
		chain   []*x509.Certificate
	}{
		{"of another key", func(*x509.Certificate) *x509.Certificate { return bySame() }, nil},
		{"of another cluster's key", func(*x509.Certificate) *x509.Certificate { return theirs }, nil},
		{"under another root", func(real *x509.Certificate) *x509.Certificate {
			return certify(t, real, away.cert, real.PublicKey, away.key)
		}, []*x509.Certificate{away.cert}},
		{"that is the root", func(*x509.Certificate) *x509.Certificate { return e.root.Certificate }, nil},
		{"with one bit changed", func(real *x509.Certificate) *x509.Certificate {
			der := slices.Clone(real.Raw)
			der[len(der)-1] ^= 1
			c, err := x509.ParseCertificate(der)
			if err != nil {
				return certify(t, real, away.cert, real.PublicKey, away.key)
			}
			return c
		}, nil},
	} {
		t.Run(forgery.name, func(t *testing.T) {
			s.since()
			asks := "pki-" + e.name + "/issuer/*"
			signs := "pki-" + e.name + "/issuer/root-1/sign-intermediate"
			x.proxy.Set(signs, f.fault(forgery.instead, forgery.chain...))
			asked, all := x.proxy.Seen(signs), x.proxy.Seen(asks)
			began := time.Now()
			before := x.rotate(t)
			found := x.impaired(t, forgery.name, func(g check.Finding) bool { return g.Code == check.CodeUpstream })
			if !saysUntil(found.Message) || strings.Contains(found.Message, "away") {
				t.Errorf("it is said so: %+v", found)
			}
			if r := e.run(t, "check", "--config", x.Config()); !strings.Contains(r.out, check.CodeUpstream) {
				t.Error("check does not say it", r)
			}
			s.unharmed(t, "while what Vault signs is forged")
			// Each answer is a certificate that Vault keeps.
			n, took := x.proxy.Seen(signs)-asked, time.Since(began)
			if most := 3 + int(took/(2*time.Second)); n == 0 || n > most {
				t.Errorf("within %s Vault was asked %d times to sign", took, n)
			}
			if more := x.proxy.Seen(asks) - all; more > 12*n+12 {
				t.Errorf("within %s there were %d requests to issuers", took, more)
			}
			if now, err := x.signer(t.Context()); err != nil || now.ID != before {
				t.Errorf("%+v signs: %v", now, err)
			}
			x.proxy.Clear()
			x.followed(t, before)
			x.mended(t)
		})
	}
	x.proves(t, s)

	// No trace of them is anywhere.
	gave := f.forgeries()
	if len(gave) < 5 {
		t.Errorf("%d forgeries were given", len(gave))
	}
	all, err := e.authorities(t.Context(), x.Cluster)
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for id := range all {
		for _, c := range x.chainOf(t, id) {
			known[string(c.Raw)] = true
		}
	}
	if !known[string(e.root.Certificate.Raw)] {
		t.Error("the chains that are looked through hold not even the root")
	}
	for _, c := range gave {
		if known[string(c.Raw)] && !c.Equal(e.root.Certificate) {
			t.Errorf("a forgery is kept: %s", c.Subject)
		}
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(e.root.Certificate)
	for id := range all {
		for _, c := range x.chainOf(t, id) {
			between.AddCert(c)
		}
	}
	for _, c := range s.given.all() {
		if _, err := c.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Fatal(err)
		}
	}
}

// chainOf is the chain of a CA as it is kept, its own certificate first; none for one that was never signed.
func (x *holding) chainOf(t *testing.T, id string) (chain []*x509.Certificate) {
	t.Helper()
	var shown struct {
		Chain string `json:"chain"`
	}
	if err := json.Unmarshal([]byte(x.of.must(t, "ca", "show", "--config", x.Config(), id, "-o", "json")), &shown); err != nil {
		t.Fatal(err)
	}
	for rest := []byte(shown.Chain); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return chain
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
}
