package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
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
// neither subject nor attributes, in which extensions travel (our own doors give names, they don't take them), hold an
// allowed key, and be signed by it. The kind of key is checked before the signature, so that nobody chooses how much work a
// check is.
func ParseCSR(der []byte) (PublicKey, error) {
	if len(der) > MaxCSR {
		return PublicKey{}, fmt.Errorf("certificate request of %d bytes: at most %d are allowed", len(der), MaxCSR)
	}
	// Looked at in the bytes and before all else: x509 reads a good part of the extensions, repeats some in its errors, and
	// silently drops attributes that it doesn't understand.
	switch subject, attributes, ok := foreignParts(der); {
	case !ok:
		return PublicKey{}, errors.New("certificate request is not PKCS#10 in DER")
	case subject:
		return PublicKey{}, errors.New("certificate request carries a subject: the server gives the name, send a request without one")
	case attributes:
		return PublicKey{}, errors.New("certificate request carries extensions or attributes (a SAN or CA:TRUE, say): the server decides these, send a request without any")
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return PublicKey{}, fmt.Errorf("certificate request is not PKCS#10: %w", err)
	}
	if err := AllowedKey(csr.PublicKey); err != nil {
		return PublicKey{}, fmt.Errorf("certificate request: %w", err)
	}
	switch csr.SignatureAlgorithm {
	case x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512,
		x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA, x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS:
	default: // Go still verifies SHA-1 here
		return PublicKey{}, fmt.Errorf("certificate request is signed with %s: sign it with SHA-256 or stronger", csr.SignatureAlgorithm)
	}
	if err := csr.CheckSignature(); err != nil {
		return PublicKey{}, fmt.Errorf("certificate request is not signed by its own key: %w", err)
	}
	// What was checked is the parsed key, what is certified is bytes: they must be the same thing.
	spki, err := x509.MarshalPKIXPublicKey(csr.PublicKey)
	if err != nil || !bytes.Equal(spki, csr.RawSubjectPublicKeyInfo) {
		return PublicKey{}, errors.New("certificate request does not encode its public key in DER")
	}
	return PublicKey{spki: spki}, nil
}

// foreignParts reports whether a PKCS#10 request (RFC 2986 §4) holds more than a key; ok is false when it is none.
func foreignParts(der []byte) (subject, attributes, ok bool) {
	in := cryptobyte.String(der)
	var request, info, name, attrs cryptobyte.String
	var present bool
	ok = in.ReadASN1(&request, cbasn1.SEQUENCE) && in.Empty() &&
		request.ReadASN1(&info, cbasn1.SEQUENCE) &&
		info.SkipASN1(cbasn1.INTEGER) && info.ReadASN1(&name, cbasn1.SEQUENCE) && info.SkipASN1(cbasn1.SEQUENCE) &&
		info.ReadOptionalASN1(&attrs, &present, cbasn1.Tag(0).ContextSpecific().Constructed()) && info.Empty()
	return !name.Empty(), !attrs.Empty(), ok
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
	case nil:
		return errors.New("unsupported key of an unknown kind; use ECDSA P-256 or P-384, or RSA")
	default:
		return fmt.Errorf("unsupported key of type %T; use ECDSA P-256 or P-384, or RSA", pub)
	}
}
