package agent

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/signet-ca/signet/internal/durable"
	"github.com/signet-ca/signet/keystore"
)

const (
	// dataKeyVersion is the form of the data key's file; with it go the algorithms and the iterations.
	dataKeyVersion = 1
	// sealIterations of PBKDF2-HMAC-SHA-256: what the agent's key files have.
	sealIterations = 600_000
	dataKeySize    = 32
	saltSize       = 16
	maxDataKeyFile = 4 << 10
)

// sealMagic begins a sealed file, version included.
const sealMagic = "signet-sealed-1\n"

// errSeal is a file that can't be opened: damaged, sealed by another passphrase, or not where it was written. Which of
// them it is can't be told.
var errSeal = errors.New("it is damaged, was sealed with another passphrase, or belongs elsewhere")

// sealer encrypts the files of one agent. Each file has a key of its own, derived from a data key and from what the file
// is (HKDF-SHA-256), so that a file opens only in the place it was written for, and no AES-GCM key seals more than one
// certificate. The data key is random and lies beside the files, encrypted under the passphrase.
type sealer struct {
	key   []byte
	place []byte
}

// storedDataKey is the data key's file.
type storedDataKey struct {
	Version int    `json:"version"`
	Salt    []byte `json:"salt"`
	Sealed  []byte `json:"sealed"`
}

// place is the identity of a folder of sealed files.
func place(m *member) []byte { return joined(m.TrustDomain, m.Cluster, m.Agent) }

// joined is an unambiguous concatenation.
func joined(parts ...string) []byte {
	var out []byte
	for _, p := range parts {
		out = binary.BigEndian.AppendUint32(out, uint32(len(p))) //nolint:gosec // parts are short
		out = append(out, p...)
	}
	return out
}

// openSealer opens the data key at path. fs.ErrNotExist when there is none, errSeal when it can't be read or does not open;
// every other error is the passphrase's source's.
func openSealer(ctx context.Context, path string, p keystore.Passphrase, place []byte, iterations int) (*sealer, error) {
	raw, err := durable.ReadSecret(path, maxDataKeyFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w: %w", errSeal, err)
	}
	var s storedDataKey
	if json.Unmarshal(raw, &s) != nil || s.Version != dataKeyVersion || len(s.Salt) != saltSize {
		return nil, fmt.Errorf("open %s: %w", path, errSeal)
	}
	a, err := wrapper(ctx, p, s.Salt, iterations)
	if err != nil {
		return nil, err
	}
	key, err := a.Open(nil, nil, s.Sealed, place)
	if err != nil || len(key) != dataKeySize {
		return nil, fmt.Errorf("open %s: %w", path, errSeal)
	}
	return &sealer{key: key, place: place}, nil
}

// makeSealer makes a new data key at path, in place of one that is there.
func makeSealer(ctx context.Context, path string, p keystore.Passphrase, place []byte, iterations int) (*sealer, error) {
	key, s := make([]byte, dataKeySize), storedDataKey{Version: dataKeyVersion, Salt: make([]byte, saltSize)}
	_, _ = rand.Read(key) // never fails (crypto/rand)
	_, _ = rand.Read(s.Salt)
	a, err := wrapper(ctx, p, s.Salt, iterations)
	if err != nil {
		return nil, err
	}
	s.Sealed = a.Seal(nil, nil, key, place)
	raw, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", path, err)
	}
	if err := durable.WriteFile(path, append(raw, '\n'), 0o600); err != nil {
		return nil, err
	}
	return &sealer{key: key, place: place}, nil
}

// wrapper is what encrypts the data key under the passphrase.
func wrapper(ctx context.Context, p keystore.Passphrase, salt []byte, iterations int) (cipher.AEAD, error) {
	pass, err := p.Passphrase(ctx)
	if err != nil {
		return nil, err
	}
	kek, err := pbkdf2.Key(sha256.New, string(pass), salt, iterations, dataKeySize)
	if err != nil {
		return nil, fmt.Errorf("derive a key from the passphrase: %w", err)
	}
	return aead(kek)
}

// aead is AES-256-GCM that makes a random nonce and puts it in front of what it seals.
func aead(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// at is what seals the file of one name and serial.
func (s *sealer) at(name, serial string) (cipher.AEAD, []byte, error) {
	where := slices.Concat([]byte(sealMagic), s.place, joined(name, serial))
	key, err := hkdf.Key(sha256.New, s.key, nil, string(where), dataKeySize)
	if err != nil {
		return nil, nil, err
	}
	a, err := aead(key)
	return a, where, err
}

// seal encrypts data for the file of that name and serial: magic, length and text of the serial, nonce, ciphertext.
func (s *sealer) seal(name, serial string, data []byte) ([]byte, error) {
	if len(serial) > 255 {
		return nil, errors.New("serial is too long")
	}
	a, where, err := s.at(name, serial)
	if err != nil {
		return nil, err
	}
	out := append([]byte(sealMagic), byte(len(serial)))
	return a.Seal(append(out, serial...), nil, data, where), nil
}

// open is the opposite of seal; errSeal where it fails. The serial is authentic.
func (s *sealer) open(name string, file []byte) (serial string, data []byte, err error) {
	const head = len(sealMagic) + 1
	if len(file) < head || string(file[:len(sealMagic)]) != sealMagic || len(file) < head+int(file[head-1]) {
		return "", nil, errSeal
	}
	n := head + int(file[head-1])
	serial = string(file[head:n])
	a, where, err := s.at(name, serial)
	if err != nil {
		return "", nil, err
	}
	if data, err = a.Open(nil, nil, file[n:], where); err != nil {
		return "", nil, errSeal
	}
	return serial, data, nil
}
