package ceremony

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/cloudflare/cfssl/csr"
	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
)

// MaxRequest bounds a certificate request in PEM, in bytes.
const MaxRequest = 16 << 10

// MaxRequests bounds the requests of one ceremony.
const MaxRequests = 16

const requestType = "CERTIFICATE REQUEST"

// Request makes the certificate request (PEM) for a planned CA. It carries the planned subject, spiffe://<trust domain>
// and CA:TRUE with the path length, so that whoever signs can compare; a good signer copies none of it.
func Request(key crypto.Signer, plan ca.Plan) ([]byte, error) {
	if err := plan.Validate(); err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("certificate request for %q: encode the public key: %w", plan.CommonName, err)
	}
	if !bytes.Equal(spki, plan.SPKI) {
		return nil, fmt.Errorf("certificate request for %q: the key is %s, the plan is for %s", plan.CommonName, ca.KeyFingerprint(spki), ca.KeyFingerprint(plan.SPKI))
	}
	out, err := csr.Generate(key, &csr.CertificateRequest{
		CN:    plan.CommonName,
		Names: []csr.Name{{O: plan.Organization()}},
		Hosts: []string{plan.TrustDomain.IDString()},
		CA:    &csr.CAConfig{PathLength: plan.PathLen, PathLenZero: plan.PathLen == 0},
	})
	if err != nil {
		return nil, fmt.Errorf("certificate request for %q: %w", plan.CommonName, sentence(err))
	}
	return out, nil
}

// ParseRequest reads one certificate request (PEM) for a CA: small, of an allowed key, and signed by that key.
// The kind of key is checked before the signature, so that nobody chooses how much work a check is.
func ParseRequest(text []byte) (*x509.CertificateRequest, error) {
	if len(text) > MaxRequest {
		return nil, fmt.Errorf("certificate request of %d bytes: at most %d are allowed", len(text), MaxRequest)
	}
	block, rest := pem.Decode(bytes.TrimSpace(text))
	switch {
	case block == nil:
		return nil, errors.New("certificate request is not PEM; give the file that `signet cluster init` wrote")
	case block.Type != requestType:
		return nil, fmt.Errorf("certificate request: the file holds a %.64q; give the file that `signet cluster init` wrote", block.Type)
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, errors.New("certificate request: something follows it in the file; give one request")
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		// encoding/asn1 says why in terms of its own insides, at length.
		return nil, errors.New("certificate request is damaged: it is not in DER (PKCS #10); make it again")
	}
	if err := identity.AllowedKey(req.PublicKey); err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate request is not signed by its own key, so it was altered or damaged; make it again (%w)", err)
	}
	return req, nil
}

func pemRequest(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: requestType, Bytes: der})
}

var (
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidSubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidSubjectKeyID     = asn1.ObjectIdentifier{2, 5, 29, 14}
)

// checkClaims refuses a request that claims something else than is planned. What it doesn't claim does not differ:
// nothing is taken from it but the key.
func checkClaims(req *x509.CertificateRequest, plan ca.Plan) error {
	fail := func(format string, args ...any) error {
		return fmt.Errorf("certificate request does not fit the plan for %q: %w", plan.CommonName, fmt.Errorf(format, args...))
	}
	if !bytes.Equal(req.RawSubjectPublicKeyInfo, plan.SPKI) {
		return fail("its key is %s, planned is %s", ca.KeyFingerprint(req.RawSubjectPublicKeyInfo), ca.KeyFingerprint(plan.SPKI))
	}
	want := plan.TrustDomain.IDString()
	for _, ext := range req.Extensions {
		switch {
		case ext.Id.Equal(oidSubjectAltName):
			if len(req.DNSNames)+len(req.EmailAddresses)+len(req.IPAddresses) > 0 || len(req.URIs) != 1 || req.URIs[0].String() != want {
				if len(req.URIs) == 1 && req.URIs[0].Scheme == "spiffe" {
					return fail("it is for trust domain %.255q, planned is %s", req.URIs[0].Host, plan.TrustDomain.Name())
				}
				return fail("it asks for other names than the one URI %s", want)
			}
		case ext.Id.Equal(oidBasicConstraints):
			isCA, pathLen, ok := basicConstraints(ext.Value)
			if !ok || !isCA {
				return fail("it does not ask for a CA (CA:TRUE)")
			}
			if pathLen != plan.PathLen {
				return fail("it asks for path length %d, planned is %d (-1 is none)", pathLen, plan.PathLen)
			}
		default:
			return fail("it asks for the extension %s, which is not planned", ext.Id)
		}
	}
	if len(req.Subject.Names) > 0 {
		subject := subjectOf(plan).Name()
		if req.Subject.String() != subject.String() {
			return fail("it asks for the name %.256q, planned is %q; is it the request of another cluster?", req.Subject.String(), subject.String())
		}
	}
	return nil
}

// basicConstraints reads the extension's value; path length -1 = none.
func basicConstraints(der []byte) (isCA bool, pathLen int, ok bool) {
	in := cryptobyte.String(der)
	var seq cryptobyte.String
	pathLen = -1
	ok = in.ReadASN1(&seq, cbasn1.SEQUENCE) && in.Empty() &&
		(!seq.PeekASN1Tag(cbasn1.BOOLEAN) || seq.ReadASN1Boolean(&isCA)) &&
		(!seq.PeekASN1Tag(cbasn1.INTEGER) || seq.ReadASN1Integer(&pathLen)) && seq.Empty()
	return isCA, pathLen, ok
}
