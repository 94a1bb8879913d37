package server

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	adminv1 "github.com/signet-ca/signet/api/signet/admin/v1"
	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
)

const engineBackend = "engine"

// engine keeps keys outside this process as Transit does: a new version is one above the newest, a key that was deleted begins
// with 1 again, and a snapshot brings back what there was.
type engine struct {
	mu   sync.Mutex
	keys map[string][]keystore.Key
}

type engineKey struct {
	keystore.Key
	ref keystore.Ref
}

func (k engineKey) Ref() keystore.Ref { return k.ref }
func (k engineKey) Remote() bool      { return true }

func (e *engine) Find(_ context.Context, name string, _ keystore.Algorithm, after int) (keystore.Ref, bool, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return keystore.Ref{Backend: engineBackend, Name: name, Version: after + 1}, after < len(e.keys[name]), nil
}

func (e *engine) Create(ctx context.Context, name string, alg keystore.Algorithm, after int) (keystore.Key, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for after >= len(e.keys[name]) {
		key, err := keystore.NewMemory().Create(ctx, name, alg, 0)
		if err != nil {
			return nil, err
		}
		ref := keystore.Ref{Backend: engineBackend, Name: name, Version: len(e.keys[name]) + 1}
		e.keys[name] = append(slices.Clone(e.keys[name]), engineKey{key, ref})
	}
	return e.keys[name][after], nil
}

func (e *engine) Open(_ context.Context, ref keystore.Ref) (keystore.Key, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if ref.Version > len(e.keys[ref.Name]) {
		return nil, fmt.Errorf("open key %s: %w", ref, keystore.ErrNotFound)
	}
	return e.keys[ref.Name][ref.Version-1], nil
}

func (e *engine) List(context.Context) ([]keystore.Ref, error) { return nil, nil }

func (e *engine) Delete(_ context.Context, ref keystore.Ref) error {
	return fmt.Errorf("delete key %s: %w", ref, keystore.ErrKept)
}

// snapshot returns what brings back the keys as they are now.
func (e *engine) snapshot() (restore func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	saved := maps.Clone(e.keys)
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.keys = maps.Clone(saved)
	}
}

func (e *engine) clear() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.keys = map[string][]keystore.Key{}
}

func (e *engine) versions() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.keys[IntermediateKey])
}

// newEngined is a cluster whose root is at hand, and whose intermediates' keys are made in the backend.
func newEngined(t testing.TB, backend string) (*cluster, *engine) {
	t.Helper()
	u := &atOnce{t: t, roots: []*root{newRoot(t)}}
	e := &engine{keys: map[string][]keystore.Key{}}
	c := &cluster{name: "east", dir: shortDir(t), root: u.roots[0], keys: keystore.NewMemory(), upstream: u}
	c.stored = keystore.Join{
		Backends: map[string]keystore.Store{engineBackend: e, keystore.BackendMemory: c.keys},
		Homes:    map[string]string{IntermediateKey: backend}, Default: keystore.BackendMemory,
	}
	_, err := Init(t.Context(), InitConfig{Folder: c.folder(), Ceremony: byX509{}, Upstream: u, Rotation: testRotation(), RootFingerprint: c.root.fingerprint()})
	must(t, err)
	return c, e
}

// signs waits until this intermediate signs, and can.
func (l *live) signs(id string) {
	l.t.Helper()
	soon(l.t, id+" signs", func() bool {
		issuer, ok := l.issuers.Snapshot().Active(identity.Mesh)
		return ok && issuer.Name() == id
	})
}

func (l *live) next(dry bool) error {
	_, err := l.rotations().StartRotation(l.t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate", Successors: 1, DryRun: dry})
	return err
}

// What is to be done about a lost key is to rotate; then the numbers of those before have other keys.
func TestAServerStartsThoughAnEarlierKeyIsNowAnother(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(*engine) (and func()){
		"deleted":  func(e *engine) func() { return e.clear },
		"restored": (*engine).snapshot,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, e := newEngined(t, engineBackend)
			s := c.start(t, often)
			s.signs("intermediate-1")
			back := lose(e)
			must(t, s.next(false))
			s.signs("intermediate-2")
			back() // version 2 is gone; with "deleted", 1 is as well
			must(t, s.next(false))
			s.signs("intermediate-3")
			must(t, s.stop())
			for range 2 {
				s = c.start(t, often)
				s.signs("intermediate-3")
				if f := s.said(check.CodeExpiry); f.Level != check.OK {
					t.Errorf("it says %+v", f)
				}
				for _, id := range []string{"intermediate-1", "intermediate-2"} {
					if s.state(id) != ca.Retired || len(s.keeper.current.Load().chains[id]) != 2 {
						t.Errorf("%s is %s", id, s.state(id))
					}
				}
				must(t, s.stop())
			}
			// Nothing is given back to one whose key is another, and it is removed in its time.
			s = c.start(t, often)
			for _, dry := range []bool{true, false} {
				_, err := s.rotations().AbortRotation(t.Context(), &adminv1.AbortRotationRequest{Authority: "intermediate-3", DryRun: dry})
				wantError(t, err, "issuer intermediate-2: key engine:intermediate@2 does not match certificate ")
			}
			s.signs("intermediate-3")
			c.ahead.Store(int64(25 * time.Hour))
			soon(t, "those before are removed", func() bool {
				return s.state("intermediate-1") == ca.Removed && s.state("intermediate-2") == ca.Removed
			})
			s.signs("intermediate-3")
		})
	}
}

// One that signs is never signed with another key; the server starts, and rotates to a new one.
func TestAServerWhoseIssuersKeyIsNowAnotherStartsAndRotates(t *testing.T) {
	t.Parallel()
	c, e := newEngined(t, engineBackend)
	s := c.start(t, often)
	s.signs("intermediate-1")
	must(t, s.stop())
	good := e.snapshot()
	e.clear()
	must1(e.Create(t.Context(), IntermediateKey, keystore.ECDSAP256, 0))

	s = c.start(t, often)
	if _, ok := s.issuers.Snapshot().Active(identity.Mesh); ok {
		t.Fatal("another key than its certificate's signs")
	}
	if f := s.said(check.CodeInstalled); !f.Blocks() || !strings.Contains(f.Message, "does not match certificate ") || !strings.HasSuffix(f.Message, "put the right one back, or rotate to a new intermediate") {
		t.Errorf("readiness says %+v", f)
	}
	// The right one may come back.
	good()
	s.signs("intermediate-1")
	must(t, s.stop())
	e.clear()
	must1(e.Create(t.Context(), IntermediateKey, keystore.ECDSAP256, 0))
	s = c.start(t, often)
	must(t, s.next(false))
	s.signs("intermediate-2")
	must(t, s.next(false))
	s.signs("intermediate-3")
	must(t, s.stop())
	c.start(t, often).signs("intermediate-3")
}

func TestASuccessorWhoseKeyIsNowAnotherIsPassedOver(t *testing.T) {
	t.Parallel()
	c, e := newEngined(t, engineBackend)
	s := c.start(t, often)
	s.signs("intermediate-1")
	before := e.snapshot()
	c.ahead.Store(int64(4 * 24 * time.Hour)) // of seven days
	soon(t, "its successor stands ready", func() bool { return s.state("intermediate-2") == ca.Published })
	must(t, s.stop())
	before()
	must1(e.Create(t.Context(), IntermediateKey, keystore.ECDSAP256, 1))
	s = c.start(t, often)
	s.signs("intermediate-1")
	// It never takes over, and another does once it is given up.
	for _, dry := range []bool{true, false} {
		wantError(t, s.next(dry), "issuer intermediate-2: key engine:intermediate@2 does not match certificate ")
	}
	s.signs("intermediate-1")
	_, err := s.rotations().AbortRotation(t.Context(), &adminv1.AbortRotationRequest{Authority: "intermediate-2"})
	must(t, err)
	soon(t, "another one stands ready", func() bool { return s.state("intermediate-3") == ca.Published })
	must(t, s.next(false))
	s.signs("intermediate-3")
}

// A control CA has no successor: what is not its key signs nothing, and somebody is told at the start.
func TestAControlCAWhoseKeyIsNowAnotherIsRefused(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	must(t, c.keys.Delete(t.Context(), keystore.Ref{Backend: keystore.BackendMemory, Name: ControlKey, Version: 1}))
	must1(c.keys.Create(t.Context(), ControlKey, keystore.ECDSAP256, 0))
	_, err := New(t.Context(), c.config())
	wantError(t, err, "issuer control-ca-1: key memory:control-ca@1 does not match certificate ")
	wantError(t, err, "; put the right one back: a control CA has no successor")
}

// A certificate is not installed on a key that is not here: somebody is there who can still ask for another.
func TestNoCertificateIsInstalledOnAnotherKey(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s := c.start(t, nil)
	started, err := s.rotations().StartRotation(t.Context(), &adminv1.StartRotationRequest{Kind: "intermediate"})
	must(t, err)
	ref := keystore.Ref{Backend: keystore.BackendMemory, Name: IntermediateKey, Version: 2}
	must(t, c.keys.Delete(t.Context(), ref))
	s.keeper.forgetKey(ref)
	must1(c.keys.Create(t.Context(), IntermediateKey, keystore.ECDSAP256, 1))
	_, err = installs(c.root, c.root.intermediate(t, started.Requests[0].Csr, nil))(t.Context(), s.rotations(), false)
	wantError(t, err, "issuer intermediate-2: key memory:intermediate@2 does not match certificate ")
	if s.state("intermediate-2") != ca.Prepared || len(s.keeper.current.Load().chains["intermediate-2"]) > 0 {
		t.Errorf("it is %s", s.state("intermediate-2"))
	}
}

// home moves where the next intermediate's key is made.
func (c *cluster) home(backend string) {
	j := c.stored.(keystore.Join)
	j.Homes = map[string]string{IntermediateKey: backend}
	c.stored = j
}

// Each backend counts its own keys: one that makes what it skips is not asked to skip those of others.
func TestAMoveToAnotherBackendSkipsNoVersions(t *testing.T) {
	t.Parallel()
	c, e := newEngined(t, keystore.BackendMemory)
	key := func(s *live, id string) string {
		row, _ := s.keeper.current.Load().row(id)
		return row.Key.String()
	}
	begin := func(id, ref string, versions int) *live {
		t.Helper()
		s := c.start(t, often)
		s.signs(id)
		if got := key(s, id); got != ref || e.versions() != versions {
			t.Errorf("%s has %s, and there are %d versions, want %s and %d", id, got, e.versions(), ref, versions)
		}
		return s
	}
	for n := 1; n <= 3; n++ {
		c.forgetKeys(t)
		must(t, begin(fmt.Sprintf("intermediate-%d", n), fmt.Sprintf("memory:intermediate@%d", n), 0).stop())
	}
	c.home(engineBackend)
	c.forgetKeys(t)
	s := begin("intermediate-4", "engine:intermediate@1", 1)
	must(t, s.next(false))
	s.signs("intermediate-5")
	must(t, s.stop())
	// And back, twice: no number comes again.
	c.home(keystore.BackendMemory)
	s = begin("intermediate-5", "engine:intermediate@2", 2)
	must(t, s.next(false))
	s.signs("intermediate-6")
	if got := key(s, "intermediate-6"); got != "memory:intermediate@4" {
		t.Errorf("it has %s", got)
	}
	must(t, s.stop())
	c.home(engineBackend)
	c.forgetKeys(t)
	must(t, begin("intermediate-7", "engine:intermediate@3", 3).stop())
}

func TestNumbersOfAuthoritiesDontComeAgain(t *testing.T) {
	t.Parallel()
	row := func(id, ref string) store.Authority {
		return store.Authority{Authority: rotation.Authority{ID: id, Kind: ca.KindIntermediate}, Key: must1(keystore.ParseRef(ref))}
	}
	rows := []store.Authority{
		row("intermediate-9", "memory:intermediate@9"), row("intermediate-10", "engine:intermediate@1"),
		{Authority: rotation.Authority{ID: "control-ca-30", Kind: ca.KindControl}, Key: must1(keystore.ParseRef("file:control-ca@30"))},
	}
	for want, rows := range map[string][]store.Authority{"intermediate-1": nil, "intermediate-10": rows[:1], "intermediate-11": rows} {
		if got := nextIntermediate(rows); got != want {
			t.Errorf("after %d rows %s, want %s", len(rows), got, want)
		}
	}
}
