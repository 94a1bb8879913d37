package server

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/check"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/internal/store"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/test/doors"
)

// unasked is an upstream that nobody asks.
type unasked struct{ ca.Upstream }

// A Vault that is away makes a server unready only where the key that signs is in it.
func TestAVaultThatIsAwayIsFeltWhereTheSigningKeyIs(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "east")
	s, err := New(t.Context(), c.config())
	must(t, err)
	defer func() { must(t, s.closeAll()) }()
	s.config.Vault = func() check.Vault {
		return check.Vault{Address: "https://v:8200", Away: true, Since: time.Now(), Why: "Vault is sealed"}
	}
	var mesh rotation.Authority
	const agentsThere = "nothing can be issued: the first certificates of workloads end at "
	for _, try := range []struct {
		mesh, control string
		upstream      ca.Upstream
		ready         bool
		about, words  string
	}{
		{"vault-transit", keystore.BackendFile, nil, false, "vault-transit", "nothing can be issued: there are no certificates of workloads yet"},
		{"vault-transit", keystore.BackendFile, nil, false, "vault-transit", agentsThere},
		{keystore.BackendFile, "vault-transit", nil, true, "vault-control", "no agent can enrol"},
		{keystore.BackendMemory, keystore.BackendFile, unasked{}, true, "vault-pki", "nor after a restart of this server (Vault is sealed)"},
	} {
		if try.words == agentsThere {
			s.directory.enrolled(store.Agent{AgentRow: identity.AgentRow{Name: "node-1"}, Enrolled: time.Now()})
		}
		set := *s.keeper.current.Load()
		set.rows = slices.Clone(set.rows)
		for i := range set.rows {
			switch row := &set.rows[i]; {
			case row.Kind == ca.KindIntermediate && row.State == ca.Active:
				row.Key.Backend, mesh = try.mesh, row.Authority
			case row.Kind == ca.KindControl:
				row.Key.Backend = try.control
			}
		}
		s.keeper.current.Store(&set)
		s.config.Upstream = try.upstream
		found := check.NewWatch(s.checks()...).Findings(t.Context())
		f, stopped := issuingOf(t, found)
		if stopped == try.ready || stopped && (!f.Blocks() || !strings.Contains(f.Message, "the key of intermediate-1 can't be used (Vault is sealed)")) {
			t.Errorf("%s: of issuing it is said %+v", try.about, f)
		}
		found = slices.DeleteFunc(found, func(f check.Finding) bool { return f.Code != check.CodeVault })
		if len(found) != 1 || found[0].About != try.about || !strings.Contains(found[0].Message, try.words) || found.Ready() != try.ready {
			t.Errorf("%s: ready %v: %+v", try.about, found.Ready(), found)
		}
	}
	d := s.duties(s.now())
	due := mesh.NotBefore.Add(time.Duration(0.5 * float64(mesh.NotAfter.Sub(mesh.NotBefore))))
	if !d.Due.Equal(due) || !d.Until.After(due) || d.Until.After(mesh.NotAfter) || d.LeafSpare != rotation.LeastLeft(time.Hour) {
		t.Errorf("%+v of one that lives from %s to %s", d, mesh.NotBefore, mesh.NotAfter)
	}
}

// sickKeys are in a Vault: their signatures fail as it says, and so does a look at them.
type sickKeys struct {
	elsewhere
	why *atomic.Pointer[error]
}

type sickKey struct {
	keystore.Key
	why *atomic.Pointer[error]
}

func (k sickKey) Look(context.Context) error {
	if why := k.why.Load(); why != nil {
		return *why
	}
	return nil
}

func (k sickKey) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := k.Look(context.Background()); err != nil {
		return nil, err
	}
	return k.Key.Sign(r, digest, opts)
}

func (s sickKeys) Create(ctx context.Context, name string, alg keystore.Algorithm, after int) (keystore.Key, error) {
	k, err := s.elsewhere.Create(ctx, name, alg, after)
	return s.sick(k), err
}

func (s sickKeys) Open(ctx context.Context, ref keystore.Ref) (keystore.Key, error) {
	k, err := s.elsewhere.Open(ctx, ref)
	return s.sick(k), err
}

// sick has the log's key sign on: it is never in a Vault.
func (s sickKeys) sick(k keystore.Key) keystore.Key {
	if k.Ref().Name == logKey {
		return k
	}
	return sickKey{k, s.why}
}

// A key that does not sign is said once, and never not at all: by its Vault if that knows, else by the issuer.
func TestAKeyThatDoesNotSignIsSaidWhateverItsVaultKnows(t *testing.T) {
	t.Parallel()
	u := &atOnce{t: t, roots: []*root{newRoot(t)}}
	keys := sickKeys{elsewhere{keystore.NewMemory(), &atomic.Pointer[error]{}}, &atomic.Pointer[error]{}}
	c := &cluster{name: "east", dir: shortDir(t), root: u.roots[0], upstream: u, stored: keys}
	_, err := Init(t.Context(), InitConfig{Folder: c.folder(), Ceremony: byX509{}, Upstream: u, Rotation: testRotation(), RootFingerprint: c.root.fingerprint()})
	must(t, err)
	var known atomic.Pointer[check.Vault]
	known.Store(&check.Vault{})
	s := c.start(t, func(s *Server) {
		often(s)
		s.config.Vault = func() check.Vault { return *known.Load() }
	})
	soon(t, "the first intermediate signs", func() bool { return s.signing() == "intermediate-1" })
	s.apply(false, registration("a", "node-1"))
	m := s.enrol("node-1")
	conn := s.dial(m)
	s.leaf(conn, "a")
	found := func(code, about string) (f check.Finding, ok bool) {
		t.Helper()
		for _, f = range check.NewWatch(s.checks()...).Findings(t.Context()) {
			if f.Code == code && f.About == about && f.Level == check.Error {
				return f, true
			}
		}
		return f, false
	}
	overloaded := fmt.Errorf("too many requests: %w", keystore.ErrAway)
	keys.why.Store(&overloaded)
	if _, err := doors.Issue(t.Context(), conn, "a", shown, newCSR(t)); err == nil {
		t.Fatal("it was signed")
	}
	if f, ok := found(check.CodeKey, "issuer-mesh"); !ok || !f.Blocks() || !strings.Contains(f.Message, "too many requests") {
		t.Errorf("its Vault knows of nothing, and readiness says %+v", f)
	}
	known.Store(&check.Vault{Signing: check.Trouble{Since: time.Now(), Why: "too many requests"}})
	if f, ok := found(check.CodeKey, "issuer-mesh"); ok {
		t.Errorf("it is said twice: %+v", f)
	}
	if f, ok := found(check.CodeVault, "vault-transit"); !ok || !f.Blocks() {
		t.Errorf("its Vault does not say it: %+v", f)
	}
	known.Store(&check.Vault{})
	keys.why.Store(nil)
	s.authority.Look(t.Context())
	if f, ok := found(check.CodeKey, "issuer-mesh"); ok {
		t.Errorf("it is said though the key signs: %+v", f)
	}

	// Keys that are gone are found while nobody asks; that of the control CA stops enrolment, and leaves are made on.
	gone := errors.New("it was deleted")
	keys.why.Store(&gone)
	s.authority.Look(t.Context())
	for about, blocks := range map[string]bool{"issuer-mesh": true, "issuer-control": false} {
		if f, ok := found(check.CodeKey, about); !ok || f.Blocks() != blocks || !strings.Contains(f.Message, "it was deleted") {
			t.Errorf("of %s readiness says %+v", about, f)
		}
	}
	must(t, s.stop())
}
