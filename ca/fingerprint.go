package ca

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"strings"
)

// Fingerprint is a SHA-256 that people compare between two machines.
type Fingerprint [sha256.Size]byte

// KeyFingerprint names a public key for people: the SHA-256 of its SubjectPublicKeyInfo (DER) as "SHA256:ab12:cd34:…",
// lower case in groups of four. `cluster init` prints it and `root sign` wants it (docs/security-model.md: a request
// swapped on its way would get the intermediate).
func KeyFingerprint(spki []byte) string {
	sum := sha256.Sum256(spki)
	return grouped(hex.EncodeToString(sum[:]), 4)
}

// CertificateFingerprint names a certificate for people: the SHA-256 of its DER as "SHA256:AB:CD:…", in the pairs of
// upper-case hex that `openssl x509 -fingerprint -sha256` prints, so that both can be laid side by side.
func CertificateFingerprint(der []byte) string { return FingerprintOf(der).String() }

// FingerprintOf is the SHA-256 of a certificate (DER).
func FingerprintOf(der []byte) Fingerprint { return sha256.Sum256(der) }

// String is the form of CertificateFingerprint.
func (f Fingerprint) String() string { return grouped(strings.ToUpper(hex.EncodeToString(f[:])), 2) }

func grouped(digits string, size int) string {
	var b strings.Builder
	b.WriteString("SHA256")
	for ; digits != ""; digits = digits[size:] {
		b.WriteString(":" + digits[:size])
	}
	return b.String()
}

// ParseFingerprint reads either form, and what openssl prints. It tolerates case, colons and spaces, with or without
// the leading "SHA256:"; everything else must be the 64 digits.
func ParseFingerprint(s string) (Fingerprint, error) {
	var f Fingerprint
	if len(s) > 256 {
		return f, fmt.Errorf("fingerprint of %d characters: want SHA256: and 64 hexadecimal digits", len(s))
	}
	digits := strings.ToLower(strings.TrimSpace(s))
	for _, prefix := range []string{"sha256 fingerprint=", "sha256:"} {
		if rest, ok := strings.CutPrefix(digits, prefix); ok {
			digits = rest
			break
		}
	}
	digits = strings.NewReplacer(":", "", " ", "").Replace(digits)
	raw, err := hex.DecodeString(digits)
	if err != nil || len(raw) != len(f) {
		return f, fmt.Errorf("fingerprint %q: want SHA256: and 64 hexadecimal digits", s)
	}
	copy(f[:], raw)
	return f, nil
}

// Of reports whether f is the SHA-256 of these bytes: a SubjectPublicKeyInfo or a certificate, DER. Constant time.
func (f Fingerprint) Of(der []byte) bool {
	sum := sha256.Sum256(der)
	return subtle.ConstantTimeCompare(f[:], sum[:]) == 1
}
