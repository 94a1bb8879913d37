package ceremony

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if dir, err := oneFolder(); err == nil {
			os.RemoveAll(dir)
		}
		os.Exit(code)
	}))
}

var (
	exampleOrg = spiffeid.RequireTrustDomainFromString("example.org")
	by         = &auditv1.Evidence{Caller: "uid:1000", Door: "ceremony"}
)

// memoryLog keeps what is appended, or fails.
type memoryLog struct {
	entries []*auditv1.Entry
	fail    error
}

func (l *memoryLog) Append(_ context.Context, entries []*auditv1.Entry) ([]audit.Receipt, error) {
	if l.fail != nil {
		return nil, l.fail
	}
	var out []audit.Receipt
	for _, e := range entries {
		out = append(out, audit.Receipt{Index: uint64(len(l.entries))})
		l.entries = append(l.entries, proto.Clone(e).(*auditv1.Entry))
	}
	return out, nil
}

// watched counts what a key signs and can be made to fail.
type watched struct {
	crypto.Signer
	signed atomic.Int32
	before func()
	fail   error
}

func (k *watched) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if k.before != nil {
		k.before()
	}
	if k.fail != nil {
		return nil, k.fail
	}
	k.signed.Add(1)
	return k.Signer.Sign(r, digest, opts)
}

func newKey(t testing.TB, alg keystore.Algorithm) keystore.Key {
	t.Helper()
	k, err := keystore.NewMemory().Create(t.Context(), "key", alg, 0)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// must is for steps that are not what a test is about.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

type testRoot struct {
	key  keystore.Key
	cert *x509.Certificate
	log  *memoryLog
}

func newRoot(t testing.TB, alg keystore.Algorithm, edit ...func(*ca.Plan)) testRoot {
	t.Helper()
	r := testRoot{key: newKey(t, alg), log: &memoryLog{}}
	plan := must(ca.NewRootPlan(exampleOrg, r.key.Public(), time.Now(), 0))
	for _, e := range edit {
		e(&plan)
	}
	cert, _, err := SelfSign(t.Context(), r.log, r.key, plan, by)
	if err != nil {
		t.Fatal(err)
	}
	r.cert = cert
	return r
}

func eastPlan(key crypto.Signer, life time.Duration) ca.Plan {
	return must(ca.NewIntermediatePlan(exampleOrg, "east", key.Public(), time.Now(), life))
}

// sign makes an intermediate for east, or says why not.
func (r testRoot) sign(t testing.TB, plan ca.Plan, request []byte) (*x509.Certificate, error) {
	t.Helper()
	p, err := Prepare(plan, r.cert, request)
	if err != nil {
		return nil, err
	}
	cert, _, err := p.Sign(t.Context(), r.log, r.key, by)
	return cert, err
}

// leaf makes a workload's certificate under an issuer, or with CA:TRUE what an issuer must not be able to make.
func leaf(t testing.TB, issuer *x509.Certificate, key crypto.Signer, isCA bool) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	own := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	id := must(url.Parse("spiffe://example.org/ns/default/sa/frontend"))
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: []*url.URL{id},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if isCA {
		tmpl.IsCA, tmpl.BasicConstraintsValid, tmpl.KeyUsage, tmpl.ExtKeyUsage = true, true, x509.KeyUsageCertSign, nil
		tmpl.Subject = pkix.Name{CommonName: "rogue"}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, issuer, own.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return must(x509.ParseCertificate(der)), own
}

// openssl verifies a leaf through the chain, strictly; it is part of every system this is built on.
func openssl(t *testing.T, root *x509.Certificate, chain []*x509.Certificate, leaf *x509.Certificate) error {
	t.Helper()
	dir := t.TempDir()
	for name, certs := range map[string][]*x509.Certificate{"root": {root}, "chain": chain, "leaf": {leaf}} {
		if err := os.WriteFile(filepath.Join(dir, name), ca.EncodeChain(certs...), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	args := []string{"verify", "-x509_strict", "-CAfile", filepath.Join(dir, "root")}
	if len(chain) > 0 {
		args = append(args, "-untrusted", filepath.Join(dir, "chain"))
	}
	out, err := exec.Command("openssl", append(args, filepath.Join(dir, "leaf"))...).CombinedOutput()
	if err != nil {
		if ee := (*exec.ExitError)(nil); !errors.As(err, &ee) {
			t.Fatal(err)
		}
		return errors.New(string(out))
	}
	return nil
}

func TestEveryAlgorithmMakesChainsThatOpenSSLAndSPIFFEAccept(t *testing.T) {
	for _, alg := range []keystore.Algorithm{keystore.ECDSAP256, keystore.ECDSAP384, keystore.RSA2048} {
		t.Run(string(alg), func(t *testing.T) {
			t.Parallel()
			root := newRoot(t, alg)
			key := newKey(t, alg)
			plan := eastPlan(key, 0)
			cert, err := root.sign(t, plan, must(Request(key, plan)))
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range []*x509.Certificate{root.cert, cert} {
				if err := lintCertificate(c.Raw); err != nil {
					t.Error(err)
				}
				if got := c.URIs[0].String(); got != "spiffe://example.org" || len(c.URIs) != 1 {
					t.Errorf("%s carries %v", c.Subject, c.URIs)
				}
			}
			svid, _ := leaf(t, cert, key, false)
			if err := openssl(t, root.cert, []*x509.Certificate{cert}, svid); err != nil {
				t.Error(err)
			}
			id, _, err := x509svid.Verify([]*x509.Certificate{svid, cert}, x509bundle.FromX509Authorities(exampleOrg, []*x509.Certificate{root.cert}))
			if err != nil || id.String() != "spiffe://example.org/ns/default/sa/frontend" {
				t.Errorf("go-spiffe: %v, %v", id, err)
			}
		})
	}
}

func TestAControlCACertifiesAndStandsAlone(t *testing.T) {
	key, log := newKey(t, keystore.ECDSAP256), &memoryLog{}
	plan := must(ca.NewControlPlan(exampleOrg, "east", key.Public(), time.Now(), 0))
	cert, _, err := SelfSign(t.Context(), log, key, plan, by)
	if err != nil {
		t.Fatal(err)
	}
	if cert.Subject.CommonName != "Signet control CA east" || cert.MaxPathLen != 0 || !cert.MaxPathLenZero {
		t.Errorf("control CA is %s with path length %d", cert.Subject, cert.MaxPathLen)
	}
	control, _ := leaf(t, cert, key, false)
	if err := openssl(t, cert, nil, control); err != nil {
		t.Error(err)
	}
	if kind := log.entries[0].GetAuthorityCreated().GetKind(); kind != ca.KindControl {
		t.Errorf("logged as %q", kind)
	}
}

func TestAnIntermediateCanNotMakeACA(t *testing.T) {
	root, key := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	cert := must(root.sign(t, plan, must(Request(key, plan))))
	rogue, rogueKey := leaf(t, cert, key, true)
	below, _ := leaf(t, rogue, rogueKey, false)
	err := openssl(t, root.cert, []*x509.Certificate{cert, rogue}, below)
	if err == nil || !strings.Contains(err.Error(), "path length") {
		t.Errorf("openssl says %v", err)
	}
	pool, between := x509.NewCertPool(), x509.NewCertPool()
	pool.AddCert(root.cert)
	between.AddCert(cert)
	between.AddCert(rogue)
	if _, err := below.Verify(x509.VerifyOptions{Roots: pool, Intermediates: between}); err == nil {
		t.Error("crypto/x509 accepts a CA below the intermediate")
	}
}

func TestTheLogHoldsTheExactBytesBeforeTheKeySigns(t *testing.T) {
	root, key := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	p := must(Prepare(plan, root.cert, must(Request(key, plan))))
	logged := len(root.log.entries)
	signer := &watched{Signer: root.key, before: func() {
		if len(root.log.entries) != logged+1 {
			t.Error("the key was used before the entry was durable")
		}
	}}
	cert, receipt, err := p.Sign(t.Context(), root.log, signer, by)
	if err != nil {
		t.Fatal(err)
	}
	entry := root.log.entries[receipt.Index]
	if got := entry.GetAuthorityCreated(); !bytes.Equal(got.GetTbs(), cert.RawTBSCertificate) || got.GetKind() != ca.KindIntermediate || !proto.Equal(got.GetEvidence(), by) {
		t.Errorf("logged %v", got)
	}
	if entry.GetTime() == 0 {
		t.Error("the entry has no time")
	}
	if n := signer.signed.Load(); n != 1 {
		t.Errorf("the key was used %d times", n)
	}
}

func TestWithoutALogEntryNothingIsSigned(t *testing.T) {
	root, key := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	p := must(Prepare(plan, root.cert, must(Request(key, plan))))
	signer := &watched{Signer: root.key}
	_, _, err := p.Sign(t.Context(), &memoryLog{fail: errors.New("disk full")}, signer, by)
	if err == nil || !strings.Contains(err.Error(), "could not be logged, so it was not signed: disk full") {
		t.Errorf("got %v", err)
	}
	if signer.signed.Load() != 0 {
		t.Error("the key was used")
	}
}

func TestWhatIsPreparedIsSignedOnce(t *testing.T) {
	root, key := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	p := must(Prepare(plan, root.cert, must(Request(key, plan))))
	if _, _, err := p.Sign(t.Context(), root.log, root.key, by); err != nil {
		t.Fatal(err)
	}
	if _, _, err := p.Sign(t.Context(), root.log, root.key, by); err == nil || !strings.Contains(err.Error(), "signed already") {
		t.Errorf("got %v", err)
	}
}

func TestALentKeySignsTheLoggedBytesOnceAndNothingElse(t *testing.T) {
	key := &watched{Signer: newKey(t, keystore.ECDSAP256)}
	lent := &lentKey{key: key, tbs: []byte("logged")}
	digest := func(s string) []byte {
		h := crypto.SHA256.New()
		h.Write([]byte(s))
		return h.Sum(nil)
	}
	if _, err := lent.Sign(rand.Reader, digest("other"), crypto.SHA256); err == nil {
		t.Error("signed something else")
	}
	if _, err := lent.Sign(rand.Reader, []byte("logged"), crypto.Hash(0)); err == nil {
		t.Error("signed without a digest")
	}
	if _, err := lent.Sign(rand.Reader, digest("logged"), crypto.SHA256); err != nil {
		t.Error(err)
	}
	if _, err := lent.Sign(rand.Reader, digest("logged"), crypto.SHA256); err == nil {
		t.Error("signed a second time")
	}
	if n := key.signed.Load(); n != 1 {
		t.Errorf("the key was used %d times", n)
	}
}

func TestAnotherKeyThanTheIssuersIsNotUsed(t *testing.T) {
	root, key, other := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	p := must(Prepare(plan, root.cert, must(Request(key, plan))))
	logged := len(root.log.entries)
	if _, _, err := p.Sign(t.Context(), root.log, other, by); err == nil || !strings.Contains(err.Error(), "does not match the certificate") {
		t.Errorf("got %v", err)
	}
	if len(root.log.entries) != logged {
		t.Error("an entry was written for a key that can't sign")
	}
}

func TestTheRootsEndClampsAndADyingRootRefuses(t *testing.T) {
	key := newKey(t, keystore.ECDSAP256)
	start := time.Now()
	root := newRoot(t, keystore.ECDSAP256, func(p *ca.Plan) {
		p.NotAfter = start.Add(30 * 24 * time.Hour).UTC().Truncate(time.Second)
	})
	at := func(d time.Duration, life time.Duration) (ca.Plan, error) {
		plan := must(ca.NewIntermediatePlan(exampleOrg, "east", key.Public(), start.Add(d), life))
		plan.Now = func() time.Time { return start.Add(d) }
		p, err := Prepare(plan, root.cert, must(Request(key, plan)))
		if err != nil {
			return ca.Plan{}, err
		}
		return p.Plan(), nil
	}
	if p, err := at(0, 0); err != nil || !p.NotAfter.Equal(root.cert.NotAfter) {
		t.Errorf("90 days under a root of 30 give %v, %v", p.NotAfter, err)
	}
	if p, err := at(0, 24*time.Hour); err != nil || !p.NotAfter.Before(root.cert.NotAfter) {
		t.Errorf("1 day under a root of 30 gives %v, %v", p.NotAfter, err)
	}
	const last = 30*24*time.Hour - 12*time.Hour
	if _, err := at(last, 0); err == nil || !strings.Contains(err.Error(), "shorter than the least useful 24h") {
		t.Errorf("12 hours before its end: %v", err)
	}
	if _, err := at(last, time.Hour); err != nil {
		t.Errorf("one hour, asked for as such, 12 hours before its end: %v", err)
	}
	if _, err := at(31*24*time.Hour, 0); err == nil || !strings.Contains(err.Error(), "expired on") {
		t.Errorf("after its end: %v", err)
	}
	if _, err := at(-time.Hour, 0); err == nil || !strings.Contains(err.Error(), "set the clock right") {
		t.Errorf("before its begin: %v", err)
	}
}

func TestARequestThatClaimsSomethingElseIsRefused(t *testing.T) {
	root, key := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	uri := func(s string) []*url.URL { return []*url.URL{must(url.Parse(s))} }
	subject := subjectOf(plan).Name()
	ext := func(oid []int, der ...byte) []pkix.Extension { return []pkix.Extension{{Id: oid, Value: der}} }
	for name, c := range map[string]struct {
		tmpl x509.CertificateRequest
		want string
	}{
		"nothing":             {x509.CertificateRequest{}, ""},
		"the plan":            {x509.CertificateRequest{Subject: subject, URIs: uri("spiffe://example.org"), ExtraExtensions: ext(oidBasicConstraints, 0x30, 6, 1, 1, 0xff, 2, 1, 0)}, ""},
		"another cluster":     {x509.CertificateRequest{Subject: subjectOf(must(ca.NewIntermediatePlan(exampleOrg, "west", key.Public(), time.Now(), 0))).Name()}, "request of another cluster"},
		"another domain":      {x509.CertificateRequest{URIs: uri("spiffe://example.com")}, "is for trust domain"},
		"a workload's name":   {x509.CertificateRequest{URIs: uri("spiffe://example.org/ns/a/sa/b")}, "trust domain"},
		"a second name":       {x509.CertificateRequest{URIs: append(uri("spiffe://example.org"), uri("spiffe://example.org")...)}, "other names"},
		"a DNS name":          {x509.CertificateRequest{DNSNames: []string{"www.example.org"}}, "other names"},
		"no CA":               {x509.CertificateRequest{ExtraExtensions: ext(oidBasicConstraints, 0x30, 0)}, "CA:TRUE"},
		"garbled CA":          {x509.CertificateRequest{ExtraExtensions: ext(oidBasicConstraints, 0x30, 3, 1, 1)}, "CA:TRUE"},
		"path length 1":       {x509.CertificateRequest{ExtraExtensions: ext(oidBasicConstraints, 0x30, 6, 1, 1, 0xff, 2, 1, 1)}, "path length 1"},
		"no path length":      {x509.CertificateRequest{ExtraExtensions: ext(oidBasicConstraints, 0x30, 3, 1, 1, 0xff)}, "path length -1"},
		"a foreign extension": {x509.CertificateRequest{ExtraExtensions: ext([]int{2, 5, 29, 37}, 0x30, 0)}, "2.5.29.37"},
	} {
		t.Run(name, func(t *testing.T) {
			der := must(x509.CreateCertificateRequest(rand.Reader, &c.tmpl, key))
			cert, err := root.sign(t, plan, pemRequest(der))
			switch {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want == "":
				if err := plan.Check([]*x509.Certificate{cert}, []*x509.Certificate{root.cert}); err != nil {
					t.Error(err)
				}
			case err == nil || !strings.Contains(err.Error(), c.want):
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestARequestThatIsNoneIsOneClearSentence(t *testing.T) {
	key := newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	good := must(Request(key, plan))
	block, _ := pem.Decode(good)
	forged := bytes.Clone(block.Bytes)
	forged[len(forged)-1] ^= 1
	odd := must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))))
	for name, c := range map[string]struct {
		text []byte
		want string
	}{
		"empty":           {nil, "is not PEM"},
		"garbage":         {[]byte("garbage"), "is not PEM"},
		"10 MiB":          {bytes.Repeat([]byte("x"), 10<<20), "10485760 bytes: at most 16384"},
		"a certificate":   {[]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), `holds a "CERTIFICATE"`},
		"garbage in PEM":  {pemRequest([]byte("garbage")), "is damaged"},
		"two":             {append(bytes.Clone(good), good...), "give one request"},
		"not its key":     {pemRequest(forged), "not signed by its own key"},
		"unsupported key": {pemRequest(odd), "P-521; use P-256 or P-384"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Prepare(plan, newRoot(t, keystore.ECDSAP256).cert, c.text)
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 500 {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func FuzzParseRequest(f *testing.F) {
	key := newKey(f, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	f.Add(must(Request(key, plan)))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----"))
	f.Fuzz(func(t *testing.T, text []byte) {
		req, err := ParseRequest(text)
		if (req == nil) == (err == nil) {
			t.Fatal("neither a request nor an error, or both")
		}
		if err == nil {
			if identity.AllowedKey(req.PublicKey) != nil || req.CheckSignature() != nil {
				t.Error("a request passed that must not")
			}
			_ = checkClaims(req, plan)
		}
	})
}

func TestAnUpstreamAtHandAnswersAtOnce(t *testing.T) {
	root, key := newRoot(t, keystore.ECDSAP256), newKey(t, keystore.ECDSAP256)
	plan := eastPlan(key, 0)
	if _, err := NewAtHand(AtHandConfig{Root: root.cert, Key: key, Log: root.log, By: by}); err == nil || !strings.Contains(err.Error(), "does not match") {
		t.Errorf("another key: %v", err)
	}
	up, err := NewAtHand(AtHandConfig{Root: root.cert, Key: root.key, Log: root.log, By: by})
	if err != nil {
		t.Fatal(err)
	}
	got, err := up.Sign(t.Context(), plan, must(Request(key, plan)))
	if err != nil || got.Pending != "" {
		t.Fatalf("%+v, %v", got, err)
	}
	if err := plan.Check(got.Chain, got.Roots); err != nil {
		t.Error(err)
	}
}

// Only this package links cfssl and zlint: what serves and what runs on nodes gets by without.
func TestNothingThatRunsForLongLinksCFSSL(t *testing.T) {
	args := []string{"list", "-deps"}
	for _, p := range []string{"agent", "sds", "ca", "identity", "server", "rotation", "trust", "keystore", "audit"} {
		args = append(args, "github.com/signet-ca/signet/"+p)
	}
	out, err := exec.Command("go", args...).Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	if !strings.Contains(string(out), "github.com/signet-ca/signet/identity\n") {
		t.Fatal("go list does not list what it was asked for")
	}
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "cloudflare/cfssl") || strings.Contains(line, "zmap/") {
			t.Errorf("linked: %s", line)
		}
	}
}
