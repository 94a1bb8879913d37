package store

import (
	"errors"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/signet-ca/signet/ca"
	"github.com/signet-ca/signet/identity"
	"github.com/signet-ca/signet/keystore"
	"github.com/signet-ca/signet/rotation"
	"github.com/signet-ca/signet/trust"
)

func TestRevisionAndSequenceGoUpwardsOnly(t *testing.T) {
	s, ctx := newStore(t), t.Context()
	root := newRoot(t)
	if err := keepBundle(ctx, s, newBundle(t, 3, root)); err != nil {
		t.Fatal(err)
	}
	_, base, err := s.Authorities(ctx)
	if err != nil {
		t.Fatal(err)
	}
	change := func(s *Store, base, next, sequence uint64) error {
		return s.ChangeAuthorities(ctx, AuthorityChange{Base: base, Next: next, Bundle: newBundle(t, sequence, root)})
	}
	if err := change(s, base+1, base+9, 9); !errors.Is(err, ErrConflict) {
		t.Errorf("upon another revision: %v", err)
	}
	if err := change(s, base, base+9, 2); !errors.Is(err, trust.ErrRollback) {
		t.Errorf("a lower sequence: %v", err)
	}
	for _, revision := range []uint64{base, base - 1, math.MaxUint64} {
		if err := change(s, base, revision, 9); err == nil {
			t.Errorf("revision %d upon %d was kept", revision, base)
		}
	}
	note := &Note{Entries: entries("republished")}
	if err := change(s.Telling(note), base, base+9, 9); err != nil {
		t.Fatal(err)
	}
	s = reopened(t, s)
	b, _, err := s.Bundle(ctx, td)
	if err != nil || b.Sequence() != 9 {
		t.Errorf("%d %v", b.Sequence(), err)
	}
	if _, revision, err := s.Authorities(ctx); err != nil || revision != base+9 {
		t.Errorf("%d %v", revision, err)
	}
	history, err := s.BundleHistory(ctx)
	if err != nil || len(history) != 2 || history[1].Sequence != 9 {
		t.Errorf("%v %v", history, err)
	}
	if got := kept(t, s); !slices.Equal(got, []string{"republished"}) {
		t.Error(got)
	}
}

func TestLeavesAreExtendedForAnIssuerAndItsRootAndNeverShortened(t *testing.T) {
	s, ctx := newStore(t), t.Context()
	until := now.Add(time.Hour)
	put := func(id, kind, root string, key int, leaves time.Time) {
		t.Helper()
		a := Authority{Authority: rotation.Authority{ID: id, Kind: kind, Root: root, State: ca.Retired, Since: now, LeavesUntil: leaves}, Created: now}
		if key > 0 {
			a.Key = keystore.Ref{Backend: "file", Name: "intermediate", Version: key}
		}
		if err := keepAuthority(ctx, s, a); err != nil {
			t.Fatal(err)
		}
	}
	put("root-a", ca.KindRoot, "", 0, now.Add(2*time.Hour))
	put("root-b", ca.KindRoot, "", 0, time.Time{})
	put("intermediate-1", ca.KindIntermediate, "root-a", 1, now)
	put("intermediate-2", ca.KindIntermediate, "root-b", 2, time.Time{})
	put("intermediate-3", ca.KindIntermediate, "root-b", 3, now)
	_, base, err := s.Authorities(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if extended, err := s.ExtendLeaves(ctx, []string{"intermediate-1", "intermediate-2"}, until); err != nil || !extended {
		t.Fatal(extended, err)
	}
	// Once more, and of nobody: nothing changes, and nobody's decision is overtaken.
	for _, of := range [][]string{{"intermediate-1", "intermediate-2"}, nil, {"intermediate-9"}} {
		if extended, err := s.ExtendLeaves(ctx, of, until); err != nil || extended {
			t.Error(of, extended, err)
		}
	}
	all, revision, err := reopened(t, s).Authorities(ctx)
	if err != nil || revision != base+1 {
		t.Fatal(revision, err)
	}
	want := map[string]time.Time{
		"root-a": now.Add(2 * time.Hour), "root-b": until, "intermediate-1": until, "intermediate-2": until, "intermediate-3": now,
	}
	for _, a := range all {
		if !a.LeavesUntil.Equal(want[a.ID]) {
			t.Errorf("%s: %s, want %s", a.ID, a.LeavesUntil, want[a.ID])
		}
	}
}

func TestNotesAreReadInTheirOrder(t *testing.T) {
	s, ctx := newStore(t), t.Context()
	for i, text := range []string{"first", "second", "third"} {
		token := identity.Token{ID: text, Hash: [32]byte{byte(i)}, Agent: "node-1", Created: now, Expires: now.Add(time.Hour)}
		if err := s.Telling(&Note{Entries: entries(text)}).CreateToken(ctx, token); err != nil {
			t.Fatal(err)
		}
	}
	var read []string
	for last := uint64(0); ; {
		n, ok, err := s.NextNote(ctx, last)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			break
		}
		read, last = append(read, string(n.Entries[0])), n.Change
	}
	if !slices.Equal(read, []string{"first", "second", "third"}) {
		t.Error(read)
	}
}

func TestAFactThatChangesIsReplaced(t *testing.T) {
	s, ctx := newStore(t), t.Context()
	for _, value := range []string{"one", "two", "two"} {
		if err := s.ReplaceMeta(ctx, "longest_leaf", value); err != nil {
			t.Fatal(err)
		}
		if got, ok, err := s.Meta(ctx, "longest_leaf"); err != nil || !ok || got != value {
			t.Error(got, ok, err)
		}
	}
	if err := reopened(t, s).Verify(ctx); err != nil {
		t.Error(err)
	}
}
