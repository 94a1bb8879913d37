package ca

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/signet-ca/signet/keystore"
)

var algorithms = []keystore.Algorithm{keystore.ECDSAP256, keystore.ECDSAP384, keystore.RSA2048, keystore.RSA3072}

// builders has one leaf builder per issuer algorithm.
func builders(t testing.TB) (all []leafBuilder, certs []*x509.Certificate, keys []crypto.Signer) {
	for _, alg := range algorithms[:3] {
		key := keysByAlgorithm()[alg][1]
		cert := signCA(t, caTemplate("Example "+string(alg), 0), nil, key.Public(), key)
		b, err := newLeafBuilder(cert, key.Public())
		if err != nil {
			t.Fatal(err)
		}
		all, certs, keys = append(all, b), append(certs, cert), append(keys, key)
	}
	return all, certs, keys
}

// createCertificate is the oracle.
func createCertificate(t testing.TB, c leafContent, pub crypto.PublicKey, issuer *x509.Certificate, key crypto.Signer) *x509.Certificate {
	t.Helper()
	id, err := url.Parse(c.spiffeID)
	if err != nil {
		t.Skip(err)
	}
	var spki struct {
		Algorithm asn1.RawValue
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(c.spki, &spki); err != nil {
		t.Fatal(err)
	}
	keyID := sha256.Sum256(spki.Key.Bytes)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(c.serial), NotBefore: c.notBefore, NotAfter: c.notAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, SubjectKeyId: keyID[:20], URIs: []*url.URL{id},
	}, issuer, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// FuzzALeafIsWhatCreateCertificateMakes holds the builder against crypto/x509, byte for byte.
func FuzzALeafIsWhatCreateCertificateMakes(f *testing.F) {
	utcEnd := time.Date(2049, 12, 31, 23, 59, 59, 0, time.UTC).Unix()
	long := strings.Repeat("a/", 1<<10)
	for issuer := range byte(3) {
		for key := range byte(4) {
			f.Add("/ns/shop/sa/web", []byte{0x7f, 2, 3, 4}, noon.Unix(), uint32(86399), issuer, key)
			f.Add("/x", bytes.Repeat([]byte{0x40}, 20), utcEnd, uint32(0), issuer, key)
			f.Add("/x", []byte{1}, utcEnd, uint32(1), issuer, key)
			f.Add("/x", []byte{0, 0x80}, utcEnd+1, uint32(1), issuer, key)
			f.Add("/"+long[:2048-len("spiffe://example.org/")-1]+"z", []byte{0x7f, 0xff}, noon.Unix(), uint32(10), issuer, key)
		}
	}
	// Each length at which a DER length takes another byte.
	for _, n := range []int{20, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 220, 224, 228, 230, 231, 232, 233, 234, 235, 236, 240, 244, 256} {
		f.Add("/"+strings.Repeat("n", n), []byte{5}, noon.Unix(), uint32(60), byte(0), byte(0))
	}
	all, certs, keys := builders(f)
	f.Fuzz(func(t *testing.T, path string, serial []byte, from int64, life uint32, issuer, key byte) {
		serial = derInteger(serial)
		c := leafContent{
			serial: serial, notBefore: time.Unix(from, 0).UTC(), spiffeID: "spiffe://example.org" + path,
		}
		c.notAfter = c.notBefore.Add(time.Duration(life) * time.Second)
		// What the signer sees has passed identity.ParseID; net/url would escape other characters.
		if strings.Trim(path, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._/") != "" ||
			len(path) < 2 || path[0] != '/' || path[1] == '/' || len(c.spiffeID) > 2048 || len(serial) == 0 ||
			c.notBefore.Year() < 1950 || c.notAfter.Year() > 9999 {
			t.Skip()
		}
		pub := keysByAlgorithm()[algorithms[key%4]][0].Public()
		n := issuer % 3
		var err error
		if c.spki, err = x509.MarshalPKIXPublicKey(pub); err != nil {
			t.Fatal(err)
		}
		got, err := all[n].tbs(c)
		if err != nil {
			t.Fatal(err)
		}
		want := createCertificate(t, c, pub, certs[n], keys[n])
		if !bytes.Equal(got, want.RawTBSCertificate) {
			t.Fatalf("differs from x509.CreateCertificate:\n got %x\nwant %x", got, want.RawTBSCertificate)
		}
		// Signature and wrapping, too: the same signature gives the same certificate.
		der, err := all[n].certificate(got, want.Signature)
		if err != nil || !bytes.Equal(der, want.Raw) {
			t.Fatalf("wrapped otherwise than x509.CreateCertificate does: %v\n got %x\nwant %x", err, der, want.Raw)
		}
	})
}

// derInteger makes of any bytes the octets of a positive INTEGER of at most 20, or none.
func derInteger(b []byte) []byte {
	b = bytes.TrimLeft(b[:min(len(b), 19)], "\x00")
	if len(b) > 0 && b[0] >= 0x80 {
		b = append([]byte{0}, b...)
	}
	return b
}

// FuzzNothingUnreadGetsIntoACertificate: a key that the builder takes has one encoding only, and it is that.
func FuzzNothingUnreadGetsIntoACertificate(f *testing.F) {
	for _, alg := range algorithms {
		spki, err := x509.MarshalPKIXPublicKey(keysByAlgorithm()[alg][0].Public())
		if err != nil {
			f.Fatal(err)
		}
		f.Add(spki)
		f.Add(append(bytes.Clone(spki), 0))
	}
	f.Add([]byte{0x30, 0})
	f.Fuzz(func(t *testing.T, spki []byte) {
		if _, err := keyBits(spki); err != nil {
			return
		}
		pub, err := x509.ParsePKIXPublicKey(spki)
		if err != nil {
			return // identity.ParseCSR parses first
		}
		again, err := x509.MarshalPKIXPublicKey(pub)
		if err != nil || !bytes.Equal(again, spki) {
			t.Fatalf("%x was taken, but its DER is %x (%v)", spki, again, err)
		}
	})
}

func TestAKeyWithSomethingBehindItIsRefused(t *testing.T) {
	for _, alg := range algorithms {
		spki, err := x509.MarshalPKIXPublicKey(keysByAlgorithm()[alg][0].Public())
		if err != nil {
			t.Fatal(err)
		}
		var parts struct {
			Algorithm asn1.RawValue
			Key       asn1.BitString
		}
		if _, err := asn1.Unmarshal(spki, &parts); err != nil {
			t.Fatal(err)
		}
		if _, err := keyBits(spki); err != nil {
			t.Errorf("%s: %v", alg, err)
		}
		more := []byte("CA:TRUE")
		longer := parts.Key
		longer.Bytes = append(bytes.Clone(longer.Bytes), more...)
		longer.BitLength += 8 * len(more)
		for where, smuggled := range map[string]any{
			"the key":  struct{ Algorithm, Key, More any }{parts.Algorithm, parts.Key, more},
			"its bits": struct{ Algorithm, Key any }{parts.Algorithm, longer},
		} {
			der, err := asn1.Marshal(smuggled)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := keyBits(der); err == nil {
				t.Errorf("%s: bytes behind %s were taken", alg, where)
			}
		}
	}
}

func TestASerialIsTwentyOctetsAndPositive(t *testing.T) {
	var set, clear [serialLength]byte // bits that were ever 1, ever 0
	for range 2000 {
		var s [serialLength]byte
		newSerial(s[:])
		if s[0]&0xc0 != 0x40 {
			t.Fatalf("%x: not positive and of full length", s)
		}
		for i := range s {
			set[i] |= s[i]
			clear[i] |= ^s[i]
		}
	}
	random := 0
	for i := range set {
		for both := set[i] & clear[i]; both != 0; both &= both - 1 {
			random++
		}
	}
	if random != 158 {
		t.Errorf("%d random bits, want 158", random)
	}
}
