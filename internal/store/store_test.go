package store

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	td  = spiffeid.RequireTrustDomainFromString("example.org")
	now = time.Date(2026, 5, 4, 3, 2, 1, 987654321, time.UTC)
)

func open(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func newStore(t *testing.T) *Store {
	t.Helper()
	return open(t, filepath.Join(t.TempDir(), "state.db"))
}

// reopened closes the store and opens its file again, as a restart does.
func reopened(t *testing.T, s *Store) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, s.path)
}

// oneSentence is what every refusal must be: it names what it is about and has no second line.
func oneSentence(t *testing.T, err error, about ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("nothing was refused; want an error about %q", about)
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("more than one line: %v", err)
	}
	for _, word := range about {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error does not say %q: %v", word, err)
		}
	}
}

func registration(name string, change ...func(*identity.Registration)) identity.Registration {
	r := identity.Registration{
		Name: name, ID: spiffeid.RequireFromPath(td, "/ns/shop/sa/"+name),
		Agents: []string{"node-1", "node-2"}, Selectors: []identity.Selector{"unix:gid:7", "unix:uid:1000"},
		TTL: time.Hour, Priority: -3,
	}
	for _, f := range change {
		f(&r)
	}
	return r
}

func TestWhatWasWrittenIsThereAfterARestart(t *testing.T) {
	s := newStore(t)
	ctx := t.Context()
	agent := Agent{AgentRow: identity.AgentRow{Name: "node-1", SPKI: []byte{1, 2, 3}, Banned: true}, Enrolled: now}
	later := Agent{AgentRow: identity.AgentRow{Name: "node-2", SPKI: []byte{4}}, Enrolled: now, LastSeen: now.Add(time.Hour), NotAfter: now.Add(2 * time.Hour)}
	authority := Authority{
		Authority:   rotation.Authority{ID: "east-1", Kind: ca.KindIntermediate, State: ca.Prepared, Root: "root-1", Since: now, Wanted: true, LeavesUntil: now},
		TaintReason: "lost", Key: keystore.Ref{Backend: "file", Name: "intermediate", Version: 2},
		CSR: []byte{9, 9}, Created: now,
	}
	control := Authority{
		Authority: rotation.Authority{ID: "control", Kind: ca.KindControl, State: ca.Active, Tainted: now, Leaving: now.Add(1), Aborted: now.Add(2)}, Key: keystore.Ref{Backend: "file", Name: "control", Version: 1},
		Chain: [][]byte{{1}, {2}, {3}}, Created: now.Add(time.Second),
	}
	bundle := newBundle(t, 4, newRoot(t), newRoot(t))
	token := identity.Token{ID: "0102", Hash: [32]byte{1, 2}, Agent: "node-3", Created: now, Expires: now.Add(time.Minute)}
	for what, err := range map[string]error{
		"agent": s.PutAgent(ctx, agent), "other agent": s.PutAgent(ctx, later), "authority": keepAuthority(ctx, s, authority),
		"control": keepAuthority(ctx, s, control), "bundle": keepBundle(ctx, s, bundle), "token": s.CreateToken(ctx, token),
		"meta": s.SetMeta(ctx, "cluster", "east"),
	} {
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	if _, err := s.ApplyRegistrations(ctx, 0, []identity.Registration{registration("web"), registration("db")}, nil); err != nil {
		t.Fatal(err)
	}

	s = reopened(t, s)
	agents, err := s.Agents(ctx)
	if d := cmp.Diff([]Agent{agent, later}, agents); err != nil || d != "" {
		t.Errorf("agents: %v\n%s", err, d)
	}
	authorities, _, err := s.Authorities(ctx)
	if d := cmp.Diff([]Authority{authority, control}, authorities); err != nil || d != "" {
		t.Errorf("authorities: %v\n%s", err, d)
	}
	tokens, err := s.ListTokens(ctx)
	if d := cmp.Diff([]identity.Token{token}, tokens); err != nil || d != "" {
		t.Errorf("tokens: %v\n%s", err, d)
	}
	b, ok, err := s.Bundle(ctx, td)
	if err != nil || !ok || b.Digest() != bundle.Digest() || b.Sequence() != 4 || !bytes.Equal(b.PEM(), bundle.PEM()) {
		t.Errorf("bundle: %v %v %v", b, ok, err)
	}
	if v, ok, err := s.Meta(ctx, "cluster"); v != "east" || !ok || err != nil {
		t.Errorf("meta: %q %v %v", v, ok, err)
	}
	all, revision, err := s.Registrations(ctx)
	at1 := func(r *identity.Registration) { r.Revision = 1 }
	want := []identity.Registration{registration("db", at1), registration("web", at1)}
	if d := cmp.Diff(want, all, cmp.AllowUnexported(spiffeid.ID{}, spiffeid.TrustDomain{})); err != nil || revision != 1 || d != "" {
		t.Errorf("registrations at revision %d: %v\n%s", revision, err, d)
	}
}

func TestAnEmptyStoreAnswers(t *testing.T) {
	s := newStore(t)
	if all, revision, err := s.Registrations(t.Context()); len(all) != 0 || revision != 0 || err != nil {
		t.Errorf("registrations: %v %d %v", all, revision, err)
	}
	if b, ok, err := s.Bundle(t.Context(), td); !b.IsZero() || ok || err != nil {
		t.Errorf("bundle: %v %v %v", b, ok, err)
	}
	if v, ok, err := s.Meta(t.Context(), "cluster"); v != "" || ok || err != nil {
		t.Errorf("meta: %q %v %v", v, ok, err)
	}
}

func TestTheFileIsForItsOwnerOnly(t *testing.T) {
	s := newStore(t)
	if err := s.SetMeta(t.Context(), "cluster", "east"); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(s.path + "*")
	if err != nil || len(files) < 2 {
		t.Fatalf("want the database and its journal, have %v %v", files, err)
	}
	for _, f := range files {
		if info, err := os.Stat(f); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", f, info.Mode(), err)
		}
	}
}

func TestCommitsAreOnTheDiskBeforeTheyAreAnswered(t *testing.T) {
	s := newStore(t)
	for pragma, want := range map[string]string{"synchronous": "2", "journal_mode": "wal", "foreign_keys": "1"} {
		var have string
		if err := s.db.QueryRowContext(t.Context(), "PRAGMA "+pragma).Scan(&have); err != nil || have != want {
			t.Errorf("%s is %q, want %q (%v)", pragma, have, want, err)
		}
	}
}

func TestFilesThatCannotBeUsedAreRefusedInOneSentence(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, mode os.FileMode, content string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(p, mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	link := filepath.Join(dir, "link.db")
	if err := os.Symlink(file("target.db", 0o600, ""), link); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ path, about string }{
		"no path":             {"", "no path"},
		"no folder":           {filepath.Join(dir, "none", "state.db"), "folder does not exist"},
		"a folder":            {dir, "is a folder"},
		"readable by others":  {file("open.db", 0o640, ""), "chmod 600"},
		"not a database":      {file("text.db", 0o600, strings.Repeat("this is not a database\n", 100)), "damaged"},
		"a symbolic link":     {link, "symbolic link"},
		"a folder of a file":  {filepath.Join(file("plain", 0o600, ""), "state.db"), "state.db"},
		"an unreadable place": {"/proc/self/state.db", "/proc/self/state.db"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Open(t.Context(), Config{Path: c.path})
			if s != nil {
				s.Close()
			}
			oneSentence(t, err, "state database", c.about)
		})
	}
}

func TestADamagedFileIsRefused(t *testing.T) {
	s := newStore(t)
	var put []identity.Registration
	for i := range 200 {
		put = append(put, registration(fmt.Sprintf("web-%d", i)))
	}
	if _, err := s.ApplyRegistrations(t.Context(), 0, put, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(s.path)
	if err != nil || len(whole) < 16*4096 {
		t.Fatalf("%d bytes, %v", len(whole), err)
	}
	for name, damage := range map[string]func([]byte) []byte{
		"a page of noise": func(b []byte) []byte { copy(b[8*4096:], bytes.Repeat([]byte{0xA5}, 4096)); return b },
		"cut in half":     func(b []byte) []byte { return b[:len(b)/2] },
		"header":          func(b []byte) []byte { copy(b, "nonsense"); return b },
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(s.path, damage(bytes.Clone(whole)), 0o600); err != nil {
				t.Fatal(err)
			}
			broken, err := Open(t.Context(), Config{Path: s.path})
			if broken != nil {
				broken.Close()
			}
			oneSentence(t, err, s.path, "damaged", "restore it from a backup")
		})
	}
}

// copied puts files of a store, or parts of them, into a folder of their own.
func copied(t *testing.T, parts map[string][]byte) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "state.db")
	for suffix, data := range parts {
		if err := os.WriteFile(path+suffix, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func TestATornLastPageIsRefusedThoughNothingIsInIt(t *testing.T) {
	s := newStore(t)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	all, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	for _, missing := range []int{1, 2048, 4095, 4096} {
		for _, readOnly := range []bool{false, true} {
			torn := all[:len(all)-missing]
			path := copied(t, map[string][]byte{"": torn})
			broken, err := Open(t.Context(), Config{Path: path, ReadOnly: readOnly})
			if broken != nil {
				broken.Close()
			}
			oneSentence(t, err, path, "damaged", "restore it from a backup", fmt.Sprintf("%d bytes of the %d", len(torn), len(all)))
			if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, torn) {
				t.Errorf("the file was changed (%v)", err)
			}
		}
	}
}

// Whoever is killed while the log's pages go into the file leaves a short file, and all of it in the log.
func TestACheckpointThatWasCutOffIsNoDamage(t *testing.T) {
	s := newStore(t)
	if err := s.SetMeta(t.Context(), "cluster", "east"); err != nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile(s.path + "-wal")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	all, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	for _, readOnly := range []bool{true, false} {
		again, err := Open(t.Context(), Config{Path: copied(t, map[string][]byte{"": all[:len(all)-4096*5/2], "-wal": log}), ReadOnly: readOnly})
		if err != nil {
			t.Fatal(err)
		}
		if v, _, err := again.Meta(t.Context(), "cluster"); v != "east" || err != nil {
			t.Errorf("it holds %q, %v", v, err)
		}
		if err := again.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestANewerSchemaIsLeftAlone(t *testing.T) {
	s := newStore(t)
	if _, err := s.db.ExecContext(t.Context(), `INSERT INTO goose_db_version (version_id, is_applied) VALUES (999, true)`); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := Open(t.Context(), Config{Path: s.path})
	oneSentence(t, err, s.path, "schema 999", "newer signet")
}

func TestTheStateOfAFolderIsOfOneClusterForEver(t *testing.T) {
	s := newStore(t)
	if err := s.MayMeta(t.Context(), "cluster", "west"); err != nil {
		t.Errorf("while it is nobody's: %v", err)
	}
	for range 2 {
		if err := s.SetMeta(t.Context(), "cluster", "east"); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.MayMeta(t.Context(), "cluster", "east"); err != nil {
		t.Error(err)
	}
	for _, set := range []func(context.Context, string, string) error{s.SetMeta, s.MayMeta} {
		err := set(t.Context(), "cluster", "west")
		oneSentence(t, err, `"east"`, `"west"`, s.path)
		if !errors.Is(err, ErrFixed) {
			t.Error(err)
		}
	}
	if v, _, _ := s.Meta(t.Context(), "cluster"); v != "east" {
		t.Errorf("cluster is now %q", v)
	}
}

func TestApplyIsIdempotentAndCountsChanges(t *testing.T) {
	s := newStore(t)
	apply := func(base, want uint64, put []identity.Registration, del ...string) {
		t.Helper()
		if have, err := s.ApplyRegistrations(t.Context(), base, put, del); err != nil || have != want {
			t.Fatalf("revision %d, want %d: %v", have, want, err)
		}
	}
	revisions := func() map[string]uint64 {
		t.Helper()
		all, _, err := s.Registrations(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		m := map[string]uint64{}
		for _, r := range all {
			m[r.Name] = r.Revision
		}
		return m
	}
	unsorted := registration("web", func(r *identity.Registration) { r.Agents = []string{"node-2", "node-1", "node-2"} })
	apply(0, 1, []identity.Registration{registration("web"), registration("db")})
	apply(1, 1, []identity.Registration{unsorted, registration("db")}, "never-there")
	if unsorted.Agents[0] != "node-2" {
		t.Error("the caller's registration was changed")
	}
	if _, err := s.ApplyRegistrations(t.Context(), 0, []identity.Registration{registration("web")}, nil); !errors.Is(err, ErrConflict) {
		t.Errorf("what stands was put on a revision that is past: %v", err)
	}
	apply(1, 2, []identity.Registration{registration("web"), registration("db", func(r *identity.Registration) { r.TTL = 0 })})
	if d := cmp.Diff(map[string]uint64{"web": 1, "db": 2}, revisions()); d != "" {
		t.Error(d)
	}
	apply(2, 3, nil, "web")
	if d := cmp.Diff(map[string]uint64{"db": 2}, revisions()); d != "" {
		t.Error(d)
	}
	// What hung on the deleted row is gone as well, and comes back only as it is put.
	apply(3, 4, []identity.Registration{registration("web", func(r *identity.Registration) { r.Agents = []string{"node-9"} })})
	all, _, err := s.Registrations(t.Context())
	if err != nil || len(all) != 2 || !cmp.Equal(all[1].Agents, []string{"node-9"}) {
		t.Errorf("%+v %v", all, err)
	}
}

func TestOnlyOneOfTwoWhoSawTheSameSetMayChangeIt(t *testing.T) {
	s := newStore(t)
	var won atomic.Int32
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			_, err := s.ApplyRegistrations(t.Context(), 0, []identity.Registration{registration(fmt.Sprintf("web-%d", i))}, nil)
			switch {
			case err == nil:
				won.Add(1)
			case !errors.Is(err, ErrConflict):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	all, revision, err := s.Registrations(t.Context())
	if won.Load() != 1 || len(all) != 1 || revision != 1 || err != nil {
		t.Errorf("%d won, %d registrations, revision %d, %v", won.Load(), len(all), revision, err)
	}
}

func TestARefusedApplyChangesNothing(t *testing.T) {
	s := newStore(t)
	good := registration("web")
	for name, c := range map[string]struct {
		put []identity.Registration
		del []string
	}{
		"invalid":          {put: []identity.Registration{good, registration("bad", func(r *identity.Registration) { r.Selectors = nil })}},
		"twice":            {put: []identity.Registration{good, good}},
		"put and deleted":  {put: []identity.Registration{good}, del: []string{"web"}},
		"reserved path":    {put: []identity.Registration{good, registration("x", func(r *identity.Registration) { r.ID = spiffeid.RequireFromPath(td, "/signet/x") })}},
		"no SPIFFE ID":     {put: []identity.Registration{good, registration("x", func(r *identity.Registration) { r.ID = spiffeid.ID{} })}},
		"other's revision": {put: []identity.Registration{good}},
	} {
		base := uint64(0)
		if name == "other's revision" {
			base = 7
		}
		if _, err := s.ApplyRegistrations(t.Context(), base, c.put, c.del); err == nil {
			t.Errorf("%s was applied", name)
		}
		if all, revision, err := s.Registrations(t.Context()); len(all) != 0 || revision != 0 || err != nil {
			t.Errorf("%s left %v at revision %d (%v)", name, all, revision, err)
		}
	}
}

func TestRowsEditedByHandAreNotBelieved(t *testing.T) {
	for name, c := range map[string]struct{ edit, about string }{
		"path":      {`UPDATE registrations SET spiffe_id = 'spiffe://example.org/signet/cluster/east/server/x'`, "reserved"},
		"id":        {`UPDATE registrations SET spiffe_id = 'spiffe://example.org/a/../b'`, "web"},
		"selectors": {`DELETE FROM registration_selectors`, "no selectors"},
		"agents":    {`DELETE FROM registration_agents`, "no agent"},
		"key":       {`UPDATE authorities SET key = '/etc/shadow'`, "key reference"},
		"state":     {`UPDATE authorities SET state = 'sovereign'`, "no known state"},
		"kind":      {`UPDATE authorities SET kind = ''`, "no known kind"},
		"bundle":    {`DELETE FROM bundle_roots WHERE position = 0`, "digest"},
		"roots":     {`DELETE FROM bundle_roots`, "no root"},
		"root":      {`UPDATE bundle_roots SET der = x'3000'`, "trust bundle"},
		"token":     {`UPDATE join_tokens SET hash = x'01'`, "hash of 1 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			ctx := t.Context()
			if _, err := s.ApplyRegistrations(ctx, 0, []identity.Registration{registration("web")}, nil); err != nil {
				t.Fatal(err)
			}
			for _, err := range []error{
				keepAuthority(ctx, s, Authority{Authority: rotation.Authority{ID: "a", Kind: ca.KindIntermediate, State: ca.Active}, Key: keystore.Ref{Backend: "file", Name: "k", Version: 1}, Created: now}),
				keepBundle(ctx, s, newBundle(t, 1, newRoot(t), newRoot(t))),
				s.CreateToken(ctx, identity.Token{ID: "01", Hash: [32]byte{1}, Agent: "n", Created: now, Expires: now}),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			if _, err := s.db.ExecContext(ctx, c.edit); err != nil {
				t.Fatal(err)
			}
			_, _, err1 := s.Registrations(ctx)
			_, _, err2 := s.Authorities(ctx)
			_, _, err3 := s.Bundle(ctx, td)
			_, err4 := s.ListTokens(ctx)
			oneSentence(t, errors.Join(err1, err2, err3, err4), c.about)
		})
	}
}

func TestTrustIsNeverTurnedBack(t *testing.T) {
	s := newStore(t)
	a, b := newRoot(t), newRoot(t)
	put := func(bundle trust.Bundle) error { t.Helper(); return keepBundle(t.Context(), s, bundle) }
	for _, ok := range []trust.Bundle{newBundle(t, 2, a), newBundle(t, 2, a), newBundle(t, 3, a, b), newBundle(t, 9, b)} {
		if err := put(ok); err != nil {
			t.Fatal(err)
		}
	}
	for name, old := range map[string]trust.Bundle{"older": newBundle(t, 3, a, b), "same sequence, other roots": newBundle(t, 9, a)} {
		if err := put(old); !errors.Is(err, trust.ErrRollback) {
			t.Errorf("%s: %v", name, err)
		}
	}
	have, ok, err := s.Bundle(t.Context(), td)
	if !ok || err != nil || have.Digest() != newBundle(t, 9, b).Digest() {
		t.Errorf("%v %v %v", have, ok, err)
	}
}

func TestAnAuthorityIsReplacedAsAWhole(t *testing.T) {
	s := newStore(t)
	a := Authority{
		Authority:   rotation.Authority{ID: "east-1", Kind: ca.KindIntermediate, State: ca.Prepared, Root: "root-1", Since: now, Wanted: true, LeavesUntil: now},
		TaintReason: "lost", Key: keystore.Ref{Backend: "file", Name: "intermediate", Version: 1},
		Chain: [][]byte{{1}, {2}}, Created: now,
	}
	signed := a
	signed.State, signed.Chain = ca.Active, [][]byte{{7}}
	for _, put := range []Authority{a, signed} {
		if err := keepAuthority(t.Context(), s, put); err != nil {
			t.Fatal(err)
		}
	}
	all, _, err := s.Authorities(t.Context())
	if d := cmp.Diff([]Authority{signed}, all); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	for name, change := range map[string]func(*Authority){
		"no id": func(a *Authority) { a.ID = "" }, "no kind": func(a *Authority) { a.Kind = "" }, "no state": func(a *Authority) { a.State = "" },
		"no key": func(a *Authority) { a.Key = keystore.Ref{} }, "a path as key": func(a *Authority) { a.Key.Name = "../x" },
		"no time": func(a *Authority) { a.Created = time.Time{} }, "endless chain": func(a *Authority) { a.Chain = make([][]byte, maxChain+1) },
	} {
		bad := signed
		change(&bad)
		if err := keepAuthority(t.Context(), s, bad); err == nil {
			t.Errorf("%s was kept", name)
		}
	}
}

func TestAgentsWithoutNameKeyOrTimeAreRefused(t *testing.T) {
	s := newStore(t)
	for name, a := range map[string]Agent{
		"name": {AgentRow: identity.AgentRow{Name: "../x", SPKI: []byte{1}}, Enrolled: now},
		"key":  {AgentRow: identity.AgentRow{Name: "n"}, Enrolled: now},
		"time": {AgentRow: identity.AgentRow{Name: "n", SPKI: []byte{1}}},
	} {
		if err := s.PutAgent(t.Context(), a); err == nil {
			t.Errorf("an agent without %s was kept", name)
		}
	}
}

// newKey is the key of a node.
func newKey(t *testing.T) identity.PublicKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	k, err := identity.OwnKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// One token, one winner, however many ask at once; and the losers can't tell why they lost.
func TestAJoinTokenHasOneWinner(t *testing.T) {
	s := newStore(t)
	const tokens, racers = 20, 50
	j := identity.NewJoinTokens(s, func() time.Time { return now })
	var wins [tokens]atomic.Int32
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range tokens {
		agent := fmt.Sprintf("node-%d", i)
		token, secret, err := j.Create(t.Context(), agent, 0)
		if err != nil {
			t.Fatal(err)
		}
		for range racers {
			wg.Go(func() {
				<-start
				node, err := j.AttestNode(t.Context(), secret, newKey(t))
				switch {
				case err == nil && node.Agent() == agent && node.TokenID() == token.ID:
					wins[i].Add(1)
				case err == nil:
					t.Errorf("token of %s made %s", agent, node.Agent())
				case !errors.Is(err, identity.ErrTokenUnusable):
					t.Error(err)
				}
			})
		}
	}
	close(start)
	wg.Wait()
	for i := range wins {
		if n := wins[i].Load(); n != 1 {
			t.Errorf("token %d has %d winners", i, n)
		}
	}
	all, err := s.ListTokens(t.Context())
	if err != nil || len(all) != tokens {
		t.Fatalf("%d tokens, %v", len(all), err)
	}
	for _, token := range all {
		if !token.Used.Equal(now) {
			t.Errorf("token of %s is not marked used: %+v", token.Agent, token)
		}
	}
}

func TestTokensThatAreNotUsableLookAlikeToThePeerButNotToTheLog(t *testing.T) {
	s := newStore(t)
	ctx := t.Context()
	clock := now
	j := identity.NewJoinTokens(s, func() time.Time { return clock })
	create := func() (identity.Token, []byte) {
		t.Helper()
		token, secret, err := j.Create(ctx, "node-1", time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		return token, secret
	}
	_, used := create()
	if _, err := j.AttestNode(ctx, used, newKey(t)); err != nil {
		t.Fatal(err)
	}
	r, revoked := create()
	for range 2 {
		if err := s.RevokeToken(ctx, r.ID, clock); err != nil {
			t.Fatal(err)
		}
	}
	_, expired := create()
	_, good := create()
	refused := func(reason string, secret []byte) {
		t.Helper()
		_, err := j.AttestNode(ctx, secret, newKey(t))
		var u *identity.UnusableToken
		if !errors.As(err, &u) || u.Reason != reason || err.Error() != identity.ErrTokenUnusable.Error() {
			t.Errorf("%s: %v %+v", reason, err, u)
			return
		}
		if known := reason == "used" || reason == "revoked" || reason == "expired"; known != (u.Agent == "node-1") {
			t.Errorf("%s: the log would name agent %q", reason, u.Agent)
		}
	}
	refused("used", used)
	refused("revoked", revoked)
	refused("unknown", make([]byte, 32))
	refused("malformed", []byte("short"))
	// The last moment counts, the next does not.
	clock = now.Add(time.Minute - 1)
	if _, err := j.AttestNode(ctx, good, newKey(t)); err != nil {
		t.Errorf("a token with a nanosecond to live: %v", err)
	}
	clock = now.Add(time.Minute)
	refused("expired", expired)
	refused("used", good)
	refused("revoked", revoked)
}

func TestARevocationThatChangesNothingSaysSo(t *testing.T) {
	s := newStore(t)
	j := identity.NewJoinTokens(s, func() time.Time { return now })
	token, secret, err := j.Create(t.Context(), "node-1", 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := j.AttestNode(t.Context(), secret, newKey(t)); err != nil {
		t.Fatal(err)
	}
	oneSentence(t, s.RevokeToken(t.Context(), token.ID, now), token.ID, "was used", "node-1")
	err = s.RevokeToken(t.Context(), "ffff", now)
	oneSentence(t, err, "ffff", "join-token list")
	if !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}

func TestNoSecretOfATokenIsInTheFile(t *testing.T) {
	s := newStore(t)
	_, secret, err := identity.NewJoinTokens(s, nil).Create(t.Context(), "node-1", 0)
	if err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob(s.path + "*")
	for _, f := range files {
		content, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(content, secret) {
			t.Errorf("the secret is in %s", f)
		}
	}
}

func TestACancelledCallEndsAndTheStoreGoesOn(t *testing.T) {
	s := newStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.SetMeta(ctx, "cluster", "east"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := s.SetMeta(t.Context(), "cluster", "east"); err != nil {
		t.Error(err)
	}
}

func TestAPathMayHoldAnything(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a b?c#d%41;e&_pragma=x")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := open(t, filepath.Join(dir, "state.db"))
	if err := s.SetMeta(t.Context(), "cluster", "east"); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(dir, "state.db-wal")); err != nil || info.Size() == 0 {
		t.Errorf("%v %v", info, err)
	}
}

func TestALockedDatabaseIsNamed(t *testing.T) {
	s := newStore(t)
	other, err := sql.Open("sqlite", s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	other.SetMaxOpenConns(1)
	if _, err := other.ExecContext(t.Context(), `BEGIN IMMEDIATE`); err != nil {
		t.Fatal(err)
	}
	if _, err := s.db.ExecContext(t.Context(), `PRAGMA busy_timeout(1)`); err != nil {
		t.Fatal(err)
	}
	oneSentence(t, s.SetMeta(t.Context(), "cluster", "east"), s.path, "another process")
}

func newRoot(t *testing.T) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: now, NotAfter: now.AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newBundle(t *testing.T, sequence uint64, roots ...*x509.Certificate) trust.Bundle {
	t.Helper()
	b, err := trust.NewBundle(td, sequence, roots)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// keepAuthority puts one authority upon the present revision.
func keepAuthority(ctx context.Context, s *Store, a Authority) error {
	_, revision, err := s.Authorities(ctx)
	if err != nil {
		return err
	}
	return s.ChangeAuthorities(ctx, AuthorityChange{Base: revision, Next: revision + 1, Put: []Authority{a}})
}

// keepBundle puts a bundle alone.
func keepBundle(ctx context.Context, s *Store, b trust.Bundle) error {
	_, revision, err := s.Authorities(ctx)
	if err != nil {
		return err
	}
	return s.ChangeAuthorities(ctx, AuthorityChange{Base: revision, Next: revision + 1, Bundle: b})
}
