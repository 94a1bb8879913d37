package keystore

import (
	"bytes"
	"crypto/aes"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// The only algorithms of a key file, RFC 8018 appendix A and C.
var (
	oidPBES2          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 13}
	oidPBKDF2         = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 12}
	oidHMACWithSHA256 = asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 9}
	oidAES256CBC      = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}
)

// sealedKey is an EncryptedPrivateKeyInfo (RFC 5958 §3) of the one kind we use, checked before anything is computed.
type sealedKey struct {
	salt, iv, ciphertext []byte
	iterations           int
}

const reencrypt = "encrypt it again with `openssl pkcs8 -topk8 -v2 aes-256-cbc -v2prf hmacWithSHA256 -iter 600000`"

// parseSealed reads a key file. Its errors continue a sentence that begins with the file's name.
func parseSealed(raw []byte, leastIterations int) (*sealedKey, error) {
	notAKey := errors.New("is not a PEM block \"" + pemType + "\" alone: restore it from a backup")
	block, rest := pem.Decode(raw)
	if block == nil || len(block.Headers) != 0 || len(bytes.TrimSpace(rest)) != 0 {
		return nil, notAKey
	}
	switch block.Type {
	case pemType:
	case "PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY":
		return nil, errors.New("holds a key in clear, which is refused: replace the key, or " + reencrypt)
	default:
		return nil, notAKey
	}
	damaged := errors.New("is damaged: it is not an encrypted PKCS#8 key; restore it from a backup")

	var info, alg, scheme, params, kdf, kdfParams, enc, prf, salt, iv, ciphertext cryptobyte.String
	var oid asn1.ObjectIdentifier
	in := cryptobyte.String(block.Bytes)
	if !in.ReadASN1(&info, cbasn1.SEQUENCE) || !in.Empty() ||
		!info.ReadASN1(&alg, cbasn1.SEQUENCE) || !info.ReadASN1(&ciphertext, cbasn1.OCTET_STRING) || !info.Empty() ||
		!alg.ReadASN1ObjectIdentifier(&oid) {
		return nil, damaged
	}
	if !oid.Equal(oidPBES2) {
		return nil, fmt.Errorf("is encrypted by a scheme other than PBES2, which is refused: %s", reencrypt)
	}
	scheme = alg
	if !scheme.ReadASN1(&params, cbasn1.SEQUENCE) || !scheme.Empty() ||
		!params.ReadASN1(&kdf, cbasn1.SEQUENCE) || !params.ReadASN1(&enc, cbasn1.SEQUENCE) || !params.Empty() ||
		!kdf.ReadASN1ObjectIdentifier(&oid) {
		return nil, damaged
	}
	if !oid.Equal(oidPBKDF2) {
		return nil, fmt.Errorf("derives its key by something other than PBKDF2, which is refused: %s", reencrypt)
	}
	// iterations as int64: cryptobyte refuses what is longer, and that is damage or malice.
	var iterations, keyLength int64
	if !kdf.ReadASN1(&kdfParams, cbasn1.SEQUENCE) || !kdf.Empty() ||
		!kdfParams.ReadASN1(&salt, cbasn1.OCTET_STRING) || !kdfParams.ReadASN1Integer(&iterations) {
		return nil, damaged
	}
	if kdfParams.PeekASN1Tag(cbasn1.INTEGER) && (!kdfParams.ReadASN1Integer(&keyLength) || keyLength != 32) {
		return nil, damaged
	}
	// Absent means HMAC-SHA-1.
	if !kdfParams.ReadASN1(&prf, cbasn1.SEQUENCE) || !prf.ReadASN1ObjectIdentifier(&oid) || !oid.Equal(oidHMACWithSHA256) {
		return nil, fmt.Errorf("derives its key with something other than HMAC-SHA-256, which is refused: %s", reencrypt)
	}
	if !kdfParams.Empty() || !prf.Empty() && (!prf.SkipASN1(cbasn1.NULL) || !prf.Empty()) {
		return nil, damaged
	}
	if !enc.ReadASN1ObjectIdentifier(&oid) {
		return nil, damaged
	}
	if !oid.Equal(oidAES256CBC) {
		return nil, fmt.Errorf("is encrypted by a cipher other than AES-256-CBC, which is refused: %s", reencrypt)
	}
	if !enc.ReadASN1(&iv, cbasn1.OCTET_STRING) || !enc.Empty() || len(iv) != aes.BlockSize {
		return nil, damaged
	}
	switch {
	case iterations > maxIterations:
		return nil, fmt.Errorf("wants %d iterations of PBKDF2, more than the allowed %d: %s", iterations, maxIterations, reencrypt)
	case iterations < int64(leastIterations):
		return nil, fmt.Errorf("has only %d iterations of PBKDF2, want at least %d: %s", iterations, leastIterations, reencrypt)
	case len(salt) < leastSalt:
		return nil, fmt.Errorf("has a salt of only %d bytes, want at least %d: %s", len(salt), leastSalt, reencrypt)
	case len(ciphertext) == 0 || len(ciphertext)%aes.BlockSize != 0:
		return nil, damaged
	}
	return &sealedKey{salt: salt, iv: iv, ciphertext: ciphertext, iterations: int(iterations)}, nil
}

// privateKeyInfo takes the padding (RFC 8018 §6.1.1) off a decrypted PrivateKeyInfo and reports whether its frame is
// right: a SEQUENCE of exactly that length that begins with version 0. A wrong passphrase passes once in some 2^40.
func privateKeyInfo(plain []byte) ([]byte, bool) {
	in := cryptobyte.String(plain)
	var der, body cryptobyte.String
	var version int
	if !in.ReadASN1Element(&der, cbasn1.SEQUENCE) {
		return nil, false
	}
	element := der
	if !element.ReadASN1(&body, cbasn1.SEQUENCE) || !body.ReadASN1Integer(&version) || version != 0 || !body.PeekASN1Tag(cbasn1.SEQUENCE) {
		return nil, false
	}
	pad := len(in)
	if pad < 1 || pad > aes.BlockSize {
		return nil, false
	}
	for _, b := range in {
		if int(b) != pad {
			return nil, false
		}
	}
	return der, true
}
