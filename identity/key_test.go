package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net/url"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

var rsa2048 = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

func rsaKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa2048()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func ecKey(t testing.TB, c elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(c, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func csrOf(t testing.TB, key crypto.Signer, change ...func(*x509.CertificateRequest)) []byte {
	t.Helper()
	req := &x509.CertificateRequest{}
	for _, f := range change {
		f(req)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, req, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// forge builds a PKCS#10 request from its parts; sign nil leaves a signature of noise.
func forge(t testing.TB, spki, attributes []byte, sign crypto.Signer) []byte {
	t.Helper()
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(0)
		b.AddASN1(cbasn1.SEQUENCE, func(*cryptobyte.Builder) {})
		b.AddBytes(spki)
		b.AddASN1(cbasn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) { b.AddBytes(attributes) })
	})
	info := b.BytesOrPanic()
	signature := make([]byte, 64)
	if sign != nil {
		h := crypto.SHA256.New()
		h.Write(info)
		var err error
		if signature, err = sign.Sign(rand.Reader, h.Sum(nil), crypto.SHA256); err != nil {
			t.Fatal(err)
		}
	}
	var out cryptobyte.Builder
	out.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(info)
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			if _, ok := sign.(*rsa.PrivateKey); ok {
				b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}) // sha256WithRSAEncryption
				b.AddASN1NULL()
				return
			}
			b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}) // ecdsa-with-SHA256
		})
		b.AddASN1BitString(signature)
	})
	return out.BytesOrPanic()
}

func spkiOf(t testing.TB, pub any) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// rsaSPKI encodes any numbers as an RSA key: what a stranger may send, not what a library would make.
func rsaSPKI(numbers ...*big.Int) []byte {
	var key cryptobyte.Builder
	key.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		for _, n := range numbers {
			b.AddASN1BigInt(n)
		}
	})
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1})
			b.AddASN1NULL()
		})
		b.AddASN1BitString(key.BytesOrPanic())
	})
	return b.BytesOrPanic()
}

func odd(bits int) *big.Int {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	return n.Add(n, big.NewInt(12345))
}

func TestARequestGivesItsKeyAndNothingElse(t *testing.T) {
	for name, key := range map[string]crypto.Signer{"P-256": ecKey(t, elliptic.P256()), "P-384": ecKey(t, elliptic.P384()), "RSA-2048": rsaKey(t)} {
		k, err := ParseCSR(csrOf(t, key))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !bytes.Equal(k.SPKI(), spkiOf(t, key.Public())) {
			t.Errorf("%s: another key came out", name)
		}
		own, err := OwnKey(key)
		if err != nil || !bytes.Equal(own.SPKI(), k.SPKI()) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRequestsThatWantMoreThanAKeyAreRefused(t *testing.T) {
	key := ecKey(t, elliptic.P256())
	uri, _ := url.Parse("spiffe://example.org/signet/cluster/east/server/x")
	caTrue, err := asn1.Marshal(struct{ IsCA bool }{true})
	if err != nil {
		t.Fatal(err)
	}
	// A challengePassword (RFC 2985 §5.4.1): Go's parser drops it without a word.
	var password cryptobyte.Builder
	password.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7})
		b.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) {
			b.AddASN1(cbasn1.UTF8String, func(b *cryptobyte.Builder) { b.AddBytes([]byte("secret")) })
		})
	})
	spki := spkiOf(t, key.Public())
	p256 := spkiOf(t, ecKey(t, elliptic.P256()).Public())
	offCurve := bytes.Clone(p256)
	offCurve[len(offCurve)-1] ^= 1
	trailing := append(csrOf(t, key), 0)
	huge := csrOf(t, key, func(r *x509.CertificateRequest) { r.Subject.CommonName = strings.Repeat("a", MaxCSR) })
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tampered := csrOf(t, key)
	tampered[len(tampered)-1] ^= 1
	sha1 := csrOf(t, key)
	sha1 = bytes.Replace(sha1, []byte{0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2}, []byte{0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 1}, 1) // as long an OID, of no known algorithm

	for name, c := range map[string]struct {
		der   []byte
		about string
	}{
		"subject": {csrOf(t, key, func(r *x509.CertificateRequest) { r.Subject = pkix.Name{CommonName: "admin"} }), "carries a subject"},
		"URI SAN": {csrOf(t, key, func(r *x509.CertificateRequest) { r.URIs = []*url.URL{uri} }), "extensions or attributes"},
		"DNS SAN": {csrOf(t, key, func(r *x509.CertificateRequest) { r.DNSNames = []string{"a"} }), "extensions or attributes"},
		"bad SAN": {csrOf(t, key, func(r *x509.CertificateRequest) { r.DNSNames = []string{strings.Repeat("a", 4000)} }), "extensions or attributes"},
		"CA:TRUE": {csrOf(t, key, func(r *x509.CertificateRequest) {
			r.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Value: caTrue}}
		}), "extensions or attributes"},
		"attribute":          {forge(t, spki, password.BytesOrPanic(), key), "extensions or attributes"},
		"P-224":              {csrOf(t, ecKey(t, elliptic.P224())), "P-224; use P-256"},
		"P-521":              {csrOf(t, ecKey(t, elliptic.P521())), "P-521; use P-256"},
		"Ed25519":            {csrOf(t, ed), "unsupported key"},
		"RSA-1024":           {csrOf(t, small), "RSA of 1024 bits"},
		"RSA-4097":           {forge(t, rsaSPKI(odd(4097), big.NewInt(65537)), nil, nil), "RSA of 4097 bits"},
		"RSA-16384":          {forge(t, rsaSPKI(odd(16384), big.NewInt(65537)), nil, nil), "RSA of 16384 bits"},
		"exponent 3":         {forge(t, rsaSPKI(odd(2048), big.NewInt(3)), nil, nil), "exponent 3"},
		"exponent 2^64":      {forge(t, rsaSPKI(odd(2048), new(big.Int).Lsh(big.NewInt(1), 64)), nil, nil), "not PKCS#10"},
		"more than a key":    {forge(t, rsaSPKI(rsaKey(t).N, big.NewInt(65537), odd(128)), nil, rsaKey(t)), "does not encode its public key"},
		"off the curve":      {forge(t, offCurve, nil, key), "not PKCS#10"},
		"victim's key":       {forge(t, p256, nil, key), "not signed by its own key"},
		"signature":          {tampered, "not signed by its own key"},
		"unknown signature":  {sha1, "sign it with SHA-256"},
		"trailing byte":      {trailing, "not PKCS#10"},
		"garbage":            {bytes.Repeat([]byte{0xA5}, 300), "not PKCS#10"},
		"nothing":            {nil, "not PKCS#10"},
		"a certificate":      {spki, "not PKCS#10"},
		"one byte too large": {make([]byte, MaxCSR+1), "at most 8192"},
		"too large":          {huge, "at most 8192"},
		"as large as may be": {make([]byte, MaxCSR), "not PKCS#10"},
	} {
		t.Run(name, func(t *testing.T) {
			k, err := ParseCSR(c.der)
			if err == nil || len(k.SPKI()) != 0 {
				t.Fatal("was accepted")
			}
			if !strings.Contains(err.Error(), c.about) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 500 {
				t.Errorf("does not say %q in one sentence: %v", c.about, err)
			}
		})
	}
}

func TestASHA1SignatureIsNoProof(t *testing.T) {
	der := csrOf(t, rsaKey(t), func(r *x509.CertificateRequest) { r.SignatureAlgorithm = x509.SHA256WithRSA })
	// The algorithm is outside what is signed: sha256WithRSAEncryption becomes sha1WithRSAEncryption.
	old, weak := []byte{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 11}, []byte{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 5}
	if !bytes.Contains(der, old) {
		t.Fatal("the request is not signed as expected")
	}
	if _, err := ParseCSR(bytes.Replace(der, old, weak, 1)); err == nil || !strings.Contains(err.Error(), "SHA1-RSA") {
		t.Error(err)
	}
}

func TestKeysOfTheAllowedKindsOnly(t *testing.T) {
	for name, c := range map[string]struct {
		key any
		ok  bool
	}{
		"nil": {nil, false}, "text": {"key", false}, "value": {ecdsa.PublicKey{}, false},
		"RSA-2047": {&rsa.PublicKey{N: odd(2047), E: 65537}, false}, "RSA-2048": {&rsa.PublicKey{N: odd(2048), E: 65537}, true},
		"RSA-4096": {&rsa.PublicKey{N: odd(4096), E: 65537}, true}, "e=17": {&rsa.PublicKey{N: odd(2048), E: 17}, false},
	} {
		if err := AllowedKey(c.key); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OwnKey(ed); err == nil {
		t.Error("an Ed25519 key was taken")
	}
}

func FuzzParseCSR(f *testing.F) {
	key := ecKey(f, elliptic.P256())
	spki := spkiOf(f, key.Public())
	for _, der := range [][]byte{
		csrOf(f, key), csrOf(f, rsaKey(f)), csrOf(f, key, func(r *x509.CertificateRequest) { r.DNSNames = []string{"a"} }),
		forge(f, spki, nil, key), forge(f, rsaSPKI(odd(2048), big.NewInt(3)), nil, nil), nil,
		{0x30, 0x80},
	} {
		f.Add(der)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		k, err := ParseCSR(der)
		if err != nil {
			if len(err.Error()) > 1000 {
				t.Fatalf("error of %d bytes", len(err.Error()))
			}
			return
		}
		csr, err := x509.ParseCertificateRequest(der)
		if err != nil || csr.CheckSignature() != nil || len(csr.Extensions) != 0 || len(csr.Subject.Names) != 0 {
			t.Fatalf("accepted what x509 does not: %v", err)
		}
		pub, err := x509.ParsePKIXPublicKey(k.SPKI())
		if err != nil || AllowedKey(pub) != nil {
			t.Fatalf("accepted a key that is not allowed: %v", err)
		}
	})
}
