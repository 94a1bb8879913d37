package ceremony

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/keystore"
)

// shaky is a keystore somewhere else, which can fail when it has made a key, or when one is to sign.
type shaky struct {
	*keystore.Memory
	after, sign error
}

func (s *shaky) Create(ctx context.Context, name string, alg keystore.Algorithm, after int) (keystore.Key, error) {
	k, err := s.Memory.Create(ctx, name, alg, after)
	if err == nil && s.after != nil {
		return nil, s.after
	}
	return s.wrap(k), err
}

func (s *shaky) Open(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	k, err := s.Memory.Open(ctx, ref)
	return s.wrap(k), err
}

// brokenKey doesn't sign.
type brokenKey struct {
	keystore.Key
	fail error
}

func (k *brokenKey) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, k.fail }

func (s *shaky) wrap(k keystore.Key) keystore.Key {
	if k == nil || s.sign == nil {
		return k
	}
	return &brokenKey{k, s.sign}
}

// shakyEngine makes certificates by itself, from a folderless root, and can fail or make something else.
type shakyEngine struct {
	key           keystore.Key
	root          *x509.Certificate
	before, after error
	spoil         func(*ca.Plan)
	answer        func(*ca.Answer)
	signed        int
}

func newEngine(t *testing.T) *shakyEngine { return &shakyEngine{key: newKey(t, keystore.ECDSAP256)} }

func (e *shakyEngine) FindRoot(_ context.Context, p ca.Plan) (*x509.Certificate, error) {
	if e.root != nil && e.root.Subject.CommonName != p.CommonName {
		return nil, errors.New("another root is there")
	}
	return e.root, nil
}

func (e *shakyEngine) MakeRoot(ctx context.Context, p ca.Plan) (*x509.Certificate, error) {
	if e.before != nil {
		return nil, e.before
	}
	if e.root != nil {
		return nil, errors.New("name in use")
	}
	p.SPKI = must(x509.MarshalPKIXPublicKey(e.key.Public()))
	e.root, _, _ = SelfSign(ctx, &memoryLog{}, e.key, p, by)
	return e.root, e.after
}

func (e *shakyEngine) Root(context.Context) (*x509.Certificate, error) { return e.root, nil }

func (e *shakyEngine) Sign(ctx context.Context, p ca.Plan, csr []byte) (ca.Answer, error) {
	if e.before != nil {
		return ca.Answer{}, e.before
	}
	if len(p.Serial) > 0 || !p.Under.Equal(e.root) {
		return ca.Answer{}, errors.New("it was asked for wrongly")
	}
	if e.spoil != nil {
		e.spoil(&p)
	}
	prepared, err := Prepare(p, e.root, csr)
	if err != nil {
		return ca.Answer{}, err
	}
	e.signed++
	cert, _, err := prepared.Sign(ctx, &memoryLog{}, e.key, by)
	a := ca.Answer{Chain: []*x509.Certificate{cert}, Roots: []*x509.Certificate{e.root}}
	if e.answer != nil {
		e.answer(&a)
	}
	return a, err
}

func elsewhereConfig(t *testing.T, e *Elsewhere) RootConfig {
	t.Helper()
	e.Where = []byte("vault: somewhere\n")
	return RootConfig{Dir: filepath.Join(t.TempDir(), "root"), TrustDomain: exampleOrg, Passphrase: right, Elsewhere: e, By: by}
}

// signOne signs an intermediate for a cluster and returns what the root's log holds then.
func signOne(t *testing.T, r *Root) History {
	t.Helper()
	c, _ := request(t, "east")
	signed, err := r.Sign(t.Context(), right, by, must(r.Prepare(c)))
	if err != nil {
		t.Fatal(err)
	}
	plan := must(ca.NewIntermediatePlan(exampleOrg, "east", signed[0].Chain[0].PublicKey, time.Time{}, 0))
	if err := plan.Check(signed[0].Chain, []*x509.Certificate{r.Certificate()}); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(r.recordPath(plan, signed[0].Receipt)); err != nil {
		t.Error(err)
	}
	return must(r.History(t.Context()))
}

func TestARootsKeyMayBeElsewhere(t *testing.T) {
	for name, e := range map[string]*Elsewhere{"keystore": {Keys: keystore.NewMemory()}, "engine": {Engine: newEngine(t)}} {
		t.Run(name, func(t *testing.T) {
			c := elsewhereConfig(t, e)
			if _, err := InitRoot(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			for path, mode := range map[string]fs.FileMode{"": 0o700, "root.pem": 0o644, "key.yaml": 0o600, "keys/log@1.pem": 0o600, "ceremonies/0000-root.yaml": 0o644} {
				if info, err := os.Stat(filepath.Join(c.Dir, path)); err != nil || info.Mode().Perm() != mode {
					t.Errorf("%s: %v, %v", path, info, err)
				}
			}
			if keys := must(os.ReadDir(filepath.Join(c.Dir, "keys"))); len(keys) != 1 {
				t.Errorf("the folder holds the keys %v", keys)
			}
			r := must(OpenRoot(c.Dir, nil))
			if text, err := r.Where(); err != nil || string(text) != string(e.Where) {
				t.Errorf("%q, %v", text, err)
			}
			ask, _ := request(t, "east")
			if _, err := r.Sign(t.Context(), right, by, must(r.Prepare(ask))); err == nil || !strings.Contains(err.Error(), "its key is elsewhere, as key.yaml says") {
				t.Errorf("without whoever holds the key: %v", err)
			}
			r.KeyIn(e)
			signOne(t, r)
			h := signOne(t, r)
			if h.Size != 3 || h.Made[0].Kind != ca.KindRoot || h.Made[2].Kind != ca.KindIntermediate || !strings.HasPrefix(h.Origin, "example.org/root/") {
				t.Errorf("the log holds %+v", h)
			}
			if _, err := InitRoot(t.Context(), c); !errors.Is(err, ErrExists) {
				t.Errorf("another time: %v", err)
			}
			c.Dir = filepath.Join(t.TempDir(), "root")
			if _, err := InitRoot(t.Context(), c); err == nil || errors.Is(err, fs.ErrNotExist) {
				t.Error("another folder took the same key")
			}
			if _, err := os.Stat(c.Dir); !errors.Is(err, fs.ErrNotExist) {
				t.Error("a folder was left of it")
			}
		})
	}
}

func TestAnInterruptedInitIsGoneOnWith(t *testing.T) {
	broken := errors.New("the line is cut")
	keys := func(s *shaky, heal func(*shaky)) (*Elsewhere, func()) {
		s.Memory = keystore.NewMemory()
		return &Elsewhere{Keys: s}, func() { heal(s) }
	}
	engine := func(edit, heal func(*shakyEngine)) (*Elsewhere, func()) {
		e := newEngine(t)
		edit(e)
		return &Elsewhere{Engine: e}, func() { heal(e) }
	}
	for name, make := range map[string]func() (*Elsewhere, func()){
		"the answer lost": func() (*Elsewhere, func()) { return keys(&shaky{after: broken}, func(s *shaky) { s.after = nil }) },
		"the signature":   func() (*Elsewhere, func()) { return keys(&shaky{sign: broken}, func(s *shaky) { s.sign = nil }) },
		"before the engine": func() (*Elsewhere, func()) {
			return engine(func(e *shakyEngine) { e.before = broken }, func(e *shakyEngine) { e.before = nil })
		},
		"its answer lost": func() (*Elsewhere, func()) {
			return engine(func(e *shakyEngine) { e.after = broken }, func(e *shakyEngine) { e.after = nil })
		},
	} {
		t.Run(name, func(t *testing.T) {
			e, heal := make()
			c := elsewhereConfig(t, e)
			if _, err := InitRoot(t.Context(), c); err == nil || !strings.Contains(err.Error(), "can be gone on with by the same command: ") || !strings.HasSuffix(err.Error(), broken.Error()) {
				t.Fatalf("got %v", err)
			}
			if _, err := OpenRoot(c.Dir, nil); err == nil {
				t.Fatal("half a root passes for a root")
			}
			heal()
			other := c
			other.Elsewhere = &Elsewhere{Keys: e.Keys, Engine: e.Engine, Where: []byte("vault: elsewhere\n")}
			if _, err := InitRoot(t.Context(), other); err == nil || !strings.Contains(err.Error(), "is somewhere else (key.yaml) than is asked for now") {
				t.Errorf("with another place: %v", err)
			}
			other.Elsewhere = nil
			if _, err := InitRoot(t.Context(), other); err == nil || !strings.Contains(err.Error(), "a root was begun there whose key is elsewhere") {
				t.Errorf("with the key in the folder: %v", err)
			}
			r, err := InitRoot(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			if e.Keys != nil {
				if refs := must(e.Keys.List(t.Context())); len(refs) != 1 {
					t.Errorf("it left %v behind", refs)
				}
			} else if !r.Certificate().Equal(e.Engine.(*shakyEngine).root) {
				t.Error("it is another root than was made")
			}
			if again, err := OpenRoot(c.Dir, nil); err != nil || !again.Certificate().Equal(r.Certificate()) {
				t.Errorf("opened: %v, %v", again, err)
			}
		})
	}
}

func TestAKeyThatChangesElsewhereIsNoticed(t *testing.T) {
	keys := keystore.NewMemory()
	must(keys.Create(t.Context(), "intermediate", keystore.ECDSAP256, 0)) // others may keep theirs there
	e := &Elsewhere{Keys: keys}
	r := must(InitRoot(t.Context(), elsewhereConfig(t, e)))
	r.KeyIn(e)
	must(keys.Create(t.Context(), "root", keystore.ECDSAP256, 1))
	signOne(t, r) // a later version is none of ours
	if err := keys.Delete(t.Context(), keystore.Ref{Backend: keystore.BackendMemory, Name: "root", Version: 1}); err != nil {
		t.Fatal(err)
	}
	c, _ := request(t, "east")
	if _, err := r.Sign(t.Context(), right, by, must(r.Prepare(c))); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("a key that is gone: %v", err)
	}
	other := keystore.NewMemory()
	must(other.Create(t.Context(), "root", keystore.ECDSAP256, 0))
	r.KeyIn(&Elsewhere{Keys: other})
	if _, err := r.Sign(t.Context(), right, by, must(r.Prepare(c))); err == nil || !strings.Contains(err.Error(), "does not match the certificate") {
		t.Errorf("another key: %v", err)
	}
}

func TestWhatAnEngineMakesIsComparedAndLoggedBeforeItIsGivenOut(t *testing.T) {
	e := newEngine(t)
	c := elsewhereConfig(t, &Elsewhere{Engine: e})
	r := must(InitRoot(t.Context(), c))
	r.KeyIn(c.Elsewhere)
	ask, _ := request(t, "east")
	for name, one := range map[string]struct {
		edit func()
		want string
	}{
		"nothing":      {func() { e.answer = func(a *ca.Answer) { a.Chain = nil } }, "it is not signed yet"},
		"not yet":      {func() { e.answer = func(a *ca.Answer) { a.Pending = "the admin's word" } }, "the admin's word"},
		"a longer one": {func() { e.spoil = func(p *ca.Plan) { p.NotAfter = p.NotAfter.Add(time.Hour) } }, "later than planned"},
		"another root": {func() {
			e.answer = func(a *ca.Answer) { a.Chain = append(a.Chain, newRoot(t, keystore.ECDSAP256).cert) }
		}, "is not signed by"},
		"away": {func() { e.before = errors.New("the line is cut") }, "the line is cut"},
	} {
		e.answer, e.spoil, e.before = nil, nil, nil
		one.edit()
		log := &memoryLog{}
		if chain, _, err := must(r.Prepare(ask)).signWith(t.Context(), log, e, by); err == nil || chain != nil || len(log.entries) > 0 || !strings.Contains(err.Error(), one.want) {
			t.Errorf("%s: %v, %v, %d entries; want %q", name, chain, err, len(log.entries), one.want)
		}
	}
	e.answer, e.spoil, e.before = nil, nil, nil
	p := must(r.Prepare(ask))
	broken := &memoryLog{fail: errors.New("disk full")}
	if chain, _, err := p.signWith(t.Context(), broken, e, by); err == nil || chain != nil || !strings.Contains(err.Error(), "could not be logged, so it is not given out: disk full") {
		t.Errorf("with a broken log: %v, %v", chain, err)
	}
	if _, _, err := p.signWith(t.Context(), &memoryLog{}, e, by); err == nil || !strings.Contains(err.Error(), "signed already") {
		t.Errorf("another time: %v", err)
	}
	if h := signOne(t, r); h.Size != 2 || h.Made[1].By.GetCaller() != by.GetCaller() {
		t.Errorf("the log holds %+v", h)
	}
}

func TestAnElsewhereThatIsNowhereIsRefused(t *testing.T) {
	for name, e := range map[string]*Elsewhere{
		"neither": {}, "both": {Keys: keystore.NewMemory(), Engine: newEngine(t)},
	} {
		c := elsewhereConfig(t, e)
		if _, err := InitRoot(t.Context(), c); err == nil || !strings.Contains(err.Error(), "either in a keystore or with an engine") {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := elsewhereConfig(t, &Elsewhere{Keys: keystore.NewMemory()})
	c.Elsewhere.Where = nil
	if _, err := InitRoot(t.Context(), c); err == nil || !strings.Contains(err.Error(), "say where its key is") {
		t.Errorf("got %v", err)
	}
	long := strings.Repeat("a.", 60) + "org"
	c.TrustDomain = spiffeid.RequireTrustDomainFromString(long)
	name, err := c.nameAfter(must(keystore.NewMemory().Create(t.Context(), "log", keystore.Ed25519, 0)))
	if err != nil || len(name) != 64 {
		t.Errorf("%q, %v", name, err)
	}
}
