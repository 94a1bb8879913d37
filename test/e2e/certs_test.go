//go:build real

package e2e

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"testing"
	"time"

	"github.com/signet-ca/signet/test/lab"
)

// foreignRoot is somebody's root in the trust domain, made without Signet.
type foreignRoot struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

// validity of a certificate, from now.
type validity struct{ from, to time.Duration }

const day = 24 * time.Hour

var goodFor = validity{-time.Hour, 90 * day}

func newRoot(t *testing.T, v validity) foreignRoot {
	t.Helper()
	key := newKey(t)
	template := authority(t, "A root", v)
	template.MaxPathLen, template.SubjectKeyId = 1, keyID(t, key.Public())
	return foreignRoot{key, signed(t, template, template, key.Public(), key)}
}

// sign answers a CSR as `signet root sign` would, but for the validity.
func (r foreignRoot) sign(t *testing.T, csr *x509.CertificateRequest, v validity) *x509.Certificate {
	t.Helper()
	template := authority(t, "", v)
	template.RawSubject = csr.RawSubject
	template.MaxPathLenZero, template.SubjectKeyId = true, keyID(t, csr.PublicKey)
	return signed(t, template, r.cert, csr.PublicKey, r.key)
}

func authority(t *testing.T, name string, v validity) *x509.Certificate {
	serial := make([]byte, 16)
	if _, err := rand.Read(serial); err != nil {
		t.Fatal(err)
	}
	serial[0] = serial[0]&0x7f | 0x40
	now := time.Now().UTC().Truncate(time.Second)
	return &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial), Subject: pkix.Name{CommonName: name, Organization: []string{lab.TrustDomain}},
		NotBefore: now.Add(v.from), NotAfter: now.Add(v.to), BasicConstraintsValid: true, IsCA: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, URIs: []*url.URL{{Scheme: "spiffe", Host: lab.TrustDomain}},
	}
}

func signed(t *testing.T, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func keyID(t *testing.T, pub crypto.PublicKey) []byte {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	id := sha1.Sum(spki) // RFC 5280 §4.2.1.2 method 1, near enough: only that it is there counts
	return id[:]
}

// keyFingerprint of a CSR's key in the form of `cluster init`.
func keyFingerprint(t *testing.T, der []byte) string {
	t.Helper()
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	return fingerprint(csr.RawSubjectPublicKeyInfo)
}

func fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return "SHA256:" + hex.EncodeToString(sum[:])
}

func chainPEM(certs ...*x509.Certificate) string {
	var b bytes.Buffer
	for _, c := range certs {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return b.String()
}

func csrPEM(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func readCerts(t *testing.T, path string) []*x509.Certificate {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var list []*x509.Certificate
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, cert)
	}
	return list
}

func readCSR(t *testing.T, path string) *x509.CertificateRequest {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatalf("%s holds no PEM", path)
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}
