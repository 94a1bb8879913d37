package ceremony

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"sync/atomic"

	"github.com/cloudflare/cfssl/config"
	"github.com/cloudflare/cfssl/csr"
	cferr "github.com/cloudflare/cfssl/errors"
	cflog "github.com/cloudflare/cfssl/log"
	"github.com/cloudflare/cfssl/signer"
	"github.com/cloudflare/cfssl/signer/local"

	"github.com/signet-ca/signet/ca"
)

// cfssl writes a line to stderr for every request and signature. Whatever goes wrong comes back as an error as well.
func init() { cflog.Level = cflog.LevelFatal + 1 }

// subjectOf is the subject of a planned CA.
func subjectOf(plan ca.Plan) *signer.Subject {
	return &signer.Subject{CN: plan.CommonName, Names: []csr.Name{{O: plan.Organization()}}}
}

// policyOf compiles a plan into cfssl's words. There is one profile and it is the default one, because cfssl takes the
// default for every name it doesn't know.
func policyOf(plan ca.Plan) *config.Signing {
	return &config.Signing{Default: &config.SigningProfile{
		Usage: []string{"cert sign", "crl sign"}, // cfssl drops words it doesn't know; Plan.Check would miss them
		// Unused, since every request brings its own times, but a policy without is invalid.
		Expiry:       plan.NotAfter.Sub(plan.NotBefore),
		CAConstraint: config.CAConstraint{IsCA: true, MaxPathLen: plan.PathLen, MaxPathLenZero: plan.PathLen == 0},
		// nil would copy the subject and every name from the request.
		CSRWhitelist: &config.CSRWhitelist{PublicKey: true, PublicKeyAlgorithm: true},
		// cfssl drops URI names from CA certificates, and makes a SHA-1 key identifier: both go in as raw extensions.
		ExtensionWhitelist:          map[string]bool{oidSubjectAltName.String(): true, oidSubjectKeyID.String(): true},
		ClientProvidesSerialNumbers: true,
	}}
}

// extensions are the raw ones: the subject key identifier and spiffe://<trust domain> (X509-SVID §2, §4.1).
func extensions(plan ca.Plan) ([]pkix.Extension, error) {
	id, err := ca.KeyID(plan.SPKI)
	if err != nil {
		return nil, err
	}
	ski, err := asn1.Marshal(id)
	if err != nil {
		return nil, fmt.Errorf("encode the subject key identifier: %w", err)
	}
	uri := asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(plan.TrustDomain.IDString())} // uniformResourceIdentifier
	san, err := asn1.Marshal([]asn1.RawValue{uri})
	if err != nil {
		return nil, fmt.Errorf("encode the subject alternative name: %w", err)
	}
	return []pkix.Extension{{Id: oidSubjectKeyID, Value: ski}, {Id: oidSubjectAltName, Value: san}}, nil
}

// template is what cfssl is expected to make of the plan.
func template(plan ca.Plan) (*x509.Certificate, error) {
	pub, err := x509.ParsePKIXPublicKey(plan.SPKI)
	if err != nil {
		return nil, fmt.Errorf("read the planned public key: %w", err)
	}
	extra, err := extensions(plan)
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber:          new(big.Int).SetBytes(plan.Serial),
		Subject:               subjectOf(plan).Name(),
		NotBefore:             plan.NotBefore.UTC(),
		NotAfter:              plan.NotAfter.UTC(),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLen:            plan.PathLen,
		MaxPathLenZero:        plan.PathLen == 0,
		ExtraExtensions:       extra,
		PublicKey:             pub,
	}, nil
}

// predict makes the bytes that will be signed, and lints them, without the issuer's key.
func predict(plan ca.Plan, issuer *x509.Certificate) ([]byte, error) {
	t, err := template(plan)
	if err != nil {
		return nil, err
	}
	parent, signingKey := *t, t.PublicKey
	if issuer != nil {
		parent, signingKey = *issuer, issuer.PublicKey
	}
	throwAway, err := likeKey(signingKey)
	if err != nil {
		return nil, err
	}
	// crypto/x509 wants the parent's key to be the signing one, if it knows it.
	parent.PublicKey = nil
	der, err := x509.CreateCertificate(rand.Reader, t, &parent, t.PublicKey, throwAway)
	if err != nil {
		return nil, fmt.Errorf("build the certificate of %q: %w", plan.CommonName, err)
	}
	predicted, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read back the certificate of %q: %w", plan.CommonName, err)
	}
	if issuer == nil {
		// zlint allows a missing authority key identifier only to what verifiably signs itself, so for the lints
		// the throw-away key is also the certificate's own.
		if der, err = x509.CreateCertificate(rand.Reader, t, &parent, throwAway.Public(), throwAway); err != nil {
			return nil, fmt.Errorf("build the certificate of %q for linting: %w", plan.CommonName, err)
		}
	}
	if err := lintCertificate(der); err != nil {
		return nil, fmt.Errorf("the planned certificate of %q is not one that may be signed: %w", plan.CommonName, err)
	}
	return predicted.RawTBSCertificate, nil
}

// likeKey makes a key that signs with the same algorithm.
func likeKey(pub crypto.PublicKey) (crypto.Signer, error) {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.GenerateKey(k.Curve, rand.Reader)
	case *rsa.PublicKey:
		// SHA-256 with RSA whatever the size, so the quickest will do.
		return rsa.GenerateKey(rand.Reader, 2048)
	}
	return nil, fmt.Errorf("issuer has an unsupported key of type %T", pub)
}

// signWithCFSSL has cfssl sign what was prepared. Its signer is made for this one certificate: for a CA that signs itself
// cfssl changes the signer while signing.
func signWithCFSSL(p *Prepared, key crypto.Signer) (*x509.Certificate, error) {
	lent := &lentKey{key: key, tbs: p.tbs}
	s, err := local.NewSigner(lent, p.issuer, signer.DefaultSigAlgo(lent), policyOf(p.plan))
	if err != nil {
		return nil, fmt.Errorf("cfssl refuses key or policy: %w", sentence(err))
	}
	extra, err := extensions(p.plan)
	if err != nil {
		return nil, err
	}
	req := signer.SignRequest{
		Request:   string(p.csr),
		Subject:   subjectOf(p.plan),
		Serial:    new(big.Int).SetBytes(p.plan.Serial),
		NotBefore: p.plan.NotBefore,
		NotAfter:  p.plan.NotAfter,
	}
	for _, e := range extra {
		req.Extensions = append(req.Extensions, signer.Extension{ID: config.OID(e.Id), Critical: e.Critical, Value: hex.EncodeToString(e.Value)})
	}
	text, err := s.Sign(req)
	if err != nil {
		return nil, fmt.Errorf("cfssl could not sign: %w", sentence(err))
	}
	block, rest := pem.Decode(text)
	if block == nil || len(rest) > 0 {
		return nil, errors.New("cfssl returned something else than one certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}

// sentence takes the message out of cfssl's errors, which print as JSON and wrap nothing.
func sentence(err error) error {
	if e := (*cferr.Error)(nil); errors.As(err, &e) {
		return errors.New(e.Message)
	}
	return err
}

// lentKey is a key lent for one signature over known bytes.
type lentKey struct {
	key   crypto.Signer
	tbs   []byte
	spent atomic.Bool
}

func (k *lentKey) Public() crypto.PublicKey { return k.key.Public() }

func (k *lentKey) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	h := opts.HashFunc()
	if h == 0 || !h.Available() {
		return nil, errors.New("asked to sign without a digest")
	}
	want := h.New()
	want.Write(k.tbs)
	if string(digest) != string(want.Sum(nil)) {
		return nil, errors.New("asked to sign something else than what was logged")
	}
	if !k.spent.CompareAndSwap(false, true) {
		return nil, errors.New("asked to sign a second time")
	}
	return k.key.Sign(r, digest, opts)
}
