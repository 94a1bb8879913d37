package keystore

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/youmark/pkcs8"

	"github.com/signet-ca/signet/internal/durable"
)

// BackendFile is the Backend of references to key files.
const BackendFile = "file"

const (
	defaultIterations = 600_000    // of PBKDF2; what a new key gets and the least that is opened
	maxIterations     = 10_000_000 // some three seconds: a file must not choose how long we compute
	saltSize          = 16         // bytes of a new key's salt; SP 800-132 §5.1
	leastSalt         = 8          // bytes; RFC 8018 §4.1, and all that OpenSSL before 3.3 writes
	maxKeyFile        = 64 << 10   // bytes; an RSA-4096 key takes 3.4 KiB
	pemType           = "ENCRYPTED PRIVATE KEY"
	fileSuffix        = ".pem"
)

// FileConfig says where key files are and what protects them.
type FileConfig struct {
	// Dir holds <name>@<version>.pem and is made, 0700, with the first key.
	Dir string
	// Passphrase is asked once, when the first key is made or opened.
	Passphrase Passphrase
	// Iterations of PBKDF2 for new keys; 0 = 600,000, which is also the least.
	Iterations int
}

// File is a Store of encrypted PKCS#8 files (PBES2: PBKDF2-HMAC-SHA-256, AES-256-CBC), which `openssl pkey` reads.
// Each key costs about 0.2 s of deriving when it is made or opened; several may be opened at the same time.
type File struct {
	dir        string
	source     Passphrase
	iterations int
	// leastIterations is defaultIterations but in tests.
	leastIterations int

	// mu guards the passphrase and is held while it is asked, so that nobody is asked twice.
	mu         sync.Mutex
	passphrase *secret
	// proven says that the passphrase has opened or sealed a key here.
	proven bool
	// creating keeps two creations of this process from aiming at the same version.
	creating sync.Mutex
}

var _ Store = (*File)(nil)

// NewFile describes a store; it touches neither folder nor passphrase.
func NewFile(c FileConfig) (*File, error) { return newFile(c, defaultIterations) }

func newFile(c FileConfig, least int) (*File, error) {
	if c.Iterations == 0 {
		c.Iterations = defaultIterations
	}
	switch {
	case c.Dir == "":
		return nil, errors.New("key files: no folder is given")
	case c.Passphrase == nil:
		return nil, errors.New("key files: no source of the passphrase is given")
	case c.Iterations < least || c.Iterations > maxIterations:
		return nil, fmt.Errorf("key files: %d iterations of PBKDF2, want %d to %d", c.Iterations, least, maxIterations)
	}
	return &File{dir: c.Dir, source: c.Passphrase, iterations: c.Iterations, leastIterations: least}, nil
}

// Create returns the first version of the named key above after. Keys that are here already must open with the same
// passphrase: a folder whose keys need different ones could not be opened by any process.
func (s *File) Create(ctx context.Context, name string, alg Algorithm, after int) (Key, error) {
	s.creating.Lock()
	defer s.creating.Unlock()
	left, ref, err := s.next(ctx, name, alg, after, durable.Dir)
	if left != nil || err != nil {
		return left, err
	}
	pass, _, err := s.secret(ctx)
	if err != nil {
		return nil, err
	}
	signer, err := generate(alg)
	if err != nil {
		return nil, err
	}
	der, err := pkcs8.MarshalPrivateKey(signer, pass.reveal(), &pkcs8.Opts{
		Cipher:  pkcs8.AES256CBC,
		KDFOpts: pkcs8.PBKDF2Opts{SaltSize: saltSize, IterationCount: s.iterations, HMACHash: crypto.SHA256},
	})
	if err != nil {
		return nil, fmt.Errorf("encrypt key %s: %w", name, err)
	}
	block := pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der})
	for {
		err := durable.CreateFile(s.path(ref), block, 0o600)
		if errors.Is(err, fs.ErrExist) && ctx.Err() == nil {
			ref.Version++ // another process made this version meanwhile
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("create key %s: %w", ref, err)
		}
		s.prove(pass)
		return newLocalKey(ref, signer), nil
	}
}

// Find says which key Create would return, and whether it is there already. For a first key nobody is asked at the terminal.
func (s *File) Find(ctx context.Context, name string, alg Algorithm, after int) (Ref, bool, error) {
	left, ref, err := s.next(ctx, name, alg, after, durable.MayDir)
	if _, asks := s.source.(passphraseTerminal); err == nil && !asks {
		_, _, err = s.secret(ctx)
	}
	return ref, left != nil, err
}

// next is the key that Create returns: one that is there, else nil and the first reference that is free. dir sees to the folder.
func (s *File) next(ctx context.Context, name string, alg Algorithm, after int, dir func(string) error) (left Key, ref Ref, err error) {
	if err := validName(name); err != nil {
		return nil, ref, err
	}
	if _, err := ParseAlgorithm(string(alg)); err != nil {
		return nil, ref, err
	}
	if err := dir(s.dir); err != nil {
		return nil, ref, err
	}
	refs, err := s.List(ctx)
	if err != nil {
		return nil, ref, err
	}
	if len(refs) > 0 {
		_, proven, err := s.secret(ctx)
		if err != nil {
			return nil, ref, err
		}
		if !proven {
			if _, err := s.Open(ctx, refs[len(refs)-1]); err != nil {
				return nil, ref, fmt.Errorf("create key %s: the new key must have the same passphrase as those beside it: %w", name, err)
			}
		}
	}
	ref = Ref{Backend: BackendFile, Name: name, Version: max(after, 0) + 1}
	for _, r := range refs {
		if r.Name != name || r.Version < ref.Version {
			continue
		}
		left, err := s.Open(ctx, r)
		if err != nil {
			return nil, ref, fmt.Errorf("create key %s: an earlier try has left one: %w", name, err)
		}
		if AlgorithmOf(left.Public()) == alg {
			return left, r, nil
		}
		ref.Version = r.Version + 1
	}
	return nil, ref, nil
}

// Open decrypts a key. ErrNotFound; ErrWrongPassphrase; other errors for files that are damaged or not as we make them.
func (s *File) Open(ctx context.Context, ref Ref) (Key, error) {
	if ref.Backend != BackendFile || validName(ref.Name) != nil || ref.Version < 1 {
		return nil, fmt.Errorf("open key %s: not a reference to a key file", ref)
	}
	path := s.path(ref)
	raw, err := durable.ReadSecret(path, maxKeyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open key %s: %w in folder %s", ref, ErrNotFound, s.dir)
	}
	if err != nil {
		return nil, fmt.Errorf("open key %s: %w", ref, err)
	}
	sealed, err := parseSealed(raw, s.leastIterations)
	if err != nil {
		return nil, fmt.Errorf("open key %s: file %s %w", ref, path, err)
	}
	pass, _, err := s.secret(ctx)
	if err != nil {
		return nil, err
	}
	signer, err := sealed.open(pass.reveal())
	if errors.Is(err, ErrWrongPassphrase) {
		s.forget(pass)
		return nil, fmt.Errorf("open key %s: %w for %s (from: %s): give the one that the key was made with; if it is that one, the file is damaged and has to come back from a backup", ref, err, path, s.sourceName())
	}
	if err != nil {
		return nil, fmt.Errorf("open key %s: file %s %w", ref, path, err)
	}
	s.prove(pass)
	return newLocalKey(ref, signer), nil
}

// Delete removes a key file. What the disk keeps of removed blocks is still encrypted.
func (s *File) Delete(_ context.Context, ref Ref) error {
	if ref.Backend != BackendFile || validName(ref.Name) != nil || ref.Version < 1 {
		return fmt.Errorf("delete key %s: not a reference to a key file", ref)
	}
	if err := durable.Remove(s.path(ref)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete key %s: %w", ref, err)
	}
	return nil
}

// List returns the references of all keys, by name and version. Files of other names are passed over.
func (s *File) List(context.Context) ([]Ref, error) { return list(s.dir) }

// Holds reports whether a folder holds key files; a folder that is not there holds none.
func Holds(dir string) (bool, error) {
	refs, err := list(dir)
	return len(refs) > 0, err
}

func list(dir string) ([]Ref, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list keys: %w", err)
	}
	var refs []Ref
	for _, e := range entries {
		base, ok := strings.CutSuffix(e.Name(), fileSuffix)
		if !ok {
			continue
		}
		if ref, err := ParseRef(BackendFile + ":" + base); err == nil {
			refs = append(refs, ref)
		}
	}
	slices.SortFunc(refs, compareRefs)
	return refs, nil
}

func (s *File) path(r Ref) string {
	return filepath.Join(s.dir, r.Name+"@"+strconv.Itoa(r.Version)+fileSuffix)
}

// secret asks for the passphrase, once.
func (s *File) secret(ctx context.Context) (p *secret, proven bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.passphrase == nil {
		b, err := s.source.Passphrase(ctx)
		if err != nil {
			return nil, false, err
		}
		// Our own sources refuse an empty one; without a passphrase pkcs8 would write the key in clear.
		if len(b) == 0 {
			return nil, false, fmt.Errorf("%s is empty: keys are never kept without one", s.sourceName())
		}
		s.passphrase = &secret{reveal: func() []byte { return b }}
	}
	return s.passphrase, s.proven, nil
}

// forget lets a person who mistyped try again. A passphrase that has opened another key stays.
func (s *File) forget(p *secret) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.passphrase == p && !s.proven {
		s.passphrase = nil
	}
}

// prove remembers that the passphrase belongs to a key of this folder.
func (s *File) prove(p *secret) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proven = s.proven || s.passphrase == p
}

func (s *File) sourceName() string {
	if n, ok := s.source.(fmt.Stringer); ok {
		return n.String()
	}
	return "passphrase"
}

// String names the folder and what protects it.
func (s *File) String() string {
	return "key files in " + s.dir + ", sealed by " + s.sourceName()
}
func (s *File) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }
func (s *File) LogValue() slog.Value       { return slog.StringValue(s.String()) }

// open decrypts. ErrWrongPassphrase when what comes out is not a PKCS#8 key at all.
func (k *sealedKey) open(passphrase []byte) (crypto.Signer, error) {
	kek, _, err := pkcs8.PBKDF2Opts{IterationCount: k.iterations, HMACHash: crypto.SHA256}.DeriveKey(passphrase, k.salt, pkcs8.AES256CBC.KeySize())
	if err != nil {
		return nil, fmt.Errorf("can't be decrypted: %w", err)
	}
	plain, err := pkcs8.AES256CBC.Decrypt(kek, k.iv, k.ciphertext)
	clear(kek)
	if err != nil {
		return nil, fmt.Errorf("can't be decrypted: %w", err)
	}
	defer clear(plain)
	der, ok := privateKeyInfo(plain)
	if !ok {
		return nil, ErrWrongPassphrase
	}
	damaged := errors.New("opens with this passphrase but is damaged inside: restore it from a backup")
	priv, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, damaged
	}
	// CBC has no checksum. A key that encodes to the same bytes again, its public half included, is the one that was written.
	again, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil || !bytes.Equal(again, der) {
		return nil, damaged
	}
	clear(again)
	signer, ok := priv.(crypto.Signer)
	if !ok || !slices.Contains(Algorithms(), AlgorithmOf(signer.Public())) {
		return nil, fmt.Errorf("holds a key of a kind that is not used here: use one of %v", Algorithms())
	}
	return signer, nil
}
