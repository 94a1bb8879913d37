// Package keystore keeps private keys: it creates them, opens them, seals them at rest, and hands them out as crypto.Signer
// only. No caller ever sees a key's bytes.
//
// A key is opened by a Ref, which is what others store; never by a path. The backends are File (encrypted PKCS#8, see
// file.go), Memory (keys that end with the process) and Vault's Transit engine (package vault/transit). Join is several of them.
package keystore

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Ref names one version of one key: "file:intermediate@2". It is what is stored beside a certificate.
type Ref struct {
	Backend string
	Name    string
	Version int
}

func (r Ref) String() string { return fmt.Sprintf("%s:%s@%d", r.Backend, r.Name, r.Version) }

// IsZero reports whether the reference names nothing.
func (r Ref) IsZero() bool { return r == Ref{} }

// ParseRef reads what String wrote.
func ParseRef(s string) (Ref, error) {
	backend, rest, ok := strings.Cut(s, ":")
	name, version, ok2 := strings.Cut(rest, "@")
	v, err := strconv.Atoi(version)
	r := Ref{Backend: backend, Name: name, Version: v}
	if !ok || !ok2 || err != nil || v < 1 || backend == "" || validName(name) != nil || r.String() != s {
		return Ref{}, fmt.Errorf("key reference %q: want backend:name@version, for example file:intermediate@1", s)
	}
	return r, nil
}

// Algorithm is what kind of key to create.
type Algorithm string

// The algorithms. Ed25519 is for log checkpoints only: Envoy takes no Ed25519 certificates by default.
const (
	ECDSAP256 Algorithm = "ecdsa-p256"
	ECDSAP384 Algorithm = "ecdsa-p384"
	RSA2048   Algorithm = "rsa-2048"
	RSA3072   Algorithm = "rsa-3072"
	RSA4096   Algorithm = "rsa-4096"
	Ed25519   Algorithm = "ed25519"
)

// Key is a private key in use. Sign bounds its own time: a key may be remote, slow or away, and crypto.Signer has no context.
type Key interface {
	crypto.Signer
	Ref() Ref
	// Remote reports whether signatures come from outside this process, so that each must be verified.
	Remote() bool
}

// Ready says why a key can't sign now, as far as that is known without asking it.
func Ready(k Key) error {
	if r, ok := k.(interface{ Ready() error }); ok {
		return r.Ready()
	}
	return nil
}

// Store is a backend.
type Store interface {
	// Create returns the first version of the named key above after: one that an earlier try has left, if it is of the
	// algorithm, else one that is made now and is durable when Create returns. With the newest number that was ever used as
	// after, no number comes again although its key is gone.
	Create(ctx context.Context, name string, alg Algorithm, after int) (Key, error)
	// Find says which key Create would return, and whether it is there already. It makes nothing, and refuses what Create
	// would refuse, as far as that shows before.
	Find(ctx context.Context, name string, alg Algorithm, after int) (ref Ref, there bool, err error)
	// Open opens a key. ErrNotFound, ErrWrongPassphrase.
	Open(ctx context.Context, ref Ref) (Key, error)
	// List returns the references of all keys, by name and version.
	List(ctx context.Context) ([]Ref, error)
	// Delete destroys a key, durably. One that is not there is no error. Some backends destroy the oldest version of a key
	// only, and never the newest: ErrKept.
	Delete(ctx context.Context, ref Ref) error
}

// Errors that callers tell apart.
var (
	ErrNotFound        = errors.New("no such key")
	ErrWrongPassphrase = errors.New("wrong passphrase")
	// ErrAway: the backend of a key can't be reached now.
	ErrAway = errors.New("the keys are away")
	// ErrKept: a key can't be destroyed yet, since its backend destroys only what is oldest and not newest, or is not
	// configured (Join).
	ErrKept = errors.New("the key can't be destroyed yet")
)

// validName allows 1 to 63 of [a-z0-9-], beginning with a letter: a file name and a path segment everywhere.
func validName(s string) error {
	ok := len(s) >= 1 && len(s) <= 63 && s[0] >= 'a' && s[0] <= 'z'
	for i := 0; ok && i < len(s); i++ {
		c := s[i]
		ok = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-'
	}
	if !ok {
		return fmt.Errorf("key name %q: use 1 to 63 of a-z, 0-9 and '-', beginning with a letter", s)
	}
	return nil
}
