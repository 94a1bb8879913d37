package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// leafBuilder writes the leaves of one issuer. Everything that is the same in all of them is encoded once.
// What it writes is, byte for byte, what x509.CreateCertificate makes of the same input.
type leafBuilder struct {
	algorithm x509.SignatureAlgorithm
	hash      crypto.Hash
	sigAlg    []byte // AlgorithmIdentifier
	issuer    []byte // Name, as in the issuer's certificate
	authority []byte // the authority key identifier extension
}

// leafContent is what differs between the leaves of an issuer.
type leafContent struct {
	serial              []byte // an INTEGER's octets: positive, shortest form, at most 20 (RFC 5280 §4.1.2.2)
	notBefore, notAfter time.Time
	spiffeID            string
	spki                []byte
}

// The DER of what every leaf carries.
var (
	version3 = []byte{0xa0, 0x03, 0x02, 0x01, 0x02}
	// Empty: the name is the SAN (X509-SVID §3.1).
	emptyName = []byte{0x30, 0x00}
	// keyUsage, critical, digitalSignature alone, also for RSA keys (X509-SVID §4.3).
	extKeyUsage = []byte{0x30, 0x0e, 0x06, 0x03, 0x55, 0x1d, 0x0f, 0x01, 0x01, 0xff, 0x04, 0x04, 0x03, 0x02, 0x07, 0x80}
	// extendedKeyUsage, serverAuth and clientAuth (X509-SVID §4.4: both or none).
	extExtendedKeyUsage = []byte{
		0x30, 0x1d, 0x06, 0x03, 0x55, 0x1d, 0x25, 0x04, 0x16, 0x30, 0x14,
		0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01,
		0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02,
	}
	// basicConstraints, critical, cA FALSE by default (X509-SVID §4.1).
	extBasicConstraints = []byte{0x30, 0x0c, 0x06, 0x03, 0x55, 0x1d, 0x13, 0x01, 0x01, 0xff, 0x04, 0x02, 0x30, 0x00}

	// subjectKeyIdentifier, up to its 20 octets.
	extSubjectKeyID = []byte{0x30, 0x1d, 0x06, 0x03, 0x55, 0x1d, 0x0e, 0x04, 0x16, 0x04, 0x14}

	oidAuthorityKeyID = []byte{0x06, 0x03, 0x55, 0x1d, 0x23}
	oidSubjectAltName = []byte{0x06, 0x03, 0x55, 0x1d, 0x11}
	derTrue           = []byte{0x01, 0x01, 0xff}

	sigECDSAWithSHA256 = []byte{0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02}
	sigECDSAWithSHA384 = []byte{0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x03}
	sigSHA256WithRSA   = []byte{0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b, 0x05, 0x00}

	keyP256 = []byte{0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}
	keyP384 = []byte{0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22}
	keyRSA  = []byte{0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00}
)

// newLeafBuilder takes the signature algorithm from the issuer's key: SHA-256, and SHA-384 with P-384.
func newLeafBuilder(issuer *x509.Certificate, pub crypto.PublicKey) (leafBuilder, error) {
	b := leafBuilder{issuer: issuer.RawSubject}
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			b.algorithm, b.hash, b.sigAlg = x509.ECDSAWithSHA256, crypto.SHA256, sigECDSAWithSHA256
		case elliptic.P384():
			b.algorithm, b.hash, b.sigAlg = x509.ECDSAWithSHA384, crypto.SHA384, sigECDSAWithSHA384
		}
	case *rsa.PublicKey:
		b.algorithm, b.hash, b.sigAlg = x509.SHA256WithRSA, crypto.SHA256, sigSHA256WithRSA
	}
	if b.sigAlg == nil {
		return leafBuilder{}, fmt.Errorf("no signature algorithm for a key of type %T", pub)
	}
	var ext cryptobyte.Builder
	ext.AddASN1(asn1.SEQUENCE, func(ext *cryptobyte.Builder) {
		ext.AddBytes(oidAuthorityKeyID)
		ext.AddASN1(asn1.OCTET_STRING, func(v *cryptobyte.Builder) {
			v.AddASN1(asn1.SEQUENCE, func(v *cryptobyte.Builder) {
				v.AddASN1(asn1.Tag(0).ContextSpecific(), func(v *cryptobyte.Builder) { v.AddBytes(issuer.SubjectKeyId) })
			})
		})
	})
	var err error
	if b.authority, err = ext.Bytes(); err != nil {
		return leafBuilder{}, fmt.Errorf("encode the authority key identifier: %w", err)
	}
	return b, nil
}

// newSerial fills s with 158 random bits: positive, always 20 octets, the most RFC 5280 §4.1.2.2 allows.
func newSerial(s []byte) {
	rand.Read(s) // never fails
	s[0] = s[0]&0x3f | 0x40
}

const serialLength = 20

// tbs writes the TBSCertificate (RFC 5280 §4.1). The SAN is one URI, and there is no way to ask for another name.
func (b *leafBuilder) tbs(c leafContent) ([]byte, error) {
	keyBits, err := keyBits(c.spki)
	if err != nil {
		return nil, err
	}
	// RFC 7093 §2 (1), as Go does for CAs; RFC 5280 §4.2.1.2 wants one in leaves too.
	keyID := sha256.Sum256(keyBits)
	const fixed = 256 // more than everything whose length is not added here
	out := cryptobyte.NewBuilder(make([]byte, 0, fixed+len(b.issuer)+len(b.authority)+len(c.spki)+len(c.spiffeID)))
	out.AddASN1(asn1.SEQUENCE, func(t *cryptobyte.Builder) {
		t.AddBytes(version3)
		t.AddUint8(uint8(asn1.INTEGER))
		t.AddUint8(uint8(len(c.serial)))
		t.AddBytes(c.serial)
		t.AddBytes(b.sigAlg)
		t.AddBytes(b.issuer)
		t.AddASN1(asn1.SEQUENCE, func(t *cryptobyte.Builder) {
			addTime(t, c.notBefore)
			addTime(t, c.notAfter)
		})
		t.AddBytes(emptyName)
		t.AddBytes(c.spki)
		t.AddASN1(asn1.Tag(3).ContextSpecific().Constructed(), func(t *cryptobyte.Builder) {
			t.AddASN1(asn1.SEQUENCE, func(t *cryptobyte.Builder) {
				t.AddBytes(extKeyUsage)
				t.AddBytes(extExtendedKeyUsage)
				t.AddBytes(extBasicConstraints)
				t.AddBytes(extSubjectKeyID)
				t.AddBytes(keyID[:20])
				t.AddBytes(b.authority)
				t.AddASN1(asn1.SEQUENCE, func(ext *cryptobyte.Builder) {
					ext.AddBytes(oidSubjectAltName)
					ext.AddBytes(derTrue) // critical: RFC 5280 §4.2.1.6, for the subject is empty
					ext.AddASN1(asn1.OCTET_STRING, func(v *cryptobyte.Builder) {
						v.AddASN1(asn1.SEQUENCE, func(v *cryptobyte.Builder) {
							v.AddASN1(asn1.Tag(6).ContextSpecific(), func(v *cryptobyte.Builder) { v.AddBytes([]byte(c.spiffeID)) })
						})
					})
				})
			})
		})
	})
	return out.Bytes()
}

// certificate puts a signature to what was signed.
func (b *leafBuilder) certificate(tbs, signature []byte) ([]byte, error) {
	const headers = 16
	out := cryptobyte.NewBuilder(make([]byte, 0, headers+len(tbs)+len(b.sigAlg)+len(signature)))
	out.AddASN1(asn1.SEQUENCE, func(c *cryptobyte.Builder) {
		c.AddBytes(tbs)
		c.AddBytes(b.sigAlg)
		c.AddASN1BitString(signature)
	})
	return out.Bytes()
}

// addTime writes a time as RFC 5280 §4.1.2.5 wants it: UTCTime through 2049, GeneralizedTime from 2050.
func addTime(b *cryptobyte.Builder, t time.Time) {
	tag, layout := asn1.UTCTime, "060102150405Z"
	if t = t.UTC(); t.Year() >= 2050 {
		tag, layout = asn1.GeneralizedTime, "20060102150405Z"
	}
	b.AddUint8(uint8(tag))
	b.AddUint8(uint8(len(layout)))
	b.AddBytes([]byte(t.Format(layout)))
}

// keyBits returns the subjectPublicKey bits of an SPKI. It takes only the one DER form of each allowed kind of key:
// encoding/asn1 skips what follows inside a SEQUENCE, and nothing unread may get into a certificate.
func keyBits(spki []byte) ([]byte, error) {
	var outer, algorithm cryptobyte.String
	var bits []byte
	in := cryptobyte.String(spki)
	if !in.ReadASN1(&outer, asn1.SEQUENCE) || !in.Empty() ||
		!outer.ReadASN1(&algorithm, asn1.SEQUENCE) || !outer.ReadASN1BitStringAsBytes(&bits) || !outer.Empty() {
		return nil, errNotSPKI
	}
	ok := false
	switch string(algorithm) {
	case string(keyP256):
		ok = len(bits) == 65 && bits[0] == 4 // uncompressed
	case string(keyP384):
		ok = len(bits) == 97 && bits[0] == 4
	case string(keyRSA):
		var n, e cryptobyte.String
		key := cryptobyte.String(bits)
		ok = key.ReadASN1(&outer, asn1.SEQUENCE) && key.Empty() &&
			outer.ReadASN1(&n, asn1.INTEGER) && outer.ReadASN1(&e, asn1.INTEGER) && outer.Empty()
	}
	if !ok {
		return nil, errNotSPKI
	}
	return bits, nil
}

var errNotSPKI = errors.New("its public key is not the DER of an ECDSA P-256, P-384 or RSA key; make a new key with a current tool")
