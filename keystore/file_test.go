package keystore

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type fixed string

func (f fixed) Passphrase(context.Context) ([]byte, error) { return []byte(f), nil }

// quick is a store that derives in a millisecond.
func quick(t *testing.T, dir string, p Passphrase) *File {
	t.Helper()
	s, err := newFile(FileConfig{Dir: dir, Passphrase: p, Iterations: 1000}, 1000)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func create(t *testing.T, s Store, name string, alg Algorithm) Key {
	t.Helper()
	refs, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	newest := 0
	for _, r := range refs {
		if r.Name == name {
			newest = max(newest, r.Version)
		}
	}
	k, err := s.Create(t.Context(), name, alg, newest)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// sameKey signs with one and checks with the other.
func sameKey(t *testing.T, a, b Key) {
	t.Helper()
	type equaler interface{ Equal(crypto.PublicKey) bool }
	if !a.Public().(equaler).Equal(b.Public()) {
		t.Error("the keys differ")
	}
	digest := sha256.Sum256([]byte("x"))
	if pub, ok := a.Public().(*ecdsa.PublicKey); ok {
		sig, err := b.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err != nil || !ecdsa.VerifyASN1(pub, digest[:], sig) {
			t.Errorf("signature of the opened key: %v", err)
		}
	}
}

func TestAKeyComesBackFromItsFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "keys")
	s := quick(t, dir, fixed("hunter2"))
	for _, alg := range Algorithms() {
		k := create(t, s, "k-"+string(alg), alg)
		if alg != AlgorithmOf(k.(*localKey).private().Public()) {
			t.Errorf("asked for %s, got %s", alg, AlgorithmOf(k.(*localKey).private().Public()))
		}
		// Another process: another store.
		again, err := quick(t, dir, fixed("hunter2")).Open(t.Context(), k.Ref())
		if err != nil {
			t.Fatal(err)
		}
		sameKey(t, k, again)
		checkOpenSSL(t, s.path(k.Ref()), "hunter2", k.Public())
		if again.Ref() != k.Ref() || again.Remote() {
			t.Errorf("%v, remote %v", again.Ref(), again.Remote())
		}
	}
	if _, err := s.Create(t.Context(), "k", "dsa", 0); err == nil || !strings.Contains(err.Error(), "ecdsa-p256") {
		t.Errorf("an unknown algorithm: %v", err)
	}
	for _, name := range []string{"", "../x", "A", "a@1", strings.Repeat("a", 64)} {
		if _, err := s.Create(t.Context(), name, ECDSAP256, 0); err == nil {
			t.Errorf("name %q was taken", name)
		}
	}
	for _, r := range []Ref{{"memory", "a", 1}, {"file", "../a", 1}, {"file", "a", 0}, {}} {
		if _, err := s.Open(t.Context(), r); err == nil {
			t.Errorf("reference %v was opened", r)
		}
	}
	if _, err := s.Open(t.Context(), Ref{"file", "none", 1}); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), dir) {
		t.Errorf("a missing key: %v", err)
	}
}

func TestFilesAreReadableToTheirOwnerOnly(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	s := quick(t, dir, fixed("hunter2"))
	k := create(t, s, "ca", ECDSAP256)
	path := filepath.Join(dir, "ca@1.pem")
	for p, want := range map[string]os.FileMode{dir: 0o700, path: 0o600} {
		if info, err := os.Stat(p); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s has mode %o, want %o (%v)", p, info.Mode().Perm(), want, err)
		}
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(t.Context(), k.Ref()); err == nil || !strings.Contains(err.Error(), "chmod 0600 "+path) {
		t.Errorf("a key file for all to read: %v", err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(t.Context(), "ca", ECDSAP256, 0); err == nil || !strings.Contains(err.Error(), "chmod go-w "+dir) {
		t.Errorf("a folder for all to write: %v", err)
	}
}

func TestCreateMakesTheNextVersionAndNeverReplaces(t *testing.T) {
	dir := t.TempDir()
	s := quick(t, dir, fixed("hunter2"))
	create(t, s, "b", ECDSAP256)
	for want := 1; want <= 11; want++ {
		if k := create(t, s, "a", ECDSAP256); k.Ref() != (Ref{"file", "a", want}) {
			t.Errorf("got %v, want version %d", k.Ref(), want)
		}
	}
	// Neither foreign files nor names we would not have written are keys.
	for _, n := range []string{"c@01.pem", "c@0.pem", "c@1.key", ".tmp-x.pem", "C@1.pem", "a@99.pem.bak"} {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	refs, err := s.List(t.Context())
	if err != nil || len(refs) != 12 || refs[9].Version != 10 || refs[10].Version != 11 || refs[11].Name != "b" {
		t.Errorf("%v, %v", refs, err)
	}
	// Several processes at once: nobody's key is replaced.
	var wg sync.WaitGroup
	made := make([]Key, 8)
	for i := range made {
		wg.Go(func() { made[i] = create(t, quick(t, dir, fixed("hunter2")), "r", ECDSAP256) })
	}
	wg.Wait()
	for _, k := range made {
		again, err := s.Open(t.Context(), k.Ref())
		if err != nil {
			t.Fatal(err)
		}
		sameKey(t, again, k)
	}
	if none, err := quick(t, filepath.Join(dir, "none"), fixed("x")).List(t.Context()); err != nil || len(none) != 0 {
		t.Errorf("a folder that is not there: %v, %v", none, err)
	}
}

func TestAKeyThatAnEarlierTryHasLeftIsTaken(t *testing.T) {
	file := quick(t, t.TempDir(), fixed("hunter2"))
	for _, s := range []Store{file, NewMemory(), Join{Backends: map[string]Store{"file": file}, Default: "file", Homes: map[string]string{}}} {
		made := func(alg Algorithm, after int) Ref {
			t.Helper()
			before, _ := s.List(t.Context())
			found, there, err := s.Find(t.Context(), "ca", alg, after)
			if err != nil {
				t.Fatal(err)
			}
			if after, _ := s.List(t.Context()); !slices.Equal(before, after) {
				t.Errorf("looking for a key changes %v to %v", before, after)
			}
			k, err := s.Create(t.Context(), "ca", alg, after)
			if err != nil {
				t.Fatal(err)
			}
			if found != k.Ref() || there != slices.Contains(before, found) {
				t.Errorf("found was %v (there: %v), made is %v beside %v", found, there, k.Ref(), before)
			}
			return k.Ref()
		}
		first := made(ECDSAP256, 7)
		if first.Version != 8 {
			t.Errorf("%v: a number above 7 is wanted", first)
		}
		if again := made(ECDSAP256, 7); again != first {
			t.Errorf("%v, then %v for the same number", first, again)
		}
		if other := made(ECDSAP384, 7); other.Version != 9 {
			t.Errorf("%v is of another algorithm than what was left", other)
		}
		if next := made(ECDSAP256, 8); next.Version != 10 {
			t.Errorf("%v after 8, where 9 is of another algorithm", next)
		}
		if err := s.Delete(t.Context(), first); err != nil {
			t.Fatal(err)
		}
		for _, v := range []int{9, 10} {
			if err := s.Delete(t.Context(), Ref{first.Backend, "ca", v}); err != nil {
				t.Fatal(err)
			}
		}
		if next := made(ECDSAP256, 10); next.Version != 11 {
			t.Errorf("%v: a number has come again", next)
		}
		for _, r := range []Ref{{first.Backend, "ca", 11}} {
			if err := s.Delete(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := (Join{Backends: map[string]Store{"file": file}}).Open(t.Context(), Ref{"vault-transit", "ca", 1}); err == nil || !strings.Contains(err.Error(), "vault-transit") {
		t.Errorf("a backend that is not configured: %v", err)
	}
}

type counted struct {
	n     atomic.Int32
	reply func(n int32) ([]byte, error)
}

func (c *counted) Passphrase(context.Context) ([]byte, error) { return c.reply(c.n.Add(1)) }

func TestThePassphraseIsAskedOnce(t *testing.T) {
	dir := t.TempDir()
	s := quick(t, dir, fixed("hunter2"))
	for range 8 {
		create(t, s, "a", ECDSAP256)
	}
	c := &counted{reply: func(int32) ([]byte, error) { return []byte("hunter2"), nil }}
	s = quick(t, dir, c)
	var wg sync.WaitGroup
	for v := 1; v <= 8; v++ {
		wg.Go(func() {
			if _, err := s.Open(t.Context(), Ref{"file", "a", v}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	create(t, s, "a", ECDSAP256)
	if got := c.n.Load(); got != 1 {
		t.Errorf("asked %d times", got)
	}
}

func TestAWrongPassphraseIsNamedAndCanBeCorrected(t *testing.T) {
	dir := t.TempDir()
	first := create(t, quick(t, dir, fixed("hunter2")), "ca", ECDSAP256)
	c := &counted{reply: func(n int32) ([]byte, error) {
		if n == 1 {
			return []byte("hunter3"), nil
		}
		return []byte("hunter2"), nil
	}}
	s := quick(t, dir, c)
	_, err := s.Open(t.Context(), first.Ref())
	if !errors.Is(err, ErrWrongPassphrase) || !strings.Contains(err.Error(), filepath.Join(dir, "ca@1.pem")) ||
		!strings.Contains(err.Error(), "give the one that the key was made with") || strings.Contains(err.Error(), "hunter") {
		t.Errorf("got %v", err)
	}
	if _, err := s.Open(t.Context(), first.Ref()); err != nil {
		t.Errorf("the right one after a wrong one: %v", err)
	}
}

func TestAFolderHasOnePassphrase(t *testing.T) {
	dir := t.TempDir()
	create(t, quick(t, dir, fixed("hunter2")), "ca", ECDSAP256)
	_, err := quick(t, dir, fixed("other")).Create(t.Context(), "ca", ECDSAP256, 0)
	if !errors.Is(err, ErrWrongPassphrase) || !strings.Contains(err.Error(), "the same passphrase as those beside it") {
		t.Errorf("got %v", err)
	}
	if refs, err := list(dir); err != nil || len(refs) != 1 {
		t.Errorf("%v, %v", refs, err)
	}
}

func TestLookingForAKeyMakesNothingAndRefusesWhatCreateRefuses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "none", "yet")
	good := quick(t, dir, fixed("hunter2"))
	if ref, there, err := good.Find(t.Context(), "ca", ECDSAP256, 0); err != nil || there || ref != (Ref{BackendFile, "ca", 1}) {
		t.Errorf("%v %v %v", ref, there, err)
	}
	for what, c := range map[string]struct {
		store Store
		name  string
		alg   Algorithm
	}{
		"no passphrase":        {quick(t, dir, fixed("")), "ca", ECDSAP256},
		"no such algorithm":    {good, "ca", "dsa"},
		"no name":              {good, "../ca", ECDSAP256},
		"no name, in memory":   {NewMemory(), "../ca", ECDSAP256},
		"no place":             {quick(t, "/dev/null/keys", fixed("hunter2")), "ca", ECDSAP256},
		"no backend":           {Join{Default: "vault-transit"}, "ca", ECDSAP256},
		"a passphrase is gone": {quick(t, dir, PassphraseFile(dir)), "ca", ECDSAP256},
	} {
		if ref, there, err := c.store.Find(t.Context(), c.name, c.alg, 0); err == nil {
			t.Errorf("%s: %v %v", what, ref, there)
		}
	}
	// Nobody is asked for a passphrase that is good for nothing yet.
	if _, _, err := quick(t, dir, PassphraseTerminal("New passphrase", true)).Find(t.Context(), "ca", ECDSAP256, 0); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Dir(dir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a folder was made: %v", err)
	}
	create(t, good, "ca", ECDSAP256)
	if _, _, err := quick(t, dir, fixed("hunter3")).Find(t.Context(), "other", ECDSAP256, 0); !errors.Is(err, ErrWrongPassphrase) {
		t.Errorf("beside a key of another passphrase: %v", err)
	}
}

func TestNoKeyIsKeptWithoutAPassphrase(t *testing.T) {
	s := quick(t, t.TempDir(), fixed(""))
	if _, err := s.Create(t.Context(), "ca", ECDSAP256, 0); err == nil || !strings.Contains(err.Error(), "empty") {
		t.Errorf("got %v", err)
	}
	for _, c := range []FileConfig{
		{Passphrase: fixed("x")},
		{Dir: "x"},
		{Dir: "x", Passphrase: fixed("x"), Iterations: 599_999},
		{Dir: "x", Passphrase: fixed("x"), Iterations: 10_000_001},
		{Dir: "x", Passphrase: fixed("x"), Iterations: -1},
	} {
		if _, err := NewFile(c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}

// checkOpenSSL reads a key file with `openssl pkey`, where there is one.
func checkOpenSSL(t *testing.T, path, passphrase string, want crypto.PublicKey) {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		return
	}
	pass := filepath.Join(t.TempDir(), "pass")
	if err := os.WriteFile(pass, []byte(passphrase+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := openssl("pkey", "-in", path, "-passin", "file:"+pass, "-pubout")
	if err != nil {
		t.Fatalf("openssl on %s: %v\n%s", path, err, out)
	}
	spki, err := x509.MarshalPKIXPublicKey(want)
	if err != nil {
		t.Fatal(err)
	}
	if block, _ := pem.Decode(out); block == nil || !bytes.Equal(block.Bytes, spki) {
		t.Errorf("openssl reads another key from %s", path)
	}
	if out, err := openssl("pkey", "-in", path, "-passin", "pass:wrong", "-noout"); err == nil {
		t.Errorf("openssl opens %s with a wrong passphrase: %s", path, out)
	}
}

func openssl(args ...string) ([]byte, error) {
	return exec.Command("openssl", args...).CombinedOutput()
}

func TestOpenSSLReadsOurFilesAndWeReadOpenSSLs(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("no openssl here")
	}
	dir := t.TempDir()
	const passphrase = "correct horse ünd so"
	pass := filepath.Join(dir, "pass")
	if err := os.WriteFile(pass, []byte(passphrase+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := NewFile(FileConfig{Dir: filepath.Join(dir, "keys"), Passphrase: PassphraseFile(pass)})
	if err != nil {
		t.Fatal(err)
	}
	k := create(t, s, "ca", ECDSAP256)
	checkOpenSSL(t, s.path(k.Ref()), passphrase, k.Public())
	raw, err := os.ReadFile(s.path(k.Ref()))
	if err != nil {
		t.Fatal(err)
	}
	if p, err := parseSealed(raw, 0); err != nil || p.iterations != 600_000 || len(p.salt) != 16 {
		t.Errorf("%d iterations, salt of %d bytes (%v)", p.iterations, len(p.salt), err)
	}

	clear := filepath.Join(dir, "clear")
	for i, gen := range [][]string{
		{"ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", clear},
		{"genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384", "-out", clear},
		{"genrsa", "-out", clear, "2048"},
		{"genpkey", "-algorithm", "ed25519", "-out", clear},
	} {
		if out, err := openssl(gen...); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		ref := Ref{"file", "foreign", i + 1}
		convert := append(strings.Fields(reencrypt[strings.Index(reencrypt, "`")+len("`openssl "):len(reencrypt)-1]),
			"-in", clear, "-out", s.path(ref), "-passout", "file:"+pass)
		if out, err := openssl(convert...); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if _, err := s.Open(t.Context(), ref); err != nil {
			t.Errorf("%v: %v", gen, err)
		}
	}
	// A key in clear, and OpenSSL's own defaults (2,048 iterations).
	ref := Ref{"file", "foreign", 9}
	if err := os.Rename(clear, s.path(ref)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(t.Context(), ref); err == nil || !strings.Contains(err.Error(), "holds a key in clear, which is refused") {
		t.Errorf("a key in clear: %v", err)
	}
	weak := Ref{"file", "foreign", 10}
	if out, err := openssl("pkcs8", "-topk8", "-v2", "aes-256-cbc", "-in", s.path(ref), "-out", s.path(weak), "-passout", "file:"+pass); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := s.Open(t.Context(), weak); err == nil || !strings.Contains(err.Error(), "has only 2048 iterations") {
		t.Errorf("OpenSSL's default: %v", err)
	}
}

// envelope builds key files of any parameters, which the store itself would not.
type envelope struct {
	scheme, kdf, prf, cipher asn1.ObjectIdentifier
	salt, iv, ciphertext     []byte
	iterations               *big.Int
	keyLength                int
	trailing                 bool
}

func good() envelope {
	return envelope{
		oidPBES2, oidPBKDF2, oidHMACWithSHA256, oidAES256CBC,
		make([]byte, 16), make([]byte, 16), make([]byte, 160), big.NewInt(600_000), 0, false,
	}
}

func (e envelope) pem(t testing.TB) []byte {
	t.Helper()
	marshal := func(v any) asn1.RawValue {
		b, err := asn1.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return asn1.RawValue{FullBytes: b}
	}
	prf := pkix.AlgorithmIdentifier{Algorithm: e.prf, Parameters: asn1.NullRawValue}
	type kdfParams struct {
		Salt       []byte
		Iterations *big.Int
		KeyLength  int                      `asn1:"optional"`
		PRF        pkix.AlgorithmIdentifier `asn1:"optional"`
	}
	p := kdfParams{e.salt, e.iterations, e.keyLength, prf}
	if e.prf == nil {
		p.PRF = pkix.AlgorithmIdentifier{}
	}
	var params asn1.RawValue
	if e.prf == nil {
		params = marshal(struct {
			Salt       []byte
			Iterations *big.Int
		}{e.salt, e.iterations})
	} else {
		params = marshal(p)
	}
	outer := marshal(struct {
		Algorithm struct {
			OID    asn1.ObjectIdentifier
			Params struct{ KDF, Cipher pkix.AlgorithmIdentifier }
		}
		Data []byte
	}{
		Algorithm: struct {
			OID    asn1.ObjectIdentifier
			Params struct{ KDF, Cipher pkix.AlgorithmIdentifier }
		}{e.scheme, struct{ KDF, Cipher pkix.AlgorithmIdentifier }{
			pkix.AlgorithmIdentifier{Algorithm: e.kdf, Parameters: params},
			pkix.AlgorithmIdentifier{Algorithm: e.cipher, Parameters: marshal(e.iv)},
		}},
		Data: e.ciphertext,
	})
	der := outer.FullBytes
	if e.trailing {
		der = append(der, 0)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der})
}

func TestParametersAreCheckedBeforeAnythingIsComputed(t *testing.T) {
	if _, err := parseSealed(good().pem(t), defaultIterations); err != nil {
		t.Fatalf("the good one: %v", err)
	}
	scrypt := asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 11591, 4, 11}
	cases := map[string]struct {
		change func(*envelope)
		want   string
	}{
		"10,000,001 iterations":   {func(e *envelope) { e.iterations = big.NewInt(10_000_001) }, "wants 10000001 iterations of PBKDF2, more than the allowed 10000000"},
		"more than fit anywhere":  {func(e *envelope) { e.iterations = new(big.Int).Lsh(big.NewInt(1), 80) }, "is damaged"},
		"negative iterations":     {func(e *envelope) { e.iterations = big.NewInt(-1) }, "has only -1 iterations"},
		"too few iterations":      {func(e *envelope) { e.iterations = big.NewInt(599_999) }, "has only 599999 iterations"},
		"short salt":              {func(e *envelope) { e.salt = e.salt[:7] }, "has a salt of only 7 bytes, want at least 8"},
		"PBES1":                   {func(e *envelope) { e.scheme = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 5, 3} }, "other than PBES2"},
		"scrypt":                  {func(e *envelope) { e.kdf = scrypt }, "other than PBKDF2"},
		"HMAC-SHA-1":              {func(e *envelope) { e.prf = asn1.ObjectIdentifier{1, 2, 840, 113549, 2, 7} }, "other than HMAC-SHA-256"},
		"HMAC-SHA-1 by default":   {func(e *envelope) { e.prf = nil }, "other than HMAC-SHA-256"},
		"3DES":                    {func(e *envelope) { e.cipher = asn1.ObjectIdentifier{1, 2, 840, 113549, 3, 7} }, "other than AES-256-CBC"},
		"AES-128":                 {func(e *envelope) { e.cipher = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 2} }, "other than AES-256-CBC"},
		"another key length":      {func(e *envelope) { e.keyLength = 16 }, "is damaged"},
		"short IV":                {func(e *envelope) { e.iv = e.iv[:15] }, "is damaged"},
		"no ciphertext":           {func(e *envelope) { e.ciphertext = nil }, "is damaged"},
		"ciphertext of no blocks": {func(e *envelope) { e.ciphertext = e.ciphertext[:17] }, "is damaged"},
		"bytes behind":            {func(e *envelope) { e.trailing = true }, "is damaged"},
	}
	s := quick(t, t.TempDir(), &counted{reply: func(int32) ([]byte, error) {
		return nil, errors.New("the passphrase was asked for a file that is refused")
	}})
	s.leastIterations = defaultIterations
	for name, c := range cases {
		e := good()
		c.change(&e)
		path := filepath.Join(s.dir, "ca@1.pem")
		if err := os.WriteFile(path, e.pem(t), 0o600); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		_, err := s.Open(t.Context(), Ref{"file", "ca", 1})
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, want words %q", name, err, c.want)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("%s: refused after %s", name, took)
		}
	}
	for name, text := range map[string]string{
		"nothing":       "",
		"a certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"two keys":      string(good().pem(t)) + string(good().pem(t)),
		"old OpenSSL":   "-----BEGIN ENCRYPTED PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
	} {
		if _, err := parseSealed([]byte(text), 0); err == nil || !strings.Contains(err.Error(), "restore it from a backup") {
			t.Errorf("%s: %v", name, err)
		}
	}
	path := filepath.Join(s.dir, "ca@1.pem")
	if err := os.WriteFile(path, bytes.Repeat([]byte("\n"), maxKeyFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(t.Context(), Ref{"file", "ca", 1}); err == nil || !strings.Contains(err.Error(), "at most 65536 are allowed") {
		t.Errorf("a large file: %v", err)
	}
}

// Whichever bit of a file flips, the key that was written comes out or none.
func TestADamagedFileNeverGivesAnotherKey(t *testing.T) {
	s := quick(t, t.TempDir(), fixed("hunter2"))
	s.iterations, s.leastIterations = 2, 1
	want := create(t, s, "ca", ECDSAP256)
	raw, err := os.ReadFile(s.path(want.Ref()))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(raw)
	wrong, damaged := 0, 0
	for i := range block.Bytes {
		der := bytes.Clone(block.Bytes)
		der[i] ^= 1
		sealed, err := parseSealed(pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der}), 1)
		if err != nil || sealed.iterations > 1000 {
			continue
		}
		k, err := sealed.open([]byte("hunter2"))
		switch {
		case err == nil:
			if !want.Public().(*ecdsa.PublicKey).Equal(k.Public()) {
				t.Fatalf("byte %d: another key came out", i)
			}
		case errors.Is(err, ErrWrongPassphrase):
			wrong++
		default:
			damaged++
		}
	}
	if wrong == 0 || damaged == 0 {
		t.Errorf("%d wrong passphrases, %d damaged: want some of each", wrong, damaged)
	}
}

func FuzzParseSealed(f *testing.F) {
	f.Add(good().pem(f))
	e := good()
	e.prf, e.ciphertext = nil, e.ciphertext[:16]
	f.Add(e.pem(f))
	f.Add([]byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAA=\n-----END ENCRYPTED PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		k, err := parseSealed(raw, 1)
		if err != nil {
			if len(err.Error()) > 400 {
				t.Fatalf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		if k.iterations < 1 || k.iterations > maxIterations || len(k.salt) < leastSalt || len(k.iv) != 16 || len(k.ciphertext) == 0 || len(k.ciphertext)%16 != 0 {
			t.Fatalf("accepted %d iterations, salt %d, iv %d, ciphertext %d", k.iterations, len(k.salt), len(k.iv), len(k.ciphertext))
		}
		k.iterations = 1
		if _, err := k.open([]byte("x")); err == nil {
			t.Fatal("opened")
		}
	})
}

// What comes out of a decryption is foreign too.
func FuzzPrivateKeyInfo(f *testing.F) {
	f.Add([]byte{0x30, 5, 2, 1, 0, 0x30, 0, 1})
	f.Add(bytes.Repeat([]byte{16}, 16))
	f.Fuzz(func(t *testing.T, plain []byte) {
		der, ok := privateKeyInfo(plain)
		if ok && (len(der) >= len(plain) || len(plain)-len(der) > 16 || !bytes.HasPrefix(plain, der)) {
			t.Fatalf("%x from %x", der, plain)
		}
	})
}
