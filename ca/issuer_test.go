package ca

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
)

// Each way in which key, certificate, chain and roots fail to belong together is told in one sentence with its remedy.
func TestAnIssuerThatDoesNotFitIsRefused(t *testing.T) {
	const p256 = keystore.ECDSAP256
	rootKey, upperKey, key := newKey("root", p256, 0), newKey("upper", p256, 1), newKey("east", p256, 2)
	other := newKey("other", p256, 0) // its certificates bear other names
	root := signCA(t, caTemplate("Root", 2), nil, rootKey.Public(), rootKey)
	upper := signCA(t, caTemplate("Upper", 1), root, upperKey.Public(), rootKey)
	own := signCA(t, caTemplate("East", 0), upper, key.Public(), upperKey)
	spoiled := func(change func(*x509.Certificate)) *x509.Certificate {
		return signCA(t, caTemplate("East", 0, change), upper, key.Public(), upperKey)
	}
	uri := func(s string) *url.URL { u, _ := url.Parse(s); return u }

	type config = IssuerConfig
	cases := map[string]struct {
		change func(*config)
		want   []string
	}{
		"no key":               {func(c *config) { c.Key = nil }, []string{"no key"}},
		"no certificate":       {func(c *config) { c.Chain = nil }, []string{"no certificate for key memory:east@1"}},
		"unparsed certificate": {func(c *config) { c.Roots = append(c.Roots, nil) }, []string{"must be parsed"}},
		"no trust domain":      {func(c *config) { c.TrustDomain = spiffeid.TrustDomain{} }, []string{"no trust domain"}},
		"no hierarchy":         {func(c *config) { c.Hierarchy = 0 }, []string{"mesh or of the control"}},
		"unknown state":        {func(c *config) { c.State = "done" }, []string{`unknown state "done"`}},
		"a bad name":           {func(c *config) { c.Name = "East 1" }, []string{`"East 1"`, "use 1 to 63"}},
		"a weak key": {func(c *config) {
			weak := &signerKey{Signer: weakKey(t), name: "weak"}
			c.Key, c.Chain[0] = weak, signCA(t, caTemplate("East", 0), upper, weak.Public(), upperKey)
		}, []string{"unsupported key", "use P-256"}},
		"another key":         {func(c *config) { c.Key = newKey("stray", keystore.ECDSAP384, 0) }, []string{"memory:stray@1", `"CN=East`, "put the right one back, or rotate"}},
		"chain upside down":   {func(c *config) { c.Chain = []*x509.Certificate{upper, own} }, []string{"wrong order", "certificate 2", "put it first"}},
		"chain out of order":  {func(c *config) { c.Chain = []*x509.Certificate{own, own} }, []string{"wrong order", "put the issuer's certificate first"}},
		"chain with the root": {func(c *config) { c.Chain = append(c.Chain, root) }, []string{`holds the root "CN=Root`, "leave it out"}},
		"chain with a gap":    {func(c *config) { c.Chain = c.Chain[:1] }, []string{"another root", `"CN=Upper`, "have it signed by one of them"}},
		"no root":             {func(c *config) { c.Roots = nil }, []string{"no root was given", `"CN=Root`, "install that root"}},
		"another root": {func(c *config) {
			c.Roots = []*x509.Certificate{signCA(t, caTemplate("Foreign", 2), nil, other.Public(), other)}
		}, []string{"of another root", `"CN=Root`, `"CN=Foreign`}},
		"another key's root": {func(c *config) {
			c.Roots = []*x509.Certificate{signCA(t, caTemplate("Root", 2), nil, key.Public(), key)}
		}, []string{`"CN=Root`, "not signed by the root", "install the root that signed it"}},
		"a root as the issuer": {func(c *config) { c.Chain, c.Key = []*x509.Certificate{root}, rootKey }, []string{"is a root", "intermediate"}},
		"not a CA": {func(c *config) {
			c.Chain[0] = spoiled(func(x *x509.Certificate) { x.IsCA, x.MaxPathLen, x.MaxPathLenZero = false, -1, false })
		}, []string{"not a CA certificate", "CA:TRUE"}},
		"may not sign":      {func(c *config) { c.Chain[0] = spoiled(func(x *x509.Certificate) { x.KeyUsage = x509.KeyUsageCRLSign }) }, []string{"lacks keyCertSign"}},
		"no key usage":      {func(c *config) { c.Chain[0] = spoiled(func(x *x509.Certificate) { x.KeyUsage = 0 }) }, []string{"lacks keyCertSign"}},
		"no key identifier": {func(c *config) { c.Chain[0] = spoiled(withoutSKI) }, []string{"no subject key identifier", "have it signed again"}},
		"no name":           {func(c *config) { c.Chain[0] = spoiled(func(x *x509.Certificate) { x.Subject = pkix.Name{} }) }, []string{"empty subject"}},
		"clients only": {func(c *config) {
			c.Chain[0] = spoiled(func(x *x509.Certificate) { x.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} })
		}, []string{"forbids TLS servers"}},
		"no SPIFFE ID":         {func(c *config) { c.Chain[0] = spoiled(func(x *x509.Certificate) { x.URIs = nil }) }, []string{"does not name its trust domain", "URI SAN spiffe://example.org"}},
		"another trust domain": {func(c *config) { c.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org") }, []string{`"spiffe://example.org", not for spiffe://other.org`}},
		"a path in its ID": {func(c *config) {
			c.Chain[0] = spoiled(func(x *x509.Certificate) { x.URIs[0] = uri("spiffe://example.org/east") })
		}, []string{`"spiffe://example.org/east", not for`}},
		"two URIs": {func(c *config) {
			c.Chain[0] = spoiled(func(x *x509.Certificate) { x.URIs = append(x.URIs, uri("https://example.org")) })
		}, []string{"2 URI SANs", "allows one"}},
		"a foreign CA above it": {func(c *config) {
			u := signCA(t, caTemplate("Upper", 1, func(x *x509.Certificate) { x.URIs[0] = uri("spiffe://other.org") }), root, upperKey.Public(), rootKey)
			c.Chain[1] = u
		}, []string{`"CN=Upper`, `"spiffe://other.org"`}},
		"path too long": {func(c *config) {
			r := signCA(t, caTemplate("Root", 1), nil, rootKey.Public(), rootKey)
			c.Roots = []*x509.Certificate{r}
		}, []string{`"CN=Root`, "allows 1 CA certificates below it", "there are 2"}},
		"path too long above": {func(c *config) {
			c.Chain[1] = signCA(t, caTemplate("Upper", 0), root, upperKey.Public(), rootKey)
		}, []string{`"CN=Upper`, "allows 0 CA certificates below it", "there are 1"}},
		"never valid as a whole": {func(c *config) {
			c.Chain[0] = spoiled(func(x *x509.Certificate) { x.NotBefore, x.NotAfter = noon.AddDate(1, 0, 0), noon.AddDate(1, 0, 1) })
		}, []string{"never valid as a whole", "2027-11-21T12:00:00Z", "sign it again"}},
		"an extension nobody knows": {func(c *config) {
			c.Chain[0] = spoiled(func(x *x509.Certificate) {
				x.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 9999}, Critical: true, Value: []byte{5, 0}}}
			})
		}, []string{"validators would refuse its chain", "critical extension"}},
		"names constrained away": {func(c *config) {
			c.Roots = []*x509.Certificate{signCA(t, caTemplate("Root", 2, func(x *x509.Certificate) { x.PermittedURIDomains = []string{"other.org"} }), nil, rootKey.Public(), rootKey)}
		}, []string{"validators would refuse its chain"}},
		"a control CA with a chain": {func(c *config) { c.Hierarchy = identity.ControlPlane }, []string{"no control CA", "signet cluster init"}},
		"a control CA of other roots": {func(c *config) {
			c.Hierarchy, c.Chain, c.Key = identity.ControlPlane, []*x509.Certificate{root}, rootKey
			c.Roots = []*x509.Certificate{upper}
		}, []string{"not among the roots", "give none"}},
	}
	good := func() IssuerConfig {
		return IssuerConfig{
			Name: "east-1", Hierarchy: identity.Mesh, TrustDomain: exampleOrg, State: Active, Key: key,
			Chain: []*x509.Certificate{own, upper}, Roots: []*x509.Certificate{root},
		}
	}
	if _, err := NewIssuer(good()); err != nil {
		t.Fatalf("the good one: %v", err)
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			c := good()
			tc.change(&c)
			_, err := NewIssuer(c)
			if err == nil {
				t.Fatal("was accepted")
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q\nlacks %q", err, want)
				}
			}
			if strings.Contains(err.Error(), "\n") || len(err.Error()) > 1000 {
				t.Errorf("not one sentence: %q", err)
			}
		})
	}
}

// A root is refused at once exactly when no intermediate below it could be used.
func TestARootThatCanHaveNoIntermediateIsRefused(t *testing.T) {
	rootKey, key := newKey("root", keystore.ECDSAP256, 0), newKey("east", keystore.ECDSAP256, 2)
	permitted := func(domains ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.PermittedDNSDomainsCritical, c.PermittedURIDomains = true, domains }
	}
	excluded := func(domains ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.ExcludedURIDomains = domains }
	}
	for name, try := range map[string]struct {
		spoil   func(*x509.Certificate)
		refused string
	}{
		"any path":             {func(c *x509.Certificate) { c.MaxPathLen = -1 }, ""},
		"path length 1":        {func(*x509.Certificate) {}, ""},
		"path length 0":        {func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true }, "path length of 0"},
		"its own domain":       {permitted("example.org"), ""},
		"one of several":       {permitted("foo.org", "EXAMPLE.org"), ""},
		"another domain":       {permitted("foo.org"), "URIs of example.org"},
		"what is below it":     {permitted(".example.org"), "URIs of example.org"},
		"all of a higher one":  {permitted(".org"), ""},
		"a similar one":        {permitted("ample.org"), "URIs of example.org"},
		"all but foo.org":      {excluded("foo.org"), ""},
		"all but it":           {excluded("example.org"), "URIs of example.org"},
		"all but a higher one": {excluded(".org"), "URIs of example.org"},
		"names of other kinds": {func(c *x509.Certificate) {
			c.PermittedDNSDomains, c.PermittedEmailAddresses = []string{"foo.org"}, []string{"foo.org"}
		}, ""},
		"nothing of all":        {excluded(""), "URIs of example.org"},
		"all, said by a period": {permitted(""), ""},
	} {
		t.Run(name, func(t *testing.T) {
			root := signCA(t, caTemplate("Root", 1, try.spoil), nil, rootKey.Public(), rootKey)
			own := signCA(t, caTemplate("East", 0), root, key.Public(), rootKey)
			_, below := NewIssuer(IssuerConfig{
				Name: "east-1", Hierarchy: identity.Mesh, TrustDomain: exampleOrg, State: Active, Key: key, Chain: []*x509.Certificate{own}, Roots: []*x509.Certificate{root},
			})
			err := CheckRoot(exampleOrg, root, noon)
			if (err == nil) != (below == nil) || (err == nil) != (try.refused == "") || err != nil && !strings.Contains(err.Error(), try.refused) {
				t.Errorf("the root: %v; an intermediate below it: %v; want %q", err, below, try.refused)
			}
		})
	}
}

func TestAnIssuerIsNamedByItsKeyUnlessNamed(t *testing.T) {
	w := newWorld(t)
	if w.mesh.Name() != "east-1" || w.control.Name() != "control-1" {
		t.Errorf("named %s and %s", w.mesh.Name(), w.control.Name())
	}
}

// A root may be signed anew with its key; validators have both, so the longer life counts.
func TestOfTwoRootsWithOneKeyTheLongerLivedCounts(t *testing.T) {
	w := newWorld(t, func(o *worldOptions) {
		o.root = func(c *x509.Certificate) { c.NotAfter = noon.Add(time.Hour) }
	})
	if !w.mesh.NotAfter().Equal(noon.Add(time.Hour)) {
		t.Fatalf("ends at %s", w.mesh.NotAfter())
	}
	rootKey := newKey("root", keystore.ECDSAP256, 0)
	c := w.meshConfig
	c.Roots = append(c.Roots, signCA(t, caTemplate("Example root", 1), nil, rootKey.Public(), rootKey), w.root)
	i, err := NewIssuer(c)
	if err != nil {
		t.Fatal(err)
	}
	if !i.NotAfter().Equal(w.meshConfig.Chain[0].NotAfter) {
		t.Errorf("ends at %s", i.NotAfter())
	}
}

func TestASetOfIssuersHasOneActivePerHierarchy(t *testing.T) {
	w := newWorld(t)
	second := w.meshConfig
	second.Name = "east-2"
	other, err := NewIssuer(second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewIssuers(w.mesh, w.control, other); err == nil || !strings.Contains(err.Error(), "issuers east-1 and east-2 are both active in the mesh hierarchy") {
		t.Errorf("two active: %v", err)
	}
	if _, err := NewIssuers(w.mesh, w.mesh); err == nil || !strings.Contains(err.Error(), "two issuers are named east-1") {
		t.Errorf("one name twice: %v", err)
	}
	second.State = Retired
	retired, err := NewIssuer(second)
	if err != nil {
		t.Fatal(err)
	}
	set, err := NewIssuers(w.mesh)
	if err != nil {
		t.Fatal(err)
	}
	before := set.Snapshot()
	if err := set.Replace(retired, w.control); err != nil {
		t.Fatal(err)
	}
	if i, ok := before.Active(identity.Mesh); !ok || i != w.mesh || len(before.All()) != 1 {
		t.Error("a snapshot changed")
	}
	if _, ok := set.Snapshot().Active(identity.Mesh); ok {
		t.Error("a retired issuer is active")
	}
	if i, ok := set.Snapshot().Active(identity.ControlPlane); !ok || i != w.control {
		t.Error("the control issuer is not active")
	}
	if err := set.Replace(w.mesh, other); err == nil {
		t.Error("a bad set was taken")
	} else if len(set.Snapshot().All()) != 2 {
		t.Error("a refused set changed the snapshot")
	}
}

// withoutSKI leaves an identifier of no octets, which parses as none.
func withoutSKI(c *x509.Certificate) {
	c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 14}, Value: []byte{4, 0}}}
}
