package pki

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/vault"
)

// RootNeeds is what MakeRoot needs of a policy.
func RootNeeds(c Config) []vault.Need {
	return []vault.Need{{
		Path: c.Mount + "/issuers/generate/root/internal", Capabilities: []string{"update"}, Why: "make a root",
	}}
}

// keyTypes are Vault's words for our algorithms.
var keyTypes = map[keystore.Algorithm]struct {
	kind string
	bits int
}{
	keystore.ECDSAP256: {"ec", 256},
	keystore.ECDSAP384: {"ec", 384},
	keystore.RSA2048:   {"rsa", 2048},
	keystore.RSA3072:   {"rsa", 3072},
	keystore.RSA4096:   {"rsa", 4096},
}

// FindRoot returns the root that MakeRoot made earlier by a plan like this; nil = no issuer has the configured name.
func (u *Upstream) FindRoot(ctx context.Context, p ca.Plan) (*x509.Certificate, error) {
	m, err := u.issuers(ctx)
	if err != nil {
		return nil, err
	}
	p.NotBefore = time.Time{} // It has begun when it was made.
	for _, i := range m.all {
		if i.name != u.c.Issuer {
			continue
		}
		if err := check(p, i.cert); err != nil {
			return nil, fmt.Errorf("%s, issuer %s is there already, and it is %w: %w", u, i.name, ErrAnother, err)
		}
		return i.cert, nil
	}
	return nil, nil
}

// ErrAnother is why a root is not the one that was made before under the name.
var ErrAnother = errors.New("another one")

// MakeRoot has Vault make a key that never leaves it, and its root certificate, as an issuer of the configured name, which must
// be free. The plan has no key, since there is none yet; what comes back is compared with the rest.
func (u *Upstream) MakeRoot(ctx context.Context, p ca.Plan) (*x509.Certificate, error) {
	fail := func(err error) (*x509.Certificate, error) {
		return nil, fmt.Errorf("make the root %q in %s: %w", p.CommonName, u, err)
	}
	key, ok := keyTypes[p.Algorithm]
	switch {
	case !ok:
		return fail(fmt.Errorf("algorithm %.32q can't be used for a CA", p.Algorithm))
	case u.c.Issuer == DefaultIssuer:
		return fail(errors.New("it needs a name of its own, and default is Vault's word for whichever issuer is that: name it"))
	case p.Kind != ca.KindRoot || p.CommonName == "" || p.NotBefore.IsZero() || p.NotAfter.IsZero():
		return fail(errors.New("the plan is not of a root with a common name and a validity"))
	}
	secret, err := u.vault.Write(ctx, u.c.Mount+"/issuers/generate/root/internal", map[string]any{
		"issuer_name": u.c.Issuer, "key_name": u.c.Issuer, "key_type": key.kind, "key_bits": key.bits, "format": "pem",
		"common_name": p.CommonName, "organization": []string{p.Organization()},
		"exclude_cn_from_sans": true, "uri_sans": []string{p.TrustDomain.IDString()}, "max_path_length": p.PathLen,
		"not_after":           p.NotAfter.UTC().Format(time.RFC3339),
		"not_before_duration": fmt.Sprintf("%ds", max(u.c.Now().Sub(p.NotBefore), time.Second)/time.Second),
	})
	if err != nil {
		return fail(err)
	}
	cert, _, err := certificates(secret.Data, "certificate")
	if err != nil {
		return fail(err)
	}
	p.NotBefore = p.NotBefore.Add(-maxClocks)
	if err := check(p, cert); err != nil {
		return fail(err)
	}
	return cert, nil
}

// check compares a root that Vault made with its plan, which has no key.
func check(p ca.Plan, cert *x509.Certificate) error {
	p.SPKI = cert.RawSubjectPublicKeyInfo
	return p.Check([]*x509.Certificate{cert}, nil)
}
