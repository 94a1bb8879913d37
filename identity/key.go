package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
)

// MaxCSR bounds a certificate signing request on our own doors, in bytes.
const MaxCSR = 8 << 10

// PublicKey is a public key of an allowed kind whose holder has proved possession of the private half.
// Only ParseCSR and OwnKey make one.
type PublicKey struct {
	spki []byte
}

// SPKI returns the SubjectPublicKeyInfo, DER. The caller must not change it.
func (k PublicKey) SPKI() []byte { return k.spki }

// ParseCSR takes the public key out of a PKCS#10 request (DER) and nothing else. The request must be small, carry
// neither subject nor extensions (our own doors give names, they don't take them), hold an allowed key, and be signed by it.
// The kind of key is checked before the signature, so that nobody chooses how much work a check is.
func ParseCSR(der []byte) (PublicKey, error) {
	if len(der) > MaxCSR {
		return PublicKey{}, fmt.Errorf("certificate request of %d bytes: at most %d are allowed", len(der), MaxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return PublicKey{}, fmt.Errorf("certificate request is not PKCS#10: %w", err)
	}
	if len(csr.RawSubject) != 2 { // an empty SEQUENCE
		return PublicKey{}, errors.New("certificate request carries a subject: the server gives the name, send a request without one")
	}
	if len(csr.Extensions) != 0 || len(csr.Attributes) != 0 { //nolint:staticcheck // Attributes: anything beside extensions is foreign too
		return PublicKey{}, errors.New("certificate request carries extensions or attributes (a SAN or CA:TRUE, say): the server decides these, send a request without any")
	}
	if err := AllowedKey(csr.PublicKey); err != nil {
		return PublicKey{}, fmt.Errorf("certificate request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return PublicKey{}, fmt.Errorf("certificate request is not signed by its own key: %w", err)
	}
	return PublicKey{spki: csr.RawSubjectPublicKeyInfo}, nil
}

// OwnKey is the public half of a key this process holds.
func OwnKey(s crypto.Signer) (PublicKey, error) {
	if err := AllowedKey(s.Public()); err != nil {
		return PublicKey{}, err
	}
	spki, err := x509.MarshalPKIXPublicKey(s.Public())
	if err != nil {
		return PublicKey{}, fmt.Errorf("encode public key: %w", err)
	}
	return PublicKey{spki: spki}, nil
}

// AllowedKey accepts ECDSA P-256 and P-384, and RSA of 2048 to 4096 bits with exponent 65537.
func AllowedKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
		return fmt.Errorf("unsupported key: ECDSA on %s; use P-256 or P-384", k.Curve.Params().Name)
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < 2048 || n > 4096 || k.E != 65537 {
			return fmt.Errorf("unsupported key: RSA of %d bits with exponent %d; use 2048 to 4096 bits and 65537", n, k.E)
		}
		return nil
	default:
		return fmt.Errorf("unsupported key of type %T; use ECDSA P-256 or P-384, or RSA", pub)
	}
}
