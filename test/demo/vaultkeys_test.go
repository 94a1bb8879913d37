package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"

	"github.com/youmark/pkcs8"

	"github.com/signet-ca/signet/ca"
)

// The demo says that no key of a CA lies in a folder: the search has to find one in every form.
func TestAKeyIsFoundInEveryForm(t *testing.T) {
	passphrase := []byte("a passphrase")
	for form, encode := range map[string]func(*ecdsa.PrivateKey) ([]byte, error){
		"PKCS #8": func(k *ecdsa.PrivateKey) ([]byte, error) {
			der, err := x509.MarshalPKCS8PrivateKey(k)
			return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), err
		},
		"SEC 1": func(k *ecdsa.PrivateKey) ([]byte, error) {
			der, err := x509.MarshalECPrivateKey(k)
			return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), err
		},
		"sealed": func(k *ecdsa.PrivateKey) ([]byte, error) {
			der, err := pkcs8.MarshalPrivateKey(k, passphrase, nil)
			return append([]byte("a line before\n"), pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: der})...), err
		},
		"DER in a database": func(k *ecdsa.PrivateKey) ([]byte, error) {
			der, err := x509.MarshalPKCS8PrivateKey(k)
			return append(append(make([]byte, 4096), der...), 1, 2, 3), err
		},
	} {
		for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
			key, err := ecdsa.GenerateKey(curve, rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			data, err := encode(key)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			path := filepath.Join(dir, "below", "file")
			if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			found, err := keysIn(dir, []byte("not this one"), passphrase)
			if err != nil {
				t.Fatal(err)
			}
			if got := found[fingerprint(t, key.Public())]; got != path || len(found) != 1 {
				t.Errorf("%s on %s: found %v", form, curve.Params().Name, found)
			}
			if _, err := keysIn(dir, []byte("another")); form == "sealed" && err == nil {
				t.Error("what could not be opened passes for nothing")
			}
		}
	}
}

func fingerprint(t *testing.T, public crypto.PublicKey) string {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return ca.KeyFingerprint(spki)
}
