package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/youmark/pkcs8"

	"github.com/signet-ca/signet/ca"
)

// keysIn finds every private key in a folder and below, and names the file by the fingerprint of its public key: PEM, also
// sealed with one of the passphrases, and plain DER of an EC key (RFC 5915) anywhere in a file, as in a database. What it
// can't look into is an error, but for what is gone since it was listed, and for agents' caches, which have a form of their own:
// no key of a CA ever comes to an agent.
func keysIn(dir string, passphrases ...[]byte) (map[string]string, error) {
	found := map[string]string{}
	note := func(path string, key crypto.PrivateKey) error {
		signer, ok := key.(crypto.Signer)
		if !ok {
			return fmt.Errorf("%s: a private key of type %T", path, key)
		}
		spki, err := x509.MarshalPKIXPublicKey(signer.Public())
		if err == nil {
			found[ca.KeyFingerprint(spki)] = path
		}
		return err
	}
	return found, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		var data []byte
		if err == nil && entry.Type().IsRegular() {
			data, err = os.ReadFile(path)
		}
		if errors.Is(err, fs.ErrNotExist) && path != dir {
			return nil
		}
		if err != nil {
			return err
		}
		for rest := data; ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			var key crypto.PrivateKey
			switch block.Type {
			case "PRIVATE KEY":
				key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
			case "EC PRIVATE KEY":
				key, err = x509.ParseECPrivateKey(block.Bytes)
			case "ENCRYPTED PRIVATE KEY":
				err = errors.New("no passphrase opens it")
				for _, p := range passphrases {
					if key, err = pkcs8.ParsePKCS8PrivateKey(block.Bytes, p); err == nil {
						break
					}
				}
			default:
				continue
			}
			if err != nil {
				return fmt.Errorf("%s: a private key that can't be looked into: %w", path, err)
			}
			if err := note(path, key); err != nil {
				return err
			}
		}
		for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
			// version 1, then the scalar as an OCTET STRING.
			size := (curve.Params().BitSize + 7) / 8
			begin := []byte{0x02, 0x01, 0x01, 0x04, byte(size)}
			for rest := data; ; {
				i := bytes.Index(rest, begin)
				if i < 0 || len(rest) < i+len(begin)+size {
					break
				}
				rest = rest[i+len(begin):]
				key, err := ecdsa.ParseRawPrivateKey(curve, rest[:size])
				if err != nil {
					continue // no scalar of this curve
				}
				if err := note(path, key); err != nil {
					return err
				}
			}
		}
		return nil
	})
}
