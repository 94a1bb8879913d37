// Package ceremony makes CA certificates: roots, intermediates, control CAs. That is rare, and the only work that cfssl
// does in Signet, so this is the only package that links it; servers and agents get by without.
//
// A certificate is made in fixed steps, and nothing but their order is clever:
//
//  1. A ca.Plan says everything about it. From the request only the public key is taken; what else the request claims
//     must not differ from the plan.
//  2. Prepare clamps the plan to the issuer's life, refuses what would die soon, and predicts the to-be-signed bytes,
//     down to the last one: crypto/x509 makes the certificate with a throw-away key in place of the issuer's.
//     zlint's RFC 5280 lints must find no error in it.
//  3. Prepared.Sign appends these bytes to the audit log, and when they are durable has cfssl sign. The key is lent to
//     cfssl for one signature, over exactly these bytes.
//  4. The result is compared with the prediction byte by byte, its signature verified, and checked against the plan.
//
// A crash or an error after step 3's append leaves an entry without a certificate, which harms nobody;
// a certificate without an entry can't come about.
//
// # The offline root folder
//
// InitRoot makes a folder (0700) that is all there is of an offline root, to be copied and locked away as one:
//
//	root.pem                   the root's certificate
//	keys/root@1.pem            its key, encrypted (package keystore)
//	keys/log@1.pem             the key that signs the log's checkpoints, encrypted likewise
//	log/                       the log of everything the root has signed (package audit), origin <trust domain>/root/<key id>
//	ceremonies/<index>-*.yaml  a record for each ceremony: what was reviewed, and the certificate
//
// Looking at it needs no passphrase; signing does.
//
// The key may be elsewhere (Elsewhere): in a keystore, and then all is as above, or with an engine that makes certificates by
// itself. The folder says where, in key.yaml, instead of holding the key. An engine's certificates are made first, compared
// with the plan, and logged before they are given out.
package ceremony

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	auditv1 "github.com/signet-ca/signet/api/signet/audit/v1"
	"github.com/signet-ca/signet/audit"
	"github.com/signet-ca/signet/ca"
)

// Prepared is a certificate that has been planned, predicted and linted, and may be signed once.
type Prepared struct {
	plan   ca.Plan
	issuer *x509.Certificate // nil = itself
	csr    []byte            // PEM
	tbs    []byte
	spent  atomic.Bool
}

// Plan is the plan as it will be signed: clamped, and with its serial number.
func (p *Prepared) Plan() ca.Plan { return p.plan }

// Prepare does everything that can be done without the issuer's key. The request (PEM) must be for the planned key.
// A nil issuer is for plans that sign themselves. The validity may come back shorter than planned, never longer.
func Prepare(plan ca.Plan, issuer *x509.Certificate, request []byte) (*Prepared, error) {
	if plan.Now == nil {
		plan.Now = time.Now
	}
	if err := plan.Validate(); err != nil {
		return nil, err
	}
	switch {
	case plan.CommonName == "":
		return nil, errors.New("plan without a common name: a CA needs a name")
	case plan.NotBefore.IsZero() || plan.NotAfter.IsZero():
		return nil, errors.New("plan without validity: a certificate to be signed needs its first and last second")
	case plan.SelfSigned() != (issuer == nil):
		return nil, fmt.Errorf("a CA of kind %s: whether it has an issuer contradicts its kind", plan.Kind)
	}
	csr, err := ParseRequest(request)
	if err != nil {
		return nil, err
	}
	if err := checkClaims(csr, plan); err != nil {
		return nil, err
	}
	if issuer != nil {
		if plan, err = underIssuer(plan, issuer); err != nil {
			return nil, err
		}
	}
	if len(plan.Serial) == 0 {
		plan.Serial = newSerial()
	}
	p := &Prepared{plan: plan, issuer: issuer, csr: pemRequest(csr.Raw)}
	if p.tbs, err = predict(plan, issuer); err != nil {
		return nil, err
	}
	return p, nil
}

// underIssuer clamps the plan to its issuer, and refuses what cfssl would sign unasked: under an issuer that may not sign
// it, is not valid now, or ends too soon.
func underIssuer(plan ca.Plan, issuer *x509.Certificate) (ca.Plan, error) {
	now := plan.Now()
	name := fmt.Sprintf("%q", issuer.Subject.CommonName)
	stamp := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	switch {
	case now.After(issuer.NotAfter):
		return plan, fmt.Errorf("root %s expired on %s, and now is %s: nothing it signs would be accepted; make a new root", name, stamp(issuer.NotAfter), stamp(now))
	case now.Before(issuer.NotBefore):
		return plan, fmt.Errorf("root %s begins on %s, and now is %s: set the clock right or wait", name, stamp(issuer.NotBefore), stamp(now))
	case !issuer.BasicConstraintsValid || !issuer.IsCA || issuer.KeyUsage&x509.KeyUsageCertSign == 0:
		return plan, fmt.Errorf("root %s is not a CA that may sign certificates", name)
	case issuer.MaxPathLen == 0 && issuer.MaxPathLenZero:
		return plan, fmt.Errorf("root %s has path length 0 and may sign no CA (RFC 5280 §4.2.1.9)", name)
	case issuer.MaxPathLen > 0 && plan.PathLen >= issuer.MaxPathLen:
		return plan, fmt.Errorf("root %s has path length %d, so what it signs must have less than the planned %d", name, issuer.MaxPathLen, plan.PathLen)
	case len(issuer.URIs) != 1 || issuer.URIs[0].String() != plan.TrustDomain.IDString():
		return plan, fmt.Errorf("root %s is not of trust domain %s; sign with the root of that trust domain", name, plan.TrustDomain.Name())
	}
	begins := now
	if plan.NotBefore.After(now) {
		begins = plan.NotBefore
	}
	asked := plan.NotAfter.Sub(begins)
	if plan.NotBefore.Before(issuer.NotBefore) {
		plan.NotBefore = issuer.NotBefore.UTC()
	}
	if plan.NotAfter.After(issuer.NotAfter) {
		plan.NotAfter = issuer.NotAfter.UTC()
		if left := plan.NotAfter.Sub(begins); left < min(asked, ca.MinIntermediateLife) {
			if begins.After(now) {
				return plan, fmt.Errorf("root %s ends on %s: what begins on %s would live shorter than the least useful %s; sign fewer, closer together, or make a new root",
					name, stamp(issuer.NotAfter), stamp(begins), ca.MinIntermediateLife)
			}
			return plan, fmt.Errorf("root %s ends on %s, in %s: what it signs now would live shorter than the least useful %s; make a new root",
				name, stamp(issuer.NotAfter), left.Truncate(time.Second), ca.MinIntermediateLife)
		}
	}
	if !plan.NotAfter.After(now) {
		return plan, fmt.Errorf("the planned certificate ends on %s, and now is %s: it would be signed expired", stamp(plan.NotAfter), stamp(now))
	}
	return plan, plan.Validate()
}

// Sign logs and signs what was prepared, with the issuer's key. It works once. By says on whose word, for the log.
func (p *Prepared) Sign(ctx context.Context, log ca.Log, key crypto.Signer, by *auditv1.Evidence) (*x509.Certificate, audit.Receipt, error) {
	fail := func(err error) (*x509.Certificate, audit.Receipt, error) {
		return nil, audit.Receipt{}, fmt.Errorf("sign %q: %w", p.plan.CommonName, err)
	}
	if !p.spent.CompareAndSwap(false, true) {
		return fail(errors.New("it has been signed already; prepare another"))
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return fail(fmt.Errorf("the signing key's public half can't be encoded: %w", err))
	}
	want := p.plan.SPKI
	if p.issuer != nil {
		want = p.issuer.RawSubjectPublicKeyInfo
	}
	if !bytes.Equal(spki, want) {
		return fail(fmt.Errorf("the key (%s) does not match the certificate it should sign for (%s)", ca.KeyFingerprint(spki), ca.KeyFingerprint(want)))
	}
	receipts, err := log.Append(ctx, []*auditv1.Entry{entryOf(p.plan, p.tbs, by)})
	if err != nil {
		return fail(fmt.Errorf("it could not be logged, so it was not signed: %w", err))
	}
	if len(receipts) != 1 {
		return fail(fmt.Errorf("the log gave %d receipts for one entry, so it was not signed", len(receipts)))
	}
	cert, err := signWithCFSSL(p, key)
	if err != nil {
		return fail(err)
	}
	if !bytes.Equal(cert.RawTBSCertificate, p.tbs) {
		return fail(errors.New("what was signed differs from what was logged; the certificate is discarded"))
	}
	above := p.issuer
	if above == nil {
		above = cert
	}
	if err := cert.CheckSignatureFrom(above); err != nil {
		return fail(fmt.Errorf("the signature is not good; the certificate is discarded: %w", err))
	}
	// What begins later is checked for then.
	check := p.plan
	if begins := check.NotBefore; begins.After(check.Now()) {
		check.Now = func() time.Time { return begins }
	}
	if err := check.Check([]*x509.Certificate{cert}, []*x509.Certificate{above}); err != nil {
		return fail(err)
	}
	return cert, receipts[0], nil
}

// entryOf is what the log keeps of a CA certificate.
func entryOf(p ca.Plan, tbs []byte, by *auditv1.Evidence) *auditv1.Entry {
	return &auditv1.Entry{
		Time: p.Now().UnixNano(),
		Event: &auditv1.Entry_AuthorityCreated{AuthorityCreated: &auditv1.AuthorityCreated{
			Kind: p.Kind, Tbs: tbs, Evidence: by,
		}},
	}
}

// SelfSign makes a root or a control CA in one call: request, Prepare, Sign.
func SelfSign(ctx context.Context, log ca.Log, key crypto.Signer, plan ca.Plan, by *auditv1.Evidence) (*x509.Certificate, audit.Receipt, error) {
	csr, err := Request(key, plan)
	if err != nil {
		return nil, audit.Receipt{}, err
	}
	p, err := Prepare(plan, nil, csr)
	if err != nil {
		return nil, audit.Receipt{}, err
	}
	return p.Sign(ctx, log, key, by)
}

// newSerial gives 158 random bits in the 20 bytes that RFC 5280 §4.1.2.2 allows.
func newSerial() []byte {
	b := make([]byte, 20)
	_, _ = rand.Read(b) // never fails
	b[0] = b[0]&0x3f | 0x40
	return slices.Clip(b)
}
