package store

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/signet-ca/signet/identity"
)

func entries(texts ...string) (all [][]byte) {
	for _, s := range texts {
		all = append(all, []byte(s))
	}
	return all
}

// kept reads and forgets all notes.
func kept(t *testing.T, s *Store) (all []string) {
	t.Helper()
	for {
		n, ok, err := s.NextNote(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return all
		}
		for _, e := range n.Entries {
			all = append(all, string(e))
		}
		if err := s.Told(t.Context(), n.Change); err != nil {
			t.Fatal(err)
		}
	}
}

func TestANoteIsThereExactlyWithItsChange(t *testing.T) {
	s := newStore(t)
	ctx := t.Context()
	token := identity.Token{ID: "01", Hash: [32]byte{1}, Agent: "node-1", Created: now, Expires: now.Add(time.Hour)}
	made, revoked := &Note{Entries: entries("made", "and more")}, &Note{Entries: entries("revoked")}
	if err := s.Telling(made).CreateToken(ctx, token); err != nil {
		t.Fatal(err)
	}
	// The same once more violates the table's key.
	if err := s.Telling(&Note{Entries: entries("made again")}).CreateToken(ctx, token); err == nil {
		t.Error("a token was kept twice")
	}
	if err := s.Telling(&Note{Entries: entries("of nothing")}).RevokeToken(ctx, "02", now); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
	if err := s.Telling(revoked).RevokeToken(ctx, "01", now); err != nil {
		t.Fatal(err)
	}
	if made.Change == 0 || revoked.Change <= made.Change {
		t.Errorf("the changes are %d and %d", made.Change, revoked.Change)
	}
	s = reopened(t, s)
	if got := kept(t, s); !slices.Equal(got, []string{"made", "and more", "revoked"}) {
		t.Errorf("the notes are %q", got)
	}
	next := &Note{Entries: entries("later")}
	if err := s.Telling(next).RevokeToken(ctx, "01", now); err != nil || next.Change <= revoked.Change {
		t.Errorf("a change got the number %d of a forgotten one, %v", next.Change, err)
	}
}

func TestTheKeyThatUsedATokenGetsItAgainAndNobodyElse(t *testing.T) {
	s := newStore(t)
	ctx := t.Context()
	first, other := []byte("first"), []byte("other")
	add := func(n byte, agent string) [32]byte {
		t.Helper()
		token := identity.Token{ID: string('a' + rune(n)), Hash: [32]byte{n}, Agent: agent, Created: now, Expires: now.Add(time.Hour)}
		if err := s.CreateToken(ctx, token); err != nil {
			t.Fatal(err)
		}
		return token.Hash
	}
	use := func(hash [32]byte, key []byte, at time.Time) (string, uint64) {
		t.Helper()
		n := &Note{}
		n.OfToken = func(t identity.Token) error { n.Entries = entries(t.Agent); return nil }
		token, err := s.Telling(n).UseToken(ctx, hash, key, at)
		var u *identity.UnusableToken
		switch {
		case errors.As(err, &u):
			return u.Reason, n.Change
		case err != nil:
			t.Fatal(err)
		}
		return token.Agent, n.Change
	}
	hash := add(1, "node-1")
	for i, step := range []struct {
		key  []byte
		at   time.Time
		want string
		told bool
	}{
		{first, now, "node-1", true},
		{first, now.Add(time.Minute), "node-1", false},
		{other, now.Add(time.Minute), "used", false},
		{first, now.Add(time.Hour - 1), "node-1", false},
		{first, now.Add(time.Hour), "used", false},
	} {
		if got, change := use(hash, step.key, step.at); got != step.want || (change != 0) != step.told {
			t.Errorf("step %d: %s, change %d", i, got, change)
		}
	}
	// Enrolled with another token and key meanwhile: the first is history.
	if got, _ := use(add(2, "node-1"), other, now); got != "node-1" {
		t.Error(got)
	}
	if got, _ := use(hash, first, now); got != "used" {
		t.Errorf("a key that was replaced got %s", got)
	}
	if agents, err := s.Agents(ctx); err != nil || len(agents) != 1 || string(agents[0].SPKI) != "other" {
		t.Errorf("%+v %v", agents, err)
	}
}

func TestATokenIsUnspentWhenItsAgentIsRefused(t *testing.T) {
	s := newStore(t)
	ctx := t.Context()
	token := identity.Token{ID: "01", Hash: [32]byte{1}, Agent: "node-1", Created: now, Expires: now.Add(time.Hour)}
	if err := s.CreateToken(ctx, token); err != nil {
		t.Fatal(err)
	}
	no := errors.New("banned")
	if _, err := s.Telling(&Note{OfToken: func(identity.Token) error { return no }}).UseToken(ctx, token.Hash, []byte{1}, now); !errors.Is(err, no) {
		t.Error(err)
	}
	if agents, err := s.Agents(ctx); err != nil || len(agents) != 0 {
		t.Errorf("%v %v", agents, err)
	}
	if all, err := s.ListTokens(ctx); err != nil || !all[0].Used.IsZero() {
		t.Errorf("%v %v", all, err)
	}
}

func TestEnrollingAgainKeepsABan(t *testing.T) {
	s := newStore(t)
	ctx := t.Context()
	if err := s.PutAgent(ctx, Agent{AgentRow: identity.AgentRow{Name: "node-1", SPKI: []byte{1}, Banned: true}, Enrolled: now, NotAfter: now}); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateToken(ctx, identity.Token{ID: "01", Hash: [32]byte{1}, Agent: "node-1", Created: now, Expires: now.Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.UseToken(ctx, [32]byte{1}, []byte{2}, now); err != nil {
		t.Fatal(err)
	}
	agents, err := s.Agents(ctx)
	if err != nil || !agents[0].Banned || agents[0].SPKI[0] != 2 || !agents[0].NotAfter.IsZero() {
		t.Errorf("%+v %v", agents, err)
	}
}
