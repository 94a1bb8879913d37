package pki

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/vault"
)

func TestWhatVaultSignsIsTheChainBelowTheRoot(t *testing.T) {
	root := newAuthority("root", nil)
	middle := newAuthority("middle", root)
	f := &fakeVault{issuers: []*authority{middle, root}}
	u := f.upstream(t, "")
	if got := must(u.Root(t.Context())); !got.Equal(root.cert) {
		t.Errorf("the root is %s", got.Subject)
	}
	p, csr := ask(t, 0)
	a, err := u.Sign(t.Context(), p, csr)
	if err != nil {
		t.Fatal(err)
	}
	if a.Pending != "" || len(a.Chain) != 2 || !a.Chain[1].Equal(middle.cert) || len(a.Roots) != 1 || !a.Roots[0].Equal(root.cert) {
		t.Errorf("%d certificates, roots %v", len(a.Chain), a.Roots)
	}
	if err := p.Check(a.Chain, a.Roots); err != nil {
		t.Error(err)
	}
	said := f.asked[0]
	for name, want := range map[string]any{
		"use_csr_values": false, "exclude_cn_from_sans": true, "max_path_length": 0.0, "common_name": p.CommonName, "format": "pem",
		"not_after": p.NotAfter.Format(time.RFC3339),
	} {
		if said[name] != want {
			t.Errorf("%s is %v, want %v", name, said[name], want)
		}
	}
	if _, ok := said["ttl"]; ok {
		t.Error("a ttl is cut short by the mount's limit")
	}
}

func TestTheIssuerUnderTheRootOfThePlanSigns(t *testing.T) {
	old, young := newAuthority("old", nil), newAuthority("young", nil)
	oldMiddle, youngMiddle := newAuthority("old-middle", old), newAuthority("young-middle", young)
	certificateOnly := &authority{id: "id-imported", name: "imported", cert: young.cert, keyless: true}
	f := &fakeVault{issuers: []*authority{oldMiddle, old, certificateOnly, youngMiddle}}
	for name, c := range map[string]struct {
		configured string
		under      *authority
		signer     string
	}{
		"the configured one leads there":            {"old-middle", old, "id-old-middle"},
		"the default does":                          {"", old, "id-old-middle"},
		"another does, the nearest":                 {"young-middle", old, "id-old"},
		"another does, and the nearest has no key":  {"old-middle", young, "id-young-middle"},
		"the configured one is gone, and one leads": {"removed", old, "id-old"},
	} {
		t.Run(name, func(t *testing.T) {
			f.signed = nil
			p, csr := ask(t, 0)
			p.Under = c.under.cert
			a, err := f.upstream(t, c.configured).Sign(t.Context(), p, csr)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(f.signed, []string{c.signer}) || !a.Roots[0].Equal(c.under.cert) {
				t.Errorf("signed by %v under %s", f.signed, a.Roots[0].Subject)
			}
		})
	}
	p, csr := ask(t, 0)
	p.Under = newAuthority("third", nil).cert
	if _, err := f.upstream(t, "").Sign(t.Context(), p, csr); err == nil || !strings.Contains(err.Error(), `none of its 4 issuers leads to the root "CN=third"`) {
		t.Errorf("a root that no issuer leads to: %v", err)
	}
}

func TestAChainThatIsShuffledDoubledOrMissingIsPutRight(t *testing.T) {
	root := newAuthority("root", nil)
	middle := newAuthority("middle", root)
	stranger := newAuthority("stranger", nil)
	for name, change := range map[string]func(map[string]any){
		"absent":         func(d map[string]any) { delete(d, "ca_chain") },
		"null":           func(d map[string]any) { d["ca_chain"] = nil },
		"only the CA's":  func(d map[string]any) { d["ca_chain"] = d["ca_chain"].([]any)[:1] },
		"backwards":      func(d map[string]any) { slices.Reverse(d["ca_chain"].([]any)) },
		"twice":          func(d map[string]any) { d["ca_chain"] = append(d["ca_chain"].([]any), d["ca_chain"].([]any)...) },
		"with strangers": func(d map[string]any) { d["ca_chain"] = append(d["ca_chain"].([]any), encode(stranger.cert)) },
	} {
		f := &fakeVault{issuers: []*authority{middle}, answer: change}
		p, csr := ask(t, 0)
		a, err := f.upstream(t, "").Sign(t.Context(), p, csr)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if len(a.Chain) != 2 || !a.Chain[1].Equal(middle.cert) || !a.Roots[0].Equal(root.cert) {
			t.Errorf("%s: a chain of %d", name, len(a.Chain))
		}
	}
}

// refusedIn wants one sentence that says what is wrong.
func refusedIn(t *testing.T, name string, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 1500 {
		t.Errorf("%s: %v; want %q", name, err, want)
	}
}

func TestABrokenOrHostileVaultIsRefused(t *testing.T) {
	root := newAuthority("root", nil)
	namesake := newAuthority("root", nil)
	other := newAuthority("other", nil)
	private := "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n-----END PRIVATE KEY-----"
	for name, c := range map[string]struct {
		f    fakeVault
		want string
	}{
		"another key":        {fakeVault{public: newKey().Public()}, "is for another key"},
		"another name":       {fakeVault{spoil: func(c *x509.Certificate) { c.URIs[0].Host = "example.com" }}, "must carry exactly one name"},
		"no name":            {fakeVault{spoil: func(c *x509.Certificate) { c.URIs = nil }}, "it carries none"},
		"a DNS name besides": {fakeVault{spoil: func(c *x509.Certificate) { c.DNSNames = []string{"evil.example"} }}, "must carry exactly one name"},
		"two names": {fakeVault{spoil: func(c *x509.Certificate) {
			c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: "example.com"})
		}}, "must carry exactly one name"},
		"another subject":          {fakeVault{spoil: func(c *x509.Certificate) { c.Subject.CommonName = "of the request" }}, "is not named as planned"},
		"another key's identifier": {fakeVault{spoil: func(c *x509.Certificate) { c.SubjectKeyId = []byte{1, 2, 3} }}, "has the subject key identifier 010203, and "},
		"path length 3":            {fakeVault{spoil: func(c *x509.Certificate) { c.MaxPathLen = 3 }}, "has path length 3; planned is 0"},
		"no path length":           {fakeVault{spoil: func(c *x509.Certificate) { c.MaxPathLen = -1; c.MaxPathLenZero = false }}, "has no path length"},
		"not a CA":                 {fakeVault{spoil: func(c *x509.Certificate) { c.IsCA = false; c.MaxPathLen = -1; c.MaxPathLenZero = false }}, "is not a CA certificate"},
		"name constraints":         {fakeVault{spoil: func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.org"} }}, "carries name constraints"},
		"further key usage":        {fakeVault{spoil: func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageDigitalSignature }}, "exactly the key usages"},
		"bound to a purpose": {fakeVault{spoil: func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}}, "bound to extended key usages"},
		"a longer life":   {fakeVault{spoil: func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Hour) }}, "later than planned"},
		"a useless life":  {fakeVault{spoil: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Hour) }}, "look at leaf_not_after_behavior"},
		"begun long ago":  {fakeVault{spoil: func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(-time.Hour) }}, "earlier than planned"},
		"not yet begun":   {fakeVault{spoil: func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }}, "is not yet valid"},
		"another root":    {fakeVault{signer: other}, "is not signed by an expected root"},
		"a namesake root": {fakeVault{signer: namesake}, "is not signed by an expected root"},
		"garbage":         {fakeVault{answer: func(d map[string]any) { d["certificate"] = "garbage" }}, "text that is not PEM"},
		"damaged PEM": {fakeVault{answer: func(d map[string]any) {
			d["certificate"] = strings.Replace(d["certificate"].(string), "M", "*", 3)
		}}, "certificate of the answer is refused"},
		"no certificate": {fakeVault{answer: func(d map[string]any) { delete(d, "certificate") }}, "has no certificate"},
		"a number":       {fakeVault{answer: func(d map[string]any) { d["certificate"] = 7 }}, "has no certificate"},
		"two in one":     {fakeVault{answer: func(d map[string]any) { d["certificate"] = encode(root.cert) + "\n" + encode(root.cert) }}, "it holds 2 certificates"},
		"100 certificates": {fakeVault{answer: func(d map[string]any) {
			d["ca_chain"] = slices.Repeat([]any{encode(root.cert)}, 100)
		}}, "holds 100 certificates"},
		"garbage in the chain":     {fakeVault{answer: func(d map[string]any) { d["ca_chain"] = []any{"garbage"} }}, "ca_chain of the answer is refused"},
		"a private key":            {fakeVault{answer: func(d map[string]any) { d["private_key"] = private }}, "holds a private key"},
		"a private key in a chain": {fakeVault{answer: func(d map[string]any) { d["ca_chain"] = []any{private} }}, `a block of type "PRIVATE KEY"`},
		"nothing":                  {fakeVault{answer: func(d map[string]any) { clear(d) }}, "has no certificate"},
	} {
		c.f.issuers = []*authority{root}
		p, csr := ask(t, 0)
		_, err := c.f.upstream(t, "").Sign(t.Context(), p, csr)
		refusedIn(t, name, err, c.want)
		if !errors.Is(err, ca.ErrUnusable) {
			t.Errorf("%s: it looks as if asking again cost nothing: %v", name, err)
		}
		if err != nil && strings.Contains(err.Error(), "MC4CAQ") {
			t.Errorf("%s: the key is in the error", name)
		}
	}
}

func TestWhatIsAboveIsLookedAtBeforeVaultIsAsked(t *testing.T) {
	now := time.Now()
	short := func(c *x509.Certificate) { c.NotAfter = now.Add(time.Hour).Truncate(time.Second) }
	zero := func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true }
	one := func(c *x509.Certificate) { c.MaxPathLen = 1 }
	root := newAuthority("root", nil)
	for name, c := range map[string]struct {
		issuer *authority
		want   string
	}{
		"path length 0":                        {newAuthority("middle", root, zero), "allows 0 CA certificates below it (path length), and there would be 1"},
		"path length 1 above an intermediate":  {newAuthority("middle", newAuthority("root", nil, one)), "allows 1 CA certificates below it (path length), and there would be 2"},
		"it has ended":                         {newAuthority("gone", nil, func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) }), "expired on"},
		"it has not begun":                     {newAuthority("soon", nil, func(c *x509.Certificate) { c.NotBefore = now.Add(time.Minute) }), "begins on"},
		"it ends too soon":                     {newAuthority("root", nil, short), "shorter than the least useful 24h0m0s"},
		"the root ends too soon":               {newAuthority("middle", newAuthority("root", nil, short)), "shorter than the least useful 24h0m0s"},
		"no root above":                        {&authority{id: "id-x", name: "x", cert: newAuthority("middle", root).cert}, "holds no root: import the root's certificate"},
		"purposes that leaves don't have":      {newAuthority("middle", root, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), "validators would refuse"},
		"name constraints that leaves are not": {newAuthority("middle", root, func(c *x509.Certificate) { c.PermittedURIDomains = []string{"example.com"} }), "validators would refuse"},
	} {
		f := &fakeVault{issuers: []*authority{c.issuer}}
		p, csr := ask(t, 0)
		_, err := f.upstream(t, "").Sign(t.Context(), p, csr)
		refusedIn(t, name, err, c.want)
		if len(f.asked) > 0 && !strings.Contains(c.want, "validators") {
			t.Errorf("%s: Vault was asked", name)
		}
	}
}

func TestALifeIsCutShortByWhatIsAbove(t *testing.T) {
	end := time.Now().Add(48 * time.Hour).UTC().Truncate(time.Second)
	root := newAuthority("root", nil)
	middle := newAuthority("middle", root, func(c *x509.Certificate) { c.NotAfter = end })
	f := &fakeVault{issuers: []*authority{middle}}
	p, csr := ask(t, 0)
	a, err := f.upstream(t, "").Sign(t.Context(), p, csr)
	if err != nil || !a.Chain[0].NotAfter.Equal(end) {
		t.Fatalf("%v, %v; want %s", a.Chain, err, end)
	}
	// A life that is short because it was asked for is nobody's mistake.
	p, csr = ask(t, time.Minute)
	if a, err := f.upstream(t, "").Sign(t.Context(), p, csr); err != nil || !a.Chain[0].NotAfter.Equal(p.NotAfter) {
		t.Errorf("%v, %v", a.Chain, err)
	}
}

func TestAPlanThatVaultCannotKeepIsRefused(t *testing.T) {
	f := &fakeVault{issuers: []*authority{newAuthority("root", nil)}}
	u := f.upstream(t, "")
	for name, c := range map[string]struct {
		change func(*ca.Plan)
		want   string
	}{
		"later":       {func(p *ca.Plan) { p.NotBefore = p.NotBefore.Add(time.Hour) }, "begins at once: ask for it then"},
		"expired":     {func(p *ca.Plan) { p.NotBefore, p.NotAfter = p.NotBefore.Add(-time.Hour), p.NotBefore }, "signed expired"},
		"no validity": {func(p *ca.Plan) { p.NotAfter = time.Time{} }, "Vault would choose them"},
		"no name":     {func(p *ca.Plan) { p.CommonName = "" }, "Vault would choose them"},
		"a root":      {func(p *ca.Plan) { p.Kind, p.Cluster, p.PathLen = ca.KindRoot, "", 1 }, "signs itself"},
		"invalid":     {func(p *ca.Plan) { p.PathLen = 1 }, "signs leaves only"},
		"another key": {func(p *ca.Plan) { p.SPKI = must(x509.MarshalPKIXPublicKey(newKey().Public())) }, "the certificate request holds the key"},
	} {
		p, csr := ask(t, 0)
		c.change(&p)
		_, err := u.Sign(t.Context(), p, csr)
		refusedIn(t, name, err, c.want)
	}
	p, csr := ask(t, 0)
	for name, bad := range map[string][]byte{"garbage": []byte("garbage"), "damaged": slices.Replace(slices.Clone(csr), 60, 70, []byte("AAAAAAAAAA")...)} {
		_, err := u.Sign(t.Context(), p, bad)
		refusedIn(t, name, err, "the certificate request is")
	}
	if len(f.asked) > 0 {
		t.Error("Vault was asked")
	}
}

func TestAMountWithoutTheIssuerSaysSo(t *testing.T) {
	f := &fakeVault{issuers: []*authority{newAuthority("root", nil)}}
	p, csr := ask(t, 0)
	_, err := f.upstream(t, "rot").Root(t.Context())
	refusedIn(t, "root of a wrong name", err, "has no issuer rot: give a name or an ID")
	_, err = f.upstream(t, "rot").Sign(t.Context(), p, csr)
	refusedIn(t, "a wrong name", err, "has no issuer rot: give a name or an ID")
	_, err = (&fakeVault{}).upstream(t, "").Sign(t.Context(), p, csr)
	refusedIn(t, "an empty mount", err, "has no issuer default")
}

func TestOddIssuersStopNobody(t *testing.T) {
	root := newAuthority("root", nil)
	middle := newAuthority("middle", root)
	says := func(status int, body map[string]any) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_ = json.NewEncoder(w).Encode(body)
		}
	}
	holds := func(data map[string]any) http.HandlerFunc { return says(200, map[string]any{"data": data}) }
	gone := says(500, map[string]any{"errors": []string{"unable to find PKI issuer for reference"}})
	f := &fakeVault{issuers: []*authority{middle}, odd: map[string]http.HandlerFunc{
		"unparsed": holds(map[string]any{"certificate": "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----", "issuer_id": "unparsed"}),
		"long":     holds(map[string]any{"certificate": encode(root.cert), "ca_chain": slices.Repeat([]any{encode(root.cert)}, 100), "issuer_id": "long"}),
		"gone":     gone,
		"denied":   says(403, map[string]any{"errors": []string{"permission denied"}}),
		// No default is set.
		DefaultIssuer: says(500, map[string]any{"errors": []string{"no default issuer currently configured"}}),
	}}
	for _, configured := range []string{"", "middle", "gone"} {
		p, csr := ask(t, 0)
		p.Under = root.cert
		u := f.upstream(t, configured)
		if _, err := u.Sign(t.Context(), p, csr); err != nil {
			t.Errorf("%q: %v", configured, err)
		}
		p.Under = newAuthority("third", nil).cert
		_, err := u.Sign(t.Context(), p, csr)
		refusedIn(t, "under another root", err, "could not be read, the first: ")
		if err := u.c.Vault.Ready(); err != nil {
			t.Errorf("%q: the whole of Vault is taken to be away: %v", configured, err)
		}
	}
	if r, err := f.upstream(t, "middle").Root(t.Context()); err != nil || !r.Equal(root.cert) {
		t.Errorf("%v, %v", r, err)
	}
	_, err := f.upstream(t, "").Root(t.Context())
	refusedIn(t, "no default", err, "has no issuer default: give a name or an ID")
	refusedIn(t, "no default", err, "no default issuer currently configured")
	// Of a Vault that is away nothing is concluded.
	f.odd["gone"] = says(503, map[string]any{"errors": []string{"Vault is sealed"}})
	p, csr := ask(t, 0)
	p.Under = root.cert
	if _, err := f.upstream(t, "middle").Sign(t.Context(), p, csr); !errors.Is(err, vault.ErrAway) {
		t.Errorf("got %v", err)
	}
}

func TestIssuersAreReadSeveralAtATime(t *testing.T) {
	root := newAuthority("root", nil)
	f := &fakeVault{issuers: []*authority{root}, odd: map[string]http.HandlerFunc{}}
	var flying, most atomic.Int64
	all := make(chan struct{})
	together := sync.OnceFunc(func() { close(all) })
	for n := range 5 * mostReads {
		f.odd[fmt.Sprint("n", n)] = func(w http.ResponseWriter, _ *http.Request) {
			now := flying.Add(1)
			defer flying.Add(-1)
			for was := most.Load(); now > was && !most.CompareAndSwap(was, now); was = most.Load() {
			}
			if now == mostReads {
				together()
			}
			select {
			case <-all:
			case <-time.After(10 * time.Second):
				t.Error("they are not read together")
			}
			http.Error(w, `{"errors":["no"]}`, http.StatusBadRequest)
		}
	}
	p, csr := ask(t, 0)
	p.Under = root.cert
	if _, err := f.upstream(t, "root").Sign(t.Context(), p, csr); err != nil || most.Load() != mostReads {
		t.Errorf("%d at a time, %v", most.Load(), err)
	}
}

func TestVaultAwayIsToldApart(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, `{"errors":["Vault is sealed"]}`, http.StatusServiceUnavailable)
	}))
	defer server.Close()
	u := newUpstream(t, server.URL, "", "fake", "pki", "")
	p, csr := ask(t, 0)
	_, err := u.Sign(t.Context(), p, csr)
	if !errors.Is(err, vault.ErrAway) {
		t.Errorf("got %v", err)
	}
	if _, err := u.Root(t.Context()); !errors.Is(err, vault.ErrAway) {
		t.Errorf("got %v", err)
	}
}

func rootPlan(t *testing.T) ca.Plan {
	t.Helper()
	start := time.Now().UTC().Truncate(time.Second)
	return ca.Plan{
		Kind: ca.KindRoot, TrustDomain: exampleOrg, CommonName: "Signet root example.org 0123abcd", PathLen: 1, Algorithm: keystore.ECDSAP256,
		NotBefore: start.Add(-ca.PlanBackdate), NotAfter: start.Add(1000 * time.Hour),
	}
}

func TestARootIsMadeOnceAndFoundAgain(t *testing.T) {
	f := &fakeVault{issuers: []*authority{newAuthority("of-somebody", nil)}, spoil: func(c *x509.Certificate) { c.SubjectKeyId = []byte{1, 2, 3} }}
	u := f.upstream(t, "signet-root")
	p := rootPlan(t)
	if c, err := u.FindRoot(t.Context(), p); c != nil || err != nil {
		t.Fatalf("found %v, %v", c, err)
	}
	made, err := u.MakeRoot(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := u.FindRoot(t.Context(), p); err != nil || !c.Equal(made) {
		t.Errorf("found %v, %v", c, err)
	}
	_, err = u.MakeRoot(t.Context(), p)
	refusedIn(t, "a second of that name", err, "already in use")
	p.CommonName = "Signet root example.org ffffffff"
	_, err = u.FindRoot(t.Context(), p)
	refusedIn(t, "somebody else's", err, "is there already, and it is another one")
}

func TestARootThatIsNotAsPlannedIsRefused(t *testing.T) {
	ski := func(c *x509.Certificate) { c.SubjectKeyId = []byte{1, 2, 3} }
	for name, c := range map[string]struct {
		f      fakeVault
		change func(*ca.Plan)
		issuer string
		want   string
	}{
		"another name":        {fakeVault{spoil: func(c *x509.Certificate) { ski(c); c.URIs[0].Host = "example.com" }}, nil, "r", "must carry exactly one name"},
		"no path length":      {fakeVault{spoil: func(c *x509.Certificate) { ski(c); c.MaxPathLen = -1 }}, nil, "r", "has no path length"},
		"a longer life":       {fakeVault{spoil: func(c *x509.Certificate) { ski(c); c.NotAfter = c.NotAfter.Add(time.Hour) }}, nil, "r", "later than planned"},
		"name constraints":    {fakeVault{spoil: func(c *x509.Certificate) { ski(c); c.PermittedDNSDomains = []string{"a"} }}, nil, "r", "carries name constraints"},
		"another kind of key": {fakeVault{spoil: ski}, func(p *ca.Plan) { p.Algorithm = keystore.ECDSAP384 }, "r", "planned is ecdsa-p384"},
		"its private key":     {fakeVault{answer: func(d map[string]any) { d["private_key"] = "x" }}, nil, "r", "must never leave Vault"},
		"default":             {fakeVault{}, nil, "", "it needs a name of its own"},
		"an algorithm":        {fakeVault{}, func(p *ca.Plan) { p.Algorithm = keystore.Ed25519 }, "r", "can't be used for a CA"},
		"no validity":         {fakeVault{}, func(p *ca.Plan) { p.NotAfter = time.Time{} }, "r", "not of a root with a common name and a validity"},
	} {
		p := rootPlan(t)
		if c.change != nil {
			c.change(&p)
		}
		_, err := c.f.upstream(t, c.issuer).MakeRoot(t.Context(), p)
		refusedIn(t, name, err, c.want)
	}
}

func TestAConfigurationThatCannotWorkIsRefused(t *testing.T) {
	client := (&fakeVault{}).upstream(t, "").c.Vault
	for name, c := range map[string]struct {
		config Config
		want   string
	}{
		"no Vault":       {Config{Mount: "pki"}, "no Vault to ask"},
		"no mount":       {Config{Vault: client}, "name where the PKI engine is mounted"},
		"a slash":        {Config{Vault: client, Mount: "pki/"}, "without slashes at its ends"},
		"an issuer path": {Config{Vault: client, Mount: "pki", Issuer: "a/b"}, "give a name or an ID"},
	} {
		_, err := New(c.config)
		refusedIn(t, name, err, c.want)
	}
}
