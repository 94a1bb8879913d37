//go:build real

package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/test/lab"
	"github.com/signet-ca/signet/vault"
)

// mount is a PKI mount in the real Vault.
type mount struct {
	*testing.T
	v    *lab.Vault
	name string
}

func newMount(t *testing.T, name string) mount {
	t.Helper()
	v, err := theVault.Get()
	if err != nil {
		t.Fatal(err)
	}
	m := mount{t, v, name}
	// As Vault's documentation has it: the longest lease is 32 days.
	m.write("sys/mounts/"+name, map[string]any{"type": "pki"})
	return m
}

func (m mount) write(path string, body map[string]any) *lab.VaultAnswer {
	m.Helper()
	a, err := m.v.Root().Write(m.Context(), path, body)
	if err != nil {
		m.Fatal(err)
	}
	return a
}

func parse(text string) *x509.Certificate {
	block, _ := pem.Decode([]byte(text))
	return must(x509.ParseCertificate(block.Bytes))
}

// root makes a root of a year as an admin would, by name.
func (m mount) root(name string, with map[string]any) *x509.Certificate {
	m.Helper()
	body := map[string]any{
		"issuer_name": name, "common_name": name, "key_type": "ec", "not_after": time.Now().AddDate(1, 0, 0).UTC().Format(time.RFC3339),
		"uri_sans": "spiffe://example.org", "exclude_cn_from_sans": true,
	}
	for k, v := range with {
		body[k] = v
	}
	return parse(m.write(m.name+"/issuers/generate/root/internal", body).String("certificate"))
}

// intermediate makes a CA in this mount under an issuer of another.
func (m mount) intermediate(name string, above mount, issuer string, with map[string]any) *x509.Certificate {
	m.Helper()
	csr := m.write(m.name+"/issuers/generate/intermediate/internal", map[string]any{"common_name": name, "key_type": "ec"}).String("csr")
	body := map[string]any{"csr": csr, "common_name": name, "exclude_cn_from_sans": true, "not_after": time.Now().AddDate(0, 6, 0).UTC().Format(time.RFC3339)}
	for k, v := range with {
		body[k] = v
	}
	text := above.write(above.name+"/issuer/"+issuer+"/sign-intermediate", body).String("certificate")
	a := m.write(m.name+"/intermediate/set-signed", map[string]any{"certificate": text})
	m.write(m.name+"/issuer/"+a.Data["imported_issuers"].([]any)[0].(string), map[string]any{"issuer_name": name})
	return parse(text)
}

func (m mount) importCertificate(c *x509.Certificate) {
	m.Helper()
	m.write(m.name+"/issuers/import/cert", map[string]any{"pem_bundle": encode(c)})
}

// issuer changes settings of one.
func (m mount) issuer(name string, body map[string]any) {
	m.Helper()
	body["issuer_name"] = name
	m.write(m.name+"/issuer/"+name, body)
}

func (m mount) upstream(issuer string) *Upstream {
	m.Helper()
	return newUpstream(m.T, m.v.Address, m.v.CAFile, m.v.RootToken, m.name, issuer)
}

// as is an upstream with a token that may do what is needed, and nothing else.
func (m mount) as(mount, issuer string, needs ...vault.Need) *Upstream {
	m.Helper()
	name := strings.ToLower(rand.Text())
	if err := m.v.Policy(m.Context(), name, vault.Policy(append(needs, vault.Needs()...))); err != nil {
		m.Fatal(err)
	}
	token := must(m.v.MakeToken(m.Context(), lab.VaultLife{Policies: []string{name}}))
	return newUpstream(m.T, m.v.Address, m.v.CAFile, token, mount, issuer)
}

// sign has a new key signed and shows the answer to whoever will meet it: the issuer that signs leaves, and openssl.
func (m mount) sign(u *Upstream, p ca.Plan, csr []byte) ca.Answer {
	m.Helper()
	a, err := u.Sign(m.Context(), p, csr)
	if err != nil {
		m.Fatal(err)
	}
	if err := p.Check(a.Chain, a.Roots); err != nil {
		m.Error(err)
	}
	dir := m.TempDir()
	root, chain := filepath.Join(dir, "root.pem"), filepath.Join(dir, "chain.pem")
	if err := os.WriteFile(root, ca.EncodeChain(a.Roots...), 0o600); err != nil {
		m.Fatal(err)
	}
	if err := os.WriteFile(chain, ca.EncodeChain(a.Chain...), 0o600); err != nil {
		m.Fatal(err)
	}
	if out, err := exec.Command("openssl", "verify", "-x509_strict", "-CAfile", root, "-untrusted", chain, chain).CombinedOutput(); err != nil {
		m.Errorf("openssl: %s", out)
	}
	return a
}

// refuses wants a sentence.
func (m mount) refuses(u *Upstream, want string) {
	m.Helper()
	p, csr := ask(m.T, 0)
	_, err := u.Sign(m.Context(), p, csr)
	refusedIn(m.T, m.Name(), err, want)
}

func TestRealVaultSignsEveryKindOfKeyUnderEveryKindOfRoot(t *testing.T) {
	m := newMount(t, "kinds")
	for name, kind := range map[string]map[string]any{
		"p256": {"key_bits": 256}, "p384": {"key_bits": 384}, "rsa": {"key_type": "rsa", "key_bits": 2048},
	} {
		m.root(name, kind)
		u := m.upstream(name)
		for _, alg := range []keystore.Algorithm{keystore.ECDSAP256, keystore.ECDSAP384, keystore.RSA2048} {
			key := must(keystore.NewMemory().Create(t.Context(), "intermediate", alg, 0))
			p := planFor(t, key, 90*24*time.Hour)
			a := m.sign(u, p, requestOf(t, key))
			own := a.Chain[0]
			if !own.NotAfter.Equal(p.NotAfter) || own.NotBefore.Before(p.NotBefore) || time.Since(own.NotBefore) < 10*time.Second {
				t.Errorf("%s under %s lives from %s to %s, planned was %s to %s", alg, name, own.NotBefore, own.NotAfter, p.NotBefore, p.NotAfter)
			}
			if id := must(ca.KeyID(p.SPKI)); !slices.Equal(own.SubjectKeyId, id) || own.Subject.String() != fmt.Sprintf("CN=%s,O=example.org", p.CommonName) {
				t.Errorf("%s under %s: key identifier %x, want %x, subject %s", alg, name, own.SubjectKeyId, id, own.Subject)
			}
			if _, err := ca.NewIssuer(ca.IssuerConfig{
				Key: key, Chain: a.Chain, Roots: a.Roots, TrustDomain: exampleOrg, Hierarchy: identity.Mesh, State: ca.Active,
			}); err != nil {
				t.Errorf("%s under %s: %v", alg, name, err)
			}
		}
	}
}

// What Vault makes of a request when it is not told everything, and of issuers that are set up otherwise.

func TestTrapWhatIsNotSaidIsTakenFromTheRequestOrLost(t *testing.T) {
	m := newMount(t, "unsaid")
	m.root("r", nil)
	p, csr := ask(t, 0)
	lost := parse(m.write("unsaid/issuer/r/sign-intermediate", map[string]any{"csr": string(csr)}).String("certificate"))
	if len(lost.URIs) != 0 || lost.Subject.CommonName != "of the request" || lost.MaxPathLen != -1 {
		t.Errorf("the trap is gone: URIs %v, %s, path length %d", lost.URIs, lost.Subject, lost.MaxPathLen)
	}
	taken := parse(m.write("unsaid/issuer/r/sign-intermediate", map[string]any{"csr": string(csr), "use_csr_values": true}).String("certificate"))
	if len(taken.URIs) != 1 || taken.URIs[0].Host != "evil.example" || taken.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		t.Errorf("the trap is gone: URIs %v, usages %b", taken.URIs, taken.KeyUsage)
	}
	m.sign(m.upstream("r"), p, csr)
}

func TestTrapALifeIsCutByTheMount(t *testing.T) {
	m := newMount(t, "lives")
	m.root("r", nil)
	_, csr := ask(t, 0)
	cut := parse(m.write("lives/issuer/r/sign-intermediate", map[string]any{"csr": string(csr), "ttl": "2160h"}).String("certificate"))
	if time.Until(cut.NotAfter) > 33*24*time.Hour {
		t.Errorf("the trap is gone: until %s", cut.NotAfter)
	}
	p, csr := ask(t, 90*24*time.Hour)
	if a := m.sign(m.upstream("r"), p, csr); !a.Chain[0].NotAfter.Equal(p.NotAfter) {
		t.Errorf("until %s, planned %s", a.Chain[0].NotAfter, p.NotAfter)
	}
}

func TestTrapTheEndOfTheIssuer(t *testing.T) {
	m := newMount(t, "ends")
	root := m.root("r", map[string]any{"not_after": time.Now().Add(48 * time.Hour).UTC().Format(time.RFC3339)})
	u := m.upstream("r")
	for _, behaviour := range []string{"err", "truncate", "permit", "always_enforce_err"} {
		m.issuer("r", map[string]any{"leaf_not_after_behavior": behaviour})
		p, csr := ask(t, 0)
		if a := m.sign(u, p, csr); !a.Chain[0].NotAfter.Equal(root.NotAfter) {
			t.Errorf("%s: until %s, the root until %s", behaviour, a.Chain[0].NotAfter, root.NotAfter)
		}
	}
	m.root("soon", map[string]any{"not_after": time.Now().Add(2 * time.Hour).UTC().Format(time.RFC3339)})
	m.refuses(m.upstream("soon"), "shorter than the least useful 24h0m0s; make a new root")
}

func TestTrapNothingMayBeginBeforeItsIssuer(t *testing.T) {
	m := newMount(t, "begins")
	m.root("r", map[string]any{"not_before_duration": "30s"})
	p, csr := ask(t, 0)
	if _, err := m.v.Root().Write(t.Context(), "begins/issuer/r/sign-intermediate", map[string]any{"csr": string(csr), "not_before_duration": "300s"}); err == nil {
		t.Error("the trap is gone")
	}
	m.sign(m.upstream("r"), p, csr)
}

func TestTrapTheChainHoldsTheCertificateItself(t *testing.T) {
	m := newMount(t, "doubles")
	root := m.root("r", nil)
	p, csr := ask(t, 0)
	raw := m.write("doubles/issuer/r/sign-intermediate", map[string]any{"csr": string(csr)})
	if chain := raw.Data["ca_chain"].([]any); len(chain) != 2 || parse(chain[0].(string)).Subject.CommonName != "of the request" {
		t.Errorf("the trap is gone: %d certificates", len(chain))
	}
	if a := m.sign(m.upstream(""), p, csr); len(a.Chain) != 1 || !a.Roots[0].Equal(root) {
		t.Errorf("a chain of %d", len(a.Chain))
	}
}

func TestTrapPathLengthsAreNotAddedUp(t *testing.T) {
	top, m := newMount(t, "pathtop"), newMount(t, "pathlen")
	root := top.root("r", map[string]any{"max_path_length": 1})
	m.intermediate("middle", top, "r", nil)
	m.importCertificate(root)
	_, csr := ask(t, 0)
	// Its issuer has path length 0 by Vault's own reckoning, or none where somebody said so.
	if _, err := m.v.Root().Write(t.Context(), "pathlen/issuer/middle/sign-intermediate", map[string]any{"csr": string(csr)}); err == nil {
		t.Error("the trap is gone")
	}
	m.refuses(m.upstream("middle"), "allows 0 CA certificates below it (path length), and there would be 1")
	m.intermediate("beyond", top, "r", map[string]any{"max_path_length": 3})
	m.refuses(m.upstream("beyond"), `"CN=r" (serial`)
	m.refuses(m.upstream("beyond"), "allows 1 CA certificates below it (path length), and there would be 2")
}

func TestTrapAnIntermediateAboveOurs(t *testing.T) {
	top, m := newMount(t, "top"), newMount(t, "middle")
	root := top.root("r", map[string]any{"max_path_length": 2})
	middle := m.intermediate("middle", top, "r", map[string]any{"max_path_length": 1})
	u := m.upstream("")
	p, csr := ask(t, 0)
	// Vault doesn't know the root until somebody brings it.
	if _, err := u.Root(t.Context()); err == nil || !strings.Contains(err.Error(), "import the root's certificate") {
		t.Errorf("got %v", err)
	}
	p.Under = root
	check := func(a ca.Answer) {
		t.Helper()
		if len(a.Chain) != 2 || !a.Chain[1].Equal(middle) || !a.Roots[0].Equal(root) {
			t.Errorf("a chain of %d under %s", len(a.Chain), a.Roots[0].Subject)
		}
	}
	check(m.sign(u, p, csr))
	m.importCertificate(root)
	if got, err := u.Root(t.Context()); err != nil || !got.Equal(root) {
		t.Errorf("got %v, %v", got, err)
	}
	p.Under = nil
	check(m.sign(u, p, csr))
	// The imported root has no key here: it is not asked while another leads there.
	roots := must(m.v.Root().List(t.Context(), "middle/issuers"))
	for _, id := range roots {
		p, csr := ask(t, 0)
		p.Under = root
		check(m.sign(m.upstream(id), p, csr))
	}
}

func TestTrapSeveralRootsInOneMount(t *testing.T) {
	m := newMount(t, "several")
	a, b := m.root("a", nil), m.root("b", nil)
	for _, c := range []struct {
		issuer      string
		under, want *x509.Certificate
	}{{"", nil, a}, {"b", nil, b}, {"", b, b}, {"a", b, b}, {"gone", b, b}} {
		p, csr := ask(t, 0)
		p.Under = c.under
		if got := m.sign(m.upstream(c.issuer), p, csr); !got.Roots[0].Equal(c.want) {
			t.Errorf("%+v: signed under %s", c, got.Roots[0].Subject)
		}
	}
	// The default moves with a rotation in Vault; we follow when we are told to.
	m.write("several/config/issuers", map[string]any{"default": "b"})
	if got := must(m.upstream("").Root(t.Context())); !got.Equal(b) {
		t.Errorf("the root is %s", got.Subject)
	}
}

func TestTrapCrossSignedIssuersAndChainsMadeByHand(t *testing.T) {
	old, m := newMount(t, "crossold"), newMount(t, "crossnew")
	oldRoot := old.root("old", nil)
	newRoot := m.root("new", nil)
	// The new root's key certified by the old root as well.
	csr := m.write("crossnew/issuers/generate/intermediate/existing", map[string]any{"key_ref": "default", "common_name": "new"}).String("csr")
	cross := parse(old.write("crossold/issuer/old/sign-intermediate", map[string]any{"csr": csr, "common_name": "new", "exclude_cn_from_sans": true, "ttl": "700h"}).String("certificate"))
	m.importCertificate(cross)
	m.importCertificate(oldRoot)
	u := m.upstream("new")
	for under, length := range map[*x509.Certificate]int{newRoot: 1, oldRoot: 2} {
		p, csr := ask(t, 0)
		p.Under = under
		if a := m.sign(u, p, csr); !a.Roots[0].Equal(under) || len(a.Chain) != length {
			t.Errorf("under %s: a chain of %d to %s", under.Subject, len(a.Chain), a.Roots[0].Subject)
		}
	}
	p, csr2 := ask(t, 0)
	if a := m.sign(u, p, csr2); !a.Roots[0].Equal(newRoot) {
		t.Errorf("it begins under %s", a.Roots[0].Subject)
	}
	ids := map[string]string{}
	for _, id := range must(m.v.Root().List(t.Context(), "crossnew/issuers")) {
		c := parse(must(m.v.Root().Read(t.Context(), "crossnew/issuer/"+id)).String("certificate"))
		ids[c.Issuer.CommonName+">"+c.Subject.CommonName] = id
	}
	m.issuer("new", map[string]any{"manual_chain": []string{ids["new>new"], ids["old>old"], ids["old>new"], ids["old>new"]}})
	for _, under := range []*x509.Certificate{newRoot, oldRoot} {
		p, csr := ask(t, 0)
		p.Under = under
		if a := m.sign(u, p, csr); !a.Roots[0].Equal(under) {
			t.Errorf("with a chain made by hand, under %s: it leads to %s", under.Subject, a.Roots[0].Subject)
		}
	}
}

func TestTrapARootRenewedWithItsKey(t *testing.T) {
	m := newMount(t, "renewed")
	first := m.root("r1", map[string]any{"common_name": "r", "key_name": "k", "max_path_length": 1})
	m.write("renewed/issuers/generate/root/existing", map[string]any{
		"issuer_name": "r2", "key_ref": "k", "common_name": "r", "max_path_length": 1, "uri_sans": "spiffe://example.org", "exclude_cn_from_sans": true, "ttl": "700h",
	})
	if err := m.v.Root().Delete(t.Context(), "renewed/issuer/r1"); err != nil {
		t.Fatal(err)
	}
	p, csr := ask(t, 0)
	p.Under = first
	if a := m.sign(m.upstream("r2"), p, csr); len(a.Chain) != 1 || !a.Roots[0].Equal(first) {
		t.Errorf("a chain of %d under %s", len(a.Chain), a.Roots[0].SerialNumber)
	}
}

// sees wants the words, or the error.
func (m mount) sees(u *Upstream, under *x509.Certificate, says, refused string) {
	m.Helper()
	said, _, err := u.Look(m.Context(), under, week)
	if refused != "" {
		refusedIn(m.T, m.Name(), err, refused)
	} else if err != nil || !strings.Contains(said, says) {
		m.Errorf("it says %q, %v; want %q", said, err, says)
	}
}

func TestRealVaultShowsWhetherItWouldSign(t *testing.T) {
	m := newMount(t, "looks")
	root := m.root("r", map[string]any{"key_name": "k"})
	c := Config{Mount: "looks", Issuer: "r"}
	u := m.as("looks", "r", append(Needs(c), LookNeeds(c)...)...)
	m.sees(u, root, "issuer r of Vault's PKI mount looks leads to the root, has its key and may sign", "")
	m.sees(m.as("looks", "r", Needs(c)...), root, "the policy lacks read on looks/issuer/r", "")
	m.issuer("r", map[string]any{"usage": "read-only,crl-signing"})
	m.sees(u, root, "", "it may not sign, its usage is crl-signing,read-only: `vault patch looks/issuer/r usage=")
	if err := m.v.Root().Delete(t.Context(), "looks/issuer/r"); err != nil {
		t.Fatal(err)
	}
	m.sees(u, root, "", "has no issuer r")
	if err := m.v.Root().Delete(t.Context(), "looks/key/k"); err != nil {
		t.Fatal(err)
	}
	m.importCertificate(root)
	m.sees(m.as("looks", DefaultIssuer, append(Needs(c), vault.Need{Path: "looks/issuer/+", Capabilities: []string{"read"}})...), root, "", "its key is not in this mount")
	nowhere := Config{Mount: "nowhere"}
	m.sees(m.as("nowhere", "", append(Needs(nowhere), LookNeeds(nowhere)...)...), root, "", "there is none at nowhere, or a policy denies it")
}

func TestTrapNameConstraintsOfTheIssuer(t *testing.T) {
	m := newMount(t, "constraints")
	m.root("dns", map[string]any{"permitted_dns_domains": "example.org"})
	m.root("same", map[string]any{"permitted_uri_domains": "example.org"})
	m.root("other", map[string]any{"permitted_uri_domains": "example.com"})
	for _, issuer := range []string{"dns", "same"} {
		p, csr := ask(t, 0)
		m.sign(m.upstream(issuer), p, csr)
	}
	m.refuses(m.upstream("other"), "is not authorized to sign for this name")
}

func TestTrapAddressesOfTheMountGoIntoCertificates(t *testing.T) {
	m := newMount(t, "addresses")
	m.write("addresses/config/urls", map[string]any{"issuing_certificates": "http://vault.test/ca", "crl_distribution_points": "http://vault.test/crl", "ocsp_servers": "http://vault.test/ocsp"})
	m.root("r", nil)
	p, csr := ask(t, 0)
	if a := m.sign(m.upstream(""), p, csr); len(a.Chain[0].CRLDistributionPoints) != 1 {
		t.Error("the trap is gone")
	}
}

func TestTrapAnIssuerThatMayNotOrCanNotSign(t *testing.T) {
	m := newMount(t, "unfit")
	m.root("r", nil)
	m.issuer("r", map[string]any{"usage": "read-only,crl-signing"})
	m.refuses(m.upstream("r"), "requested usage issuing-certificates")
	m.refuses(m.upstream("rr"), "has no issuer rr: give a name or an ID")
	bare := newMount(t, "bare")
	bare.refuses(bare.upstream(""), "has no issuer default")
	bare.importCertificate(newAuthority("imported", nil).cert)
	for _, id := range must(m.v.Root().List(t.Context(), "bare/issuers")) {
		bare.refuses(bare.upstream(id), "unable to fetch corresponding key")
	}
	nowhere := mount{t, m.v, "nowhere"}
	nowhere.refuses(nowhere.upstream(""), "no issuer default")
}

func TestRealVaultMakesARootOnce(t *testing.T) {
	m := newMount(t, "roots")
	for alg, want := range map[keystore.Algorithm]func(crypto.PublicKey) bool{
		keystore.ECDSAP256: func(k crypto.PublicKey) bool { e, ok := k.(*ecdsa.PublicKey); return ok && e.Curve == elliptic.P256() },
		keystore.ECDSAP384: func(k crypto.PublicKey) bool { e, ok := k.(*ecdsa.PublicKey); return ok && e.Curve == elliptic.P384() },
		keystore.RSA2048:   func(k crypto.PublicKey) bool { r, ok := k.(*rsa.PublicKey); return ok && r.N.BitLen() == 2048 },
	} {
		u := m.upstream("root-" + string(alg))
		p := rootPlan(t)
		p.Algorithm, p.CommonName = alg, "Signet root example.org "+string(alg)
		p.NotAfter = p.NotAfter.AddDate(10, 0, 0)
		if c, err := u.FindRoot(t.Context(), p); c != nil || err != nil {
			t.Errorf("%s: found %v, %v", alg, c, err)
		}
		made, err := u.MakeRoot(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		if !want(made.PublicKey) || !made.NotAfter.Equal(p.NotAfter) || made.Subject.CommonName != p.CommonName || made.MaxPathLen != 1 {
			t.Errorf("%s: %T %s %s %d", alg, made.PublicKey, made.Subject, made.NotAfter, made.MaxPathLen)
		}
		if err := ca.CheckRoot(exampleOrg, made, time.Now()); err != nil {
			t.Errorf("%s: %v", alg, err)
		}
		if c, err := u.FindRoot(t.Context(), p); err != nil || !c.Equal(made) {
			t.Errorf("%s: found %v, %v", alg, c, err)
		}
		_, err = u.MakeRoot(t.Context(), p)
		refusedIn(t, "a second", err, "issuer name already in use")
		q, csr := ask(t, 0)
		q.Under = made
		m.sign(u, q, csr)
	}
}

func TestEachPathThatThePolicyLacksIsNamed(t *testing.T) {
	m := newMount(t, "policies")
	m.root("r", nil)
	c := Config{Mount: "policies", Issuer: "r"}
	with := func(needs ...vault.Need) *Upstream {
		t.Helper()
		return m.as("policies", "r", needs...)
	}
	all := slices.Concat(Needs(c), LookNeeds(c), RootNeeds(c))
	u := with(all...)
	if missing, err := u.c.Vault.Missing(t.Context(), all); err != nil || len(missing) > 0 {
		t.Errorf("with the whole policy %v is missing, %v", missing, err)
	}
	p, csr := ask(t, 0)
	m.sign(u, p, csr)
	lacking := with(append(RootNeeds(c), LookNeeds(c)...)...)
	if missing, err := lacking.c.Vault.Missing(t.Context(), all); err != nil || len(missing) != 1 || missing[0].Path != "policies/issuer/+/sign-intermediate" {
		t.Errorf("%v is missing, %v", missing, err)
	}
	m.refuses(lacking, "write policies/issuer/r/sign-intermediate")
	m.refuses(lacking, "permission denied")
	_, err := with(Needs(c)...).MakeRoot(t.Context(), rootPlan(t))
	refusedIn(t, "a root", err, "write policies/issuers/generate/root/internal")
	refusedIn(t, "a root", err, "permission denied")
}
