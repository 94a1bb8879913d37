package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/keystore"
)

var (
	planDomain = spiffeid.RequireTrustDomainFromString("example.org")
	planStart  = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
)

// plannedCA is a CA certificate made by crypto/x509, and its key.
type plannedCA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newPlanKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

var planSerial = big.NewInt(1 << 40)

// makeCA makes what the plan says, edited, signed by above (nil = itself).
func makeCA(t testing.TB, p Plan, key crypto.Signer, above *plannedCA, edit ...func(*x509.Certificate)) plannedCA {
	t.Helper()
	planSerial = new(big.Int).Add(planSerial, big.NewInt(1))
	tmpl := &x509.Certificate{
		SerialNumber: planSerial, Subject: pkix.Name{CommonName: p.CommonName, Organization: []string{p.Organization()}},
		NotBefore: p.NotBefore, NotAfter: p.NotAfter, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true, IsCA: true, MaxPathLen: p.PathLen, MaxPathLenZero: p.PathLen == 0,
		URIs: []*url.URL{{Scheme: "spiffe", Host: p.TrustDomain.Name()}},
	}
	for _, e := range edit {
		e(tmpl)
	}
	parent, signer := tmpl, key
	if above != nil {
		parent, signer = above.cert, above.key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return plannedCA{cert, key}
}

func planned(p Plan, err error) Plan {
	if err != nil {
		panic(err)
	}
	p.Now = func() time.Time { return planStart.Add(time.Hour) }
	return p
}

// setPlanExtension puts an extension into a template as it is, in place of what crypto/x509 would write.
func setPlanExtension(oid []int, critical bool, value ...byte) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oid, Critical: critical, Value: value})
	}
}

func TestAPlanAcceptsWhatItPlannedAndNothingElse(t *testing.T) {
	rootKey, key := newPlanKey(t), newPlanKey(t)
	rootPlan := planned(NewRootPlan(planDomain, rootKey.Public(), planStart, 0))
	plan := planned(NewIntermediatePlan(planDomain, "east", key.Public(), planStart, 0))
	root := makeCA(t, rootPlan, rootKey, nil)
	otherKey := newPlanKey(t)
	otherRoot := makeCA(t, planned(NewRootPlan(planDomain, otherKey.Public(), planStart, 0)), otherKey, nil)
	// A root of the right name and another key.
	falseRoot := makeCA(t, rootPlan, newPlanKey(t), nil)
	good := makeCA(t, plan, key, &root)
	// A longer chain: root (path length 2), a policy CA, the intermediate.
	deepPlan := rootPlan
	deepPlan.PathLen = 2
	deepRoot := makeCA(t, deepPlan, rootKey, nil)
	policyKey := newPlanKey(t)
	policyPlan := planned(NewIntermediatePlan(planDomain, "policy", policyKey.Public(), planStart, 0))
	policy := makeCA(t, policyPlan, policyKey, &deepRoot, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 1, false })
	tight := makeCA(t, policyPlan, policyKey, &deepRoot)
	deep := makeCA(t, plan, key, &policy)
	underTight := makeCA(t, plan, key, &tight)

	chain := func(all ...plannedCA) []*x509.Certificate {
		var out []*x509.Certificate
		for _, c := range all {
			out = append(out, c.cert)
		}
		return out
	}
	edited := func(edit ...func(*x509.Certificate)) []*x509.Certificate {
		return chain(makeCA(t, plan, key, &root, edit...))
	}
	roots := chain(root)
	uri := func(all ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = nil
			for _, s := range all {
				u, err := url.Parse(s)
				if err != nil {
					t.Fatal(err)
				}
				c.URIs = append(c.URIs, u)
			}
		}
	}
	at := func(when time.Time) func(*Plan) {
		return func(p *Plan) { p.Now = func() time.Time { return when } }
	}
	var none func(*Plan)
	for name, c := range map[string]struct {
		chain, roots []*x509.Certificate
		plan         func(*Plan)
		want         string // "" = accepted
	}{
		"as planned":                    {chain(good), roots, none, ""},
		"with its root":                 {chain(good, root), roots, none, ""},
		"one of several roots":          {chain(good), chain(otherRoot, root), none, ""},
		"a longer chain":                {chain(deep, policy), chain(deepRoot), none, ""},
		"the plan leaves times open":    {chain(good), roots, func(p *Plan) { p.NotBefore, p.NotAfter = time.Time{}, time.Time{} }, ""},
		"the plan leaves the name open": {edited(func(c *x509.Certificate) { c.Subject.CommonName = "x" }), roots, func(p *Plan) { p.CommonName = "" }, ""},
		"shorter than planned":          {edited(func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(-time.Hour) }), roots, none, ""},

		"nothing":                   {nil, roots, none, "holds no certificate"},
		"a gap":                     {[]*x509.Certificate{good.cert, nil}, roots, none, "is missing"},
		"too much":                  {chain(good, good, good, good, good, good, good, good, good), roots, none, "at most 8"},
		"twice the same":            {chain(good, good, root), roots, none, "twice"},
		"wrong order":               {chain(root, good), roots, none, "wrong order: the certificate of our key stands at place 2"},
		"wrong order above":         {chain(deep, deepRoot, policy), chain(deepRoot), none, "wrong order"},
		"a stranger in between":     {chain(good, otherRoot), roots, none, "is not signed by"},
		"a link is missing":         {chain(deep), chain(deepRoot), none, "is not signed by an expected root"},
		"another root":              {chain(makeCA(t, plan, key, &otherRoot), otherRoot), roots, none, "leads to another root"},
		"a root of the same name":   {chain(makeCA(t, plan, key, &falseRoot), falseRoot), roots, none, "leads to another root"},
		"signed by another root":    {chain(makeCA(t, plan, key, &otherRoot)), roots, none, "is not signed by an expected root"},
		"no roots":                  {chain(good), nil, none, "no root to compare it with"},
		"another key":               {chain(policy), roots, none, "is for another key"},
		"not signed at all":         {[]*x509.Certificate{forged(t, good.cert)}, roots, none, "is not signed by"},
		"expired":                   {chain(good), roots, at(plan.NotAfter.Add(time.Second)), "expired on"},
		"good to the last second":   {chain(good), roots, at(plan.NotAfter), ""},
		"not yet valid":             {chain(good), roots, at(plan.NotBefore.Add(-time.Second)), "is not yet valid"},
		"under an expired root":     {edited(func(c *x509.Certificate) { c.NotAfter = rootPlan.NotAfter.Add(time.Hour) }), roots, func(p *Plan) { at(rootPlan.NotAfter.Add(time.Minute))(p); p.NotAfter = time.Time{} }, `root example.org`},
		"path too long":             {chain(underTight, tight), chain(deepRoot), none, "allows a path length of 0"},
		"no CA":                     {edited(func(c *x509.Certificate) { c.IsCA, c.MaxPathLen, c.MaxPathLenZero = false, -1, false }), roots, none, "CA:TRUE is missing"},
		"CA not critical":           {edited(setPlanExtension(oidBasicConstraints, false, 0x30, 6, 1, 1, 0xff, 2, 1, 0)), roots, none, "CA:TRUE is not marked critical"},
		"path length 1":             {edited(func(c *x509.Certificate) { c.MaxPathLen = 1 }), roots, none, "has path length 1; planned is 0"},
		"no path length":            {edited(func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = -1, false }), roots, none, "has no path length"},
		"usage not critical":        {edited(setPlanExtension(oidKeyUsage, false, 3, 2, 1, 6)), roots, none, "key usages"},
		"a usage too many":          {edited(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }), roots, none, "key usages"},
		"a usage too few":           {edited(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign }), roots, none, "key usages"},
		"extended usages":           {edited(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), roots, none, "extended key usages"},
		"no URI":                    {edited(uri()), roots, none, "it carries none"},
		"another trust domain":      {edited(uri("spiffe://example.com")), roots, none, "it carries spiffe://example.com"},
		"a workload's URI":          {edited(uri("spiffe://example.org/ns/a/sa/b")), roots, none, "exactly one name"},
		"two URIs":                  {edited(uri("spiffe://example.org", "spiffe://example.org")), roots, none, "exactly one name"},
		"a DNS name":                {edited(func(c *x509.Certificate) { c.DNSNames = []string{"example.org"} }), roots, none, "exactly one name"},
		"its issuer's name":         {edited(func(c *x509.Certificate) { c.Subject = root.cert.Subject; c.AuthorityKeyId = root.cert.SubjectKeyId }), roots, none, "its issuer's name"},
		"another name":              {edited(func(c *x509.Certificate) { c.Subject.CommonName = "x" }), roots, none, "not named as planned"},
		"name constraints":          {edited(func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.org"} }), roots, none, "name constraints"},
		"an unknown critical thing": {edited(setPlanExtension([]int{1, 2, 3}, true, 5, 0)), roots, none, "critical extension 1.2.3"},
		"earlier than planned":      {edited(func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(-time.Second) }), roots, none, "earlier than planned"},
		"later than planned":        {edited(func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Second) }), roots, none, "later than planned"},
		"another serial":            {chain(good), roots, func(p *Plan) { p.Serial = []byte{1} }, "another serial number"},
	} {
		t.Run(name, func(t *testing.T) {
			p := plan
			if c.plan != nil {
				c.plan(&p)
			}
			err := p.Check(c.chain, c.roots)
			switch {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, want %q", err, c.want)
			case err != nil && strings.Contains(err.Error(), "\n"):
				t.Errorf("more than one line: %q", err)
			}
		})
	}
}

// forged flips a bit of the signature.
func forged(t *testing.T, c *x509.Certificate) *x509.Certificate {
	t.Helper()
	der := bytes.Clone(c.Raw)
	der[len(der)-1] ^= 1
	out, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestACAThatSignsItselfStandsAlone(t *testing.T) {
	rootKey, controlKey := newPlanKey(t), newPlanKey(t)
	rootPlan := planned(NewRootPlan(planDomain, rootKey.Public(), planStart, 0))
	controlPlan := planned(NewControlPlan(planDomain, "east", controlKey.Public(), planStart, 0))
	root, control := makeCA(t, rootPlan, rootKey, nil), makeCA(t, controlPlan, controlKey, nil)
	underRoot := makeCA(t, controlPlan, controlKey, &root)
	for name, c := range map[string]struct {
		err  error
		want string
	}{
		"root":                     {rootPlan.Check([]*x509.Certificate{root.cert}, nil), ""},
		"root, expected":           {rootPlan.Check([]*x509.Certificate{root.cert}, []*x509.Certificate{root.cert}), ""},
		"control":                  {controlPlan.Check([]*x509.Certificate{control.cert}, nil), ""},
		"root, another expected":   {rootPlan.Check([]*x509.Certificate{root.cert}, []*x509.Certificate{control.cert}), "none of the expected roots"},
		"control under a root":     {controlPlan.Check([]*x509.Certificate{underRoot.cert}, nil), "does not sign itself"},
		"control with a root":      {controlPlan.Check([]*x509.Certificate{underRoot.cert, root.cert}, nil), "stands alone"},
		"root with a broken sign.": {rootPlan.Check([]*x509.Certificate{forged(t, root.cert)}, nil), "does not sign itself"},
		"a root as intermediate":   {asIntermediate(rootPlan).Check([]*x509.Certificate{root.cert}, []*x509.Certificate{root.cert}), "is itself a root"},
	} {
		if c.want == "" && c.err != nil || c.want != "" && (c.err == nil || !strings.Contains(c.err.Error(), c.want)) {
			t.Errorf("%s: got %v, want %q", name, c.err, c.want)
		}
	}
}

func asIntermediate(p Plan) Plan {
	p.Kind, p.Cluster, p.PathLen = KindIntermediate, "east", 0
	return p
}

func TestPlansAreWhatTheDesignSays(t *testing.T) {
	key := newPlanKey(t)
	root := planned(NewRootPlan(planDomain, key.Public(), planStart, 0))
	east := planned(NewIntermediatePlan(planDomain, "east", key.Public(), planStart, 0))
	control := planned(NewControlPlan(planDomain, "east", key.Public(), planStart, 0))
	id, err := KeyID(root.SPKI)
	if err != nil {
		t.Fatal(err)
	}
	short := new(big.Int).SetBytes(id[:4])
	for _, c := range []struct{ got, want string }{
		{root.CommonName, "Signet root example.org " + pad8(short)},
		{east.CommonName, "Signet east " + pad8(short)},
		{control.CommonName, "Signet control CA east"},
		{root.Organization(), "example.org"},
		{string(root.Algorithm), string(keystore.ECDSAP256)},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
	if root.PathLen != 1 || east.PathLen != 0 || control.PathLen != 0 {
		t.Errorf("path lengths %d %d %d", root.PathLen, east.PathLen, control.PathLen)
	}
	// Inclusive at both ends: 90 days from the start are 90 days.
	if life := east.NotAfter.Sub(planStart) + time.Second; life != 90*24*time.Hour {
		t.Errorf("an intermediate lives %s", life)
	}
	if !east.NotBefore.Equal(planStart.Add(-PlanBackdate)) {
		t.Errorf("an intermediate begins at %s", east.NotBefore)
	}
	long := spiffeid.RequireTrustDomainFromString(strings.Repeat("a", 250))
	for _, p := range []Plan{
		planned(NewRootPlan(long, key.Public(), planStart, 0)),
		planned(NewIntermediatePlan(long, strings.Repeat("b", 63), key.Public(), planStart, 0)),
		planned(NewControlPlan(long, strings.Repeat("b", 63), key.Public(), planStart, 0)),
	} {
		if len(p.CommonName) != 64 || len(p.Organization()) != 64 {
			t.Errorf("names %q and %q; want 64 bytes each (RFC 5280 appendix A.1)", p.CommonName, p.Organization())
		}
	}
}

func pad8(n *big.Int) string {
	s := n.Text(16)
	return strings.Repeat("0", 8-len(s)) + s
}

func TestAPlanThatContradictsItselfIsRefused(t *testing.T) {
	key := newPlanKey(t)
	for name, c := range map[string]struct {
		edit func(*Plan)
		want string
	}{
		"no kind":             {func(p *Plan) { p.Kind = "" }, "unknown kind"},
		"no trust domain":     {func(p *Plan) { p.TrustDomain = spiffeid.TrustDomain{} }, "trust domain"},
		"no cluster":          {func(p *Plan) { p.Cluster = "" }, "cluster name"},
		"cluster as a path":   {func(p *Plan) { p.Cluster = "../x" }, "cluster name"},
		"path length":         {func(p *Plan) { p.PathLen = 1 }, "signs leaves only"},
		"a root in a cluster": {func(p *Plan) { p.Kind = KindRoot }, "belongs to no cluster"},
		"a root without path": {func(p *Plan) { p.Kind, p.Cluster = KindRoot, "" }, "want 1 to 7"},
		"no key":              {func(p *Plan) { p.SPKI = nil }, "public key"},
		"another algorithm":   {func(p *Plan) { p.Algorithm = keystore.RSA4096 }, "planned is rsa-4096"},
		"long name":           {func(p *Plan) { p.CommonName = strings.Repeat("x", 65) }, "at most 64"},
		"ends first":          {func(p *Plan) { p.NotAfter = p.NotBefore }, "before it begins"},
		"half a second":       {func(p *Plan) { p.NotAfter = p.NotAfter.Add(time.Millisecond) }, "whole seconds"},
		"negative serial":     {func(p *Plan) { p.Serial = []byte{0x80} }, "serial number"},
		"long serial":         {func(p *Plan) { p.Serial = bytes.Repeat([]byte{1}, 21) }, "serial number"},
	} {
		p := planned(NewIntermediatePlan(planDomain, "east", key.Public(), planStart, 0))
		c.edit(&p)
		for _, err := range []error{p.Validate(), p.Check(nil, nil)} {
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: got %v, want %q", name, err, c.want)
			}
		}
	}
	odd, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewRootPlan(planDomain, odd.Public(), planStart, 0); err == nil || !strings.Contains(err.Error(), "P-521") {
		t.Errorf("a P-521 key: %v", err)
	}
}

func TestAChainIsCertificatesAndNothingElse(t *testing.T) {
	key := newPlanKey(t)
	c := makeCA(t, planned(NewRootPlan(planDomain, key.Public(), planStart, 0)), key, nil).cert
	good := EncodeChain(c)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	private := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	damaged := bytes.Replace(good, []byte("MII"), []byte("M*I"), 1)
	for name, tc := range map[string]struct {
		text []byte
		want string
	}{
		"one":              {good, ""},
		"with blank lines": {append([]byte("\n\n"), append(good, '\n')...), ""},
		"empty":            {nil, "is empty"},
		"garbage":          {[]byte("garbage"), "not PEM"},
		"garbage between":  {bytes.Join([][]byte{good, good}, []byte("garbage\n")), "not PEM"},
		"10 MiB":           {bytes.Repeat([]byte("x"), 10<<20), "at most"},
		"a private key":    {append(bytes.Clone(good), private...), `type "PRIVATE KEY"`},
		"damaged, then good": {
			append(damaged, good...),
			"damaged PEM",
		},
		"not a certificate": {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}), "certificate 1 of the chain"},
		"too many":          {bytes.Repeat(good, MaxChain+1), "more than 8"},
	} {
		chain, err := ParseChain(tc.text)
		switch {
		case tc.want == "" && (err != nil || len(chain) != 1 || !chain[0].Equal(c)):
			t.Errorf("%s: %v, %v", name, chain, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: got %v, want %q", name, err, tc.want)
		}
	}
}

func FuzzParseChain(f *testing.F) {
	key := newPlanKey(f)
	plan := planned(NewRootPlan(planDomain, key.Public(), planStart, 0))
	f.Add(EncodeChain(makeCA(f, plan, key, nil).cert))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----"))
	f.Fuzz(func(t *testing.T, text []byte) {
		chain, err := ParseChain(text)
		if err != nil {
			return
		}
		again, err := ParseChain(EncodeChain(chain...))
		if err != nil || len(again) != len(chain) {
			t.Errorf("not read again: %v", err)
		}
		_ = plan.Check(chain, chain)
	})
}

func TestFingerprintsSurviveHowPeopleCopyThem(t *testing.T) {
	der := []byte("some DER")
	key, cert := KeyFingerprint(der), CertificateFingerprint(der)
	if !strings.HasPrefix(key, "SHA256:") || len(key) != 6+16*5 || strings.ToLower(key[6:]) != key[6:] {
		t.Errorf("key fingerprint %s", key)
	}
	if !strings.HasPrefix(cert, "SHA256:") || len(cert) != 6+32*3 || strings.ToUpper(cert) != cert {
		t.Errorf("certificate fingerprint %s", cert)
	}
	digits := strings.ReplaceAll(key[7:], ":", "")
	for _, s := range []string{
		key, cert, digits, strings.ToUpper(digits), " " + key + "\n", strings.ToLower(cert), "sha256 Fingerprint=" + cert[7:],
		strings.ReplaceAll(key, ":", " "),
	} {
		f, err := ParseFingerprint(s)
		if s == strings.ReplaceAll(key, ":", " ") {
			if err == nil {
				t.Errorf("%q is taken, its prefix is not one", s)
			}
			continue
		}
		if err != nil || !f.Of(der) || f.Of([]byte("other DER")) {
			t.Errorf("%q: %v, %v", s, f, err)
		}
	}
	for _, s := range []string{"", "SHA256:", digits[1:], digits + "00", "SHA1:" + digits, strings.Replace(digits, digits[:1], "g", 1), strings.Repeat("a", 1000)} {
		if _, err := ParseFingerprint(s); err == nil || len(err.Error()) > 400 {
			t.Errorf("%q: %v", s, err)
		}
	}
}
