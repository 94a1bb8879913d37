package pki

import (
	"crypto/x509"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/vault"
)

const week = 7 * 24 * time.Hour

// What can be seen of the next signature without asking for one is seen now, not when it is due.
func TestWhetherItWouldSignIsSeenWithoutASignature(t *testing.T) {
	root := newAuthority("root", nil)
	one := newAuthority("one", nil, func(c *x509.Certificate) { c.MaxPathLen = 1 })
	middle := newAuthority("middle", root)
	ends := func(left time.Duration) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.NotAfter = time.Now().Add(left).Truncate(time.Second) }
	}
	soon := newAuthority("soon", root, ends(20*time.Hour))
	later := newAuthority("later", root, ends(3*24*time.Hour))
	bare, barred := *middle, *middle
	bare.keyless, barred.usage = true, "crl-signing,read-only"
	const well = "issuer middle of Vault's PKI mount pki leads to the root, has its key and may sign"
	for name, c := range map[string]struct {
		f          fakeVault
		configured string
		under      *authority
		says       string
		ends       time.Time
		refused    string
	}{
		"all is well":                     {fakeVault{issuers: []*authority{middle}}, "middle", root, well, middle.cert.NotAfter, ""},
		"it is the root's own":            {fakeVault{issuers: []*authority{root}}, "", root, "issuer default (root) of Vault's PKI mount pki leads to the root, has its key and may sign", time.Time{}, ""},
		"another one is there":            {fakeVault{issuers: []*authority{root, middle}}, "gone", root, "issuer id-root (root) of", time.Time{}, ""},
		"it ends":                         {fakeVault{issuers: []*authority{later}}, "", root, "issuer default (later) of", later.cert.NotAfter, ""},
		"the policy lacks read":           {fakeVault{issuers: []*authority{middle}, unread: true}, "middle", root, "leads to the root; whether it has its key and may sign is not seen, for the policy lacks read on pki/issuer/middle", middle.cert.NotAfter, ""},
		"the issuer is gone":              {fakeVault{issuers: []*authority{one}}, "root", root, "", time.Time{}, `has no issuer root: give a name or an ID`},
		"none leads to the root any more": {fakeVault{issuers: []*authority{one}}, "one", root, "", time.Time{}, `none of its 1 issuers leads to the root "CN=root"`},
		"all are gone":                    {fakeVault{}, "", root, "", time.Time{}, "has no issuer default"},
		"it has no key":                   {fakeVault{issuers: []*authority{&bare}}, "", root, "", time.Time{}, "its key is not in this mount"},
		"the next one has":                {fakeVault{issuers: []*authority{&bare, root}}, "", root, "issuer id-root (root) of", time.Time{}, ""},
		"it may not sign":                 {fakeVault{issuers: []*authority{&barred}}, "middle", root, "", time.Time{}, "it may not sign, its usage is crl-signing,read-only: `vault patch pki/issuer/middle usage=crl-signing,read-only,issuing-certificates`"},
		"it has ended":                    {fakeVault{issuers: []*authority{newAuthority("old", root, ends(-time.Minute))}}, "", root, "", time.Time{}, "expired on"},
		"it ends too soon":                {fakeVault{issuers: []*authority{soon}}, "", root, "", time.Time{}, "shorter than the least useful 24h0m0s"},
		"its path is too short":           {fakeVault{issuers: []*authority{newAuthority("low", one)}}, "", one, "", time.Time{}, "allows 1 CA certificates below it"},
		"no engine is there":              {fakeVault{noMount: true}, "", root, "", time.Time{}, "there is none at pki"},
	} {
		t.Run(name, func(t *testing.T) {
			says, end, err := c.f.upstream(t, c.configured).Look(t.Context(), c.under.cert, week)
			if c.refused != "" {
				refusedIn(t, name, err, c.refused)
				if errors.As(err, new(interface{ Away() bool })) {
					t.Errorf("it is taken to pass: %v", err)
				}
			} else if err != nil || !strings.Contains(says, c.says) || !end.Equal(c.ends) {
				t.Errorf("it says %q, ends at %s, %v; want %q, %s", says, end, err, c.says, c.ends)
			}
			if len(c.f.asked) > 0 {
				t.Error("something was signed for it")
			}
		})
	}
	for status, is := range map[int]error{http.StatusServiceUnavailable: vault.ErrAway, http.StatusForbidden: vault.ErrLogin} {
		mute := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, `{"errors":["no"]}`, status)
		}))
		_, _, err := newUpstream(t, mute.URL, "", "fake", "pki", "").Look(t.Context(), root.cert, week)
		if a := interface{ Away() bool }(nil); !errors.As(err, &a) || !a.Away() || !errors.Is(err, is) {
			t.Errorf("of a Vault that answers %d something is concluded: %v", status, err)
		}
		mute.Close()
	}
}

// Vault says of a mount that isn't there what it says of a path that the policy lacks; but these paths are open to all.
func TestAMountThatIsNotThereIsNotThePolicysFault(t *testing.T) {
	p, csr := ask(t, 0)
	u := (&fakeVault{noMount: true}).upstream(t, "")
	_, root := u.Root(t.Context())
	_, sign := u.Sign(t.Context(), p, csr)
	p.Under = newAuthority("root", nil).cert
	_, under := u.Sign(t.Context(), p, csr)
	_, find := u.FindRoot(t.Context(), rootPlan(t))
	for name, err := range map[string]error{"root": root, "sign": sign, "sign under a root": under, "find a root": find} {
		refusedIn(t, name, err, "there is none at pki, or a policy denies it: look at `vault secrets list`, and set the mount (upstream.vault_pki.mount")
		if !errors.Is(err, vault.ErrDenied) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := (&fakeVault{}).upstream(t, "").Sign(t.Context(), p, csr)
	refusedIn(t, "a policy that allows all of it", err, "upstream.vault_pki.mount")
}

// A root that was certified anew with its key, and whose first issuer was deleted, signs on under the certificate that is trusted:
// one of the same name and key is no level of the path.
func TestARootThatWasRenewedWithItsKeySignsUnderTheTrustedCertificate(t *testing.T) {
	one := func(c *x509.Certificate) { c.MaxPathLen = 1 }
	first := newAuthority("root", nil, one)
	renewed := first.again("renewed", func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(time.Hour) })
	middle := newAuthority("middle", newAuthority("root", nil, func(c *x509.Certificate) { c.MaxPathLen = 2 }), one)
	for name, issuers := range map[string][]*authority{"alone": {renewed}, "both": {renewed, first}} {
		f := &fakeVault{issuers: issuers}
		p, csr := ask(t, 0)
		p.Under = first.cert
		u := f.upstream(t, "")
		a, err := u.Sign(t.Context(), p, csr)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(a.Chain) != 1 || !a.Roots[0].Equal(first.cert) || a.Chain[0].CheckSignatureFrom(first.cert) != nil || len(f.signed) != 1 {
			t.Errorf("%s: a chain of %d under %s, signed by %v", name, len(a.Chain), a.Roots[0].SerialNumber, f.signed)
		}
		if _, _, err := u.Look(t.Context(), first.cert, week); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// An intermediate above ours stays a level.
	p, csr := ask(t, 0)
	p.Under = middle.above[0]
	if a, err := (&fakeVault{issuers: []*authority{middle}}).upstream(t, "").Sign(t.Context(), p, csr); err != nil || len(a.Chain) != 2 {
		t.Errorf("%v, %v", a.Chain, err)
	}
	// Vault itself goes by its issuer's own certificate.
	for want, spoil := range map[string]func(*x509.Certificate){
		"expired on":                            func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) },
		"shorter than the least useful 24h0m0s": func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Hour) },
	} {
		f := &fakeVault{issuers: []*authority{first.again("renewed", spoil)}}
		p, csr := ask(t, 0)
		p.Under = first.cert
		_, err := f.upstream(t, "").Sign(t.Context(), p, csr)
		refusedIn(t, "an issuer at its end", err, want)
	}
	// With another key identifier validators would not find the way.
	f := &fakeVault{issuers: []*authority{first.again("renewed", func(c *x509.Certificate) { c.SubjectKeyId = []byte{1, 2, 3} })}}
	p, csr = ask(t, 0)
	p.Under = first.cert
	_, err := f.upstream(t, "").Sign(t.Context(), p, csr)
	refusedIn(t, "another key identifier", err, "allows 1 CA certificates below it")
}
