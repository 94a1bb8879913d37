package keystore

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"io"
	"log/slog"
)

// Algorithms lists what Create takes, the default first.
func Algorithms() []Algorithm {
	return []Algorithm{ECDSAP256, ECDSAP384, RSA2048, RSA3072, RSA4096, Ed25519}
}

// ParseAlgorithm reads the name of an algorithm as configuration and flags give it.
func ParseAlgorithm(s string) (Algorithm, error) {
	for _, a := range Algorithms() {
		if string(a) == s {
			return a, nil
		}
	}
	return "", fmt.Errorf("key algorithm %.64q is unknown: use one of %v", s, Algorithms())
}

func generate(alg Algorithm) (crypto.Signer, error) {
	switch alg {
	case ECDSAP256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case ECDSAP384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case RSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	case RSA3072:
		return rsa.GenerateKey(rand.Reader, 3072)
	case RSA4096:
		return rsa.GenerateKey(rand.Reader, 4096)
	case Ed25519:
		_, key, err := ed25519.GenerateKey(rand.Reader)
		return key, err
	}
	_, err := ParseAlgorithm(string(alg))
	return nil, err
}

// AlgorithmOf names the algorithm of a public key. RSA goes by its bits, whatever they are; "" is another kind.
func AlgorithmOf(public crypto.PublicKey) Algorithm {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return ECDSAP256
		case elliptic.P384():
			return ECDSAP384
		}
	case *rsa.PublicKey:
		return Algorithm(fmt.Sprintf("rsa-%d", k.N.BitLen()))
	case ed25519.PublicKey:
		return Ed25519
	}
	return ""
}

// localKey is a private key in this process, always the same one pointer: crypto/ecdsa keeps what it precomputes per
// pointer. It is behind a function because no printer looks into one, not even by reflection into unexported fields.
type localKey struct {
	ref     Ref
	private func() crypto.Signer
}

var _ Key = (*localKey)(nil)

func newLocalKey(ref Ref, signer crypto.Signer) *localKey {
	return &localKey{ref: ref, private: func() crypto.Signer { return signer }}
}

func (k localKey) Ref() Ref                 { return k.ref }
func (k localKey) Remote() bool             { return false }
func (k localKey) Public() crypto.PublicKey { return k.private().Public() }

// Sign computes in this process, in microseconds to milliseconds: it needs no deadline.
func (k localKey) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return k.private().Sign(r, digest, opts)
}

func (k localKey) String() string               { return "key " + k.ref.String() }
func (k localKey) Format(s fmt.State, _ rune)   { _, _ = io.WriteString(s, k.String()) }
func (k localKey) GoString() string             { return k.String() }
func (k localKey) LogValue() slog.Value         { return slog.StringValue(k.String()) }
func (k localKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// secret keeps a passphrase behind a function, as localKey does a key.
type secret struct{ reveal func() []byte }
